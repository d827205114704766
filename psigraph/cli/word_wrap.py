"""A model's text on a terminal: word by word, and no word cut by the right margin."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator

NARROWEST = 20  # columns below which lines are left to the terminal
LONGEST_HELD = 40  # letters after which a word is shown although it goes on
_FENCE = "```"


def whole_words(pieces: Iterable[str], columns: int) -> Iterator[str]:
    """The same text in whole words, with line breaks for spaces where a word would cross the last column.

    What stands between rows of three backquotes keeps its lines, however long, so that it can be copied. Scripts
    without spaces break between two of their wide letters.
    """
    if columns < NARROWEST:
        yield from pieces
        return
    lines = _Lines(columns)
    for piece in pieces:
        if text := "".join(map(lines.push, piece)):
            yield text
    if rest := lines.flush():
        yield rest


class _Lines:
    def __init__(self, columns: int) -> None:
        self._columns = columns
        self._column = 0
        self._space = self._word = ""
        self._goes_on = False  # the word's beginning has been shown
        self._code = False

    def push(self, letter: str) -> str:
        """What can be shown now that the letter is known."""
        if letter == "\n":
            shown = self.flush() + letter
            self._column, self._goes_on = 0, False
            return shown
        if letter.isspace():
            shown = self.flush() if self._word or self._goes_on else ""
            self._space += letter
            self._goes_on = False
            return shown
        if _width(letter) == 2:
            shown = self.flush()
            self._word = letter
            return shown + self.flush()
        self._word += letter
        if len(self._word) < LONGEST_HELD:
            return ""
        shown = self.flush()
        self._goes_on = True
        return shown

    def flush(self) -> str:
        """The spaces and the word that were held."""
        space, word = self._space, self._word
        self._space = self._word = ""
        if not self._column and word.startswith(_FENCE):
            self._code = not self._code
        end = self._column + len(space) + sum(map(_width, word))
        breaks = self._column and end > self._columns and not self._code and not self._goes_on
        if word and breaks:
            space, end = "\n", sum(map(_width, word))
        self._column = end % self._columns if end > self._columns else end
        return space + word


def _width(letter: str) -> int:
    """Columns of a letter."""
    if unicodedata.combining(letter) or unicodedata.category(letter) == "Cf":
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
