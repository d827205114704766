"""Strings that end an answer, found in text that comes in pieces, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import UsageError


class StopStrings:
    """Give it the pieces of a text; it gives back what may be shown.

    The text ends before the first stop string that is complete; what could still become one is held back.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        """UsageError for an empty string, which would stop everything."""
        if any(not string for string in strings):
            raise UsageError("a stop string is empty: give at least one character")
        self._strings = tuple(strings)
        self._held = ""
        self.found = ""

    def push(self, piece: str) -> str:
        """What of the text is safe to show now. After a stop string, in `found`, nothing is."""
        if self.found:
            return ""
        if not self._strings:
            return piece
        text = self._held + piece
        # The first to be complete; of those that end together the longest, so that nothing depends on the pieces.
        ends = [(text.find(string) + len(string), -len(string), string) for string in self._strings if string in text]
        if ends:
            end, length, self.found = min(ends)
            self._held = ""
            return text[: end + length]
        kept = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Characters at the end of the text that a stop string could begin with."""
    for count in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:count]):
            return count
    return 0
