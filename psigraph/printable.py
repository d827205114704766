"""Strangers' words, safe to show on a terminal."""

from __future__ import annotations

_MOST_LETTERS = 20_000


def printable(message: str, lines: bool = True) -> str:
    """The message with control characters escaped, and not without end: names out of a model file must not drive the
    terminal. lines: line breaks stay; else they are escaped too, since they could begin a line that is not ours."""
    shown = message if len(message) <= _MOST_LETTERS else f"{message[:_MOST_LETTERS]} ..."
    return "".join(
        letter
        if (lines and letter == "\n") or letter.isprintable()
        else letter.encode("unicode_escape", "replace").decode("ascii")
        for letter in shown
    )


def one_line(name: str, limit: int = 120) -> str:
    """A name out of a model file on one line, not too long."""
    return printable(name if len(name) <= limit else name[:limit] + "...", lines=False)
