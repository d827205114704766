"""Tokens that a text spells out, such as <|im_start|>: found before the text is split and merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ...ir.errors import UsageError

MAX_LETTERS = 256
"""Letters of a special token. The search looks once for each length that tokens of one first letter have."""
MOST_PROBES = 1 << 24
"""Looks into the vocabulary for one text, which take a second or two. Qwen's tokens begin with < and have 15 lengths: a
text has a million of these letters before it comes to this."""


class SpecialTokens:
    """Finds tokens in a text: the leftmost first, the longest of those that begin in one place.

    Not by the library, whose search takes 80 bytes of memory and a third of a microsecond for each byte of the tokens:
    models that speak have tens of thousands of them.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        """ids: text -> id, no text empty or longer than MAX_LETTERS."""
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, lengths))}]") if lengths else None

    def split(self, text: str) -> Iterator[str | int]:
        """The text between the tokens, and their ids where they stand; UsageError where that takes too long."""
        begin = at = probes = 0
        while self._first is not None and (match := self._first.search(text, at)):
            at = match.start()
            probes += len(self._lengths[text[at]])
            if probes > MOST_PROBES:
                raise UsageError(
                    "the text is too long for a model with so many special tokens: "
                    f"{at:,} of its {len(text):,} characters took {MOST_PROBES:,} looks for one; shorten it"
                )
            token, end = self._token_at(text, at)
            if token is None:
                at += 1
                continue
            if begin < at:
                yield text[begin:at]
            yield token
            begin = at = end
        if begin < len(text):
            yield text[begin:]

    def _token_at(self, text: str, at: int) -> tuple[int | None, int]:
        for length in self._lengths[text[at]]:
            found = text[at : at + length]
            if found in self._ids:
                return self._ids[found], at + len(found)
        return None, at
