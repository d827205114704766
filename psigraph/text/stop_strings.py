"""Strings that end an answer, found in text that comes in pieces, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import UsageError


class StopStrings:
    """Give it the pieces of a text; it gives back what may be shown.

    The text ends before the first stop string that is complete; what could still become one is held back. Hidden
    pieces, those of control tokens, are looked at like others and never given back.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        """UsageError for an empty string, which would stop everything."""
        if any(not string for string in strings):
            raise UsageError("a stop string is empty: give at least one character")
        self._strings = tuple(strings)
        self._held, self._hidden = "", b""  # a byte a character: 1 where it is never shown
        self.found = ""

    def push(self, piece: str, hidden: bool = False) -> str:
        """What of the text is safe to show now. After a stop string, in `found`, nothing is."""
        if self.found:
            return ""
        if not self._strings:
            return "" if hidden else piece
        text, marks = self._held + piece, self._hidden + bytes([hidden]) * len(piece)
        # The first to be complete; of those that end together the longest, so that nothing depends on the pieces.
        ends = [(text.find(string) + len(string), -len(string), string) for string in self._strings if string in text]
        if ends:
            end, length, self.found = min(ends)
            self._held, self._hidden = "", b""
            return _shown(text[: end + length], marks)
        safe = len(text) - max(_overlap(text, string) for string in self._strings)
        self._held, self._hidden = text[safe:], marks[safe:]
        return _shown(text[:safe], marks)

    def finish(self) -> str:
        """What was held back and became no stop string."""
        shown = _shown(self._held, self._hidden)
        self._held, self._hidden = "", b""
        return shown


def _shown(text: str, marks: bytes) -> str:
    return "".join(letter for letter, hidden in zip(text, marks, strict=False) if not hidden)


def _overlap(text: str, string: str) -> int:
    """Characters at the end of the text that a stop string could begin with."""
    for count in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:count]):
            return count
    return 0
