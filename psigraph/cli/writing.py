"""Text that a model writes, on its way to a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import click


def write_pieces(pieces: Iterable[str]) -> None:
    """Writes pieces as they come and ends the line, after Ctrl-C too, but none where nothing was begun."""
    begun = False
    try:
        for piece in showable(pieces):
            click.echo(piece, nl=False)
            if sys.stdout is not None:  # closed before the program began: nobody reads
                sys.stdout.flush()
            begun = True
        begun = True  # an answer of no characters is a line too
    finally:
        if begun:
            click.echo()


def showable(pieces: Iterable[str]) -> Iterator[str]:
    """What stdout can take: a question mark for what its encoding lacks; on a terminal, no control characters.

    A model that writes escape sequences must not drive the terminal; a pipe gets what was written.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    terminal = sys.stdout is not None and sys.stdout.isatty()
    for piece in pieces:
        text = piece.encode(encoding, "replace").decode(encoding)
        yield "".join(map(_harmless, text)) if terminal else text


def speaks_unicode() -> bool:
    """Whether stdout can take every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def _harmless(letter: str) -> str:
    code = ord(letter)
    return "?" if letter not in "\n\t" and (code < 0x20 or 0x7F <= code < 0xA0) else letter
