"""A sign of life while a prompt is read: a line on the terminal that goes when the answer begins."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType

import click

from .terminal import is_watched

EVERY_S = 0.1


class Waiting:
    """Shows one line over and over, and takes it away with spaces: every terminal can do that."""

    def __init__(self) -> None:
        self._watched = is_watched()
        self._width = 0
        self._next = 0.0

    def show(self, text: str) -> None:
        """The line as it is now, ten times a second at most."""
        if not self._watched or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S
        click.echo(f"\r{text:<{self._width}}", nl=False, err=True)
        self._width = max(self._width, len(text))

    def reading(self, position: int, total: int) -> None:
        """How much of a prompt is in. position: of the session, which goes on behind the prompt."""
        self.show(f"reading {min(position, total):,} of {total:,} tokens ...")

    def until_first(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces; with the first one the line goes and does not come back."""
        for piece in pieces:
            self.end()
            yield piece
        self.end()  # there was none

    def __enter__(self) -> Waiting:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Take the line away."""
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False, err=True)
        self._width, self._watched = 0, False
