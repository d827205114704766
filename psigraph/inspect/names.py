"""Names out of model files, safe to show."""

from __future__ import annotations


def one_line(name: str, limit: int = 120) -> str:
    """A stranger's text on one line, not too long: what would drive a terminal or begin a new line is escaped."""
    shown = name if len(name) <= limit else name[:limit] + "..."
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "replace").decode("ascii")
        for letter in shown
    )
