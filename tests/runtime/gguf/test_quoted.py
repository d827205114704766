"""What of a stranger's text is shown."""

import pytest

from psigraph.runtime.gguf.cursor import quoted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "''"),
        ("a\n\x1b", r"'a\n\x1b'"),
        ("x" * 80, f"'{'x' * 80}'"),
        ("x" * 81, f"'{'x' * 80}...'"),
        ("it's", '"it\'s"'),
        ("😀" * 1000, "'" + r"\U0001f600" * 8 + "...'"),
    ],
)
def test_a_text_is_shown_in_at_most_85_plain_letters(text: str, shown: str) -> None:
    assert quoted(text) == shown
