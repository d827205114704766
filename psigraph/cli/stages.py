"""How far work is that has stages: hash, compile, load, measure. Bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import click

from ..options import Progress
from .notes import is_quiet
from .terminal import is_dumb, is_watched

# When a log hears of work that takes long, when a terminal that has no bars does, and how often after that.
FIRST_LINE_S, WATCHED_S, NEXT_LINE_S = 5.0, 1.0, 15.0


class _Display(Protocol):
    def show(self, task: list[int], what: str, done: int, total: int, amount: str) -> None:
        """A stage's progress. task: what the display remembers of the stage."""

    def close(self) -> None:
        """Take everything off the terminal."""


class Stages:
    """Makes bars; each appears with its first report and goes when its work is done."""

    def __init__(self) -> None:
        self._display: _Display | None = None

    def bar(self, what: str, *, in_bytes: bool = False) -> Progress:
        """A function to call with (done, all). what: `loading weights`; in_bytes: the two counts are bytes."""
        task: list[int] = []

        def report(done: int, total: int) -> None:
            if is_quiet():
                return
            if self._display is None:
                self._display = _Bars() if is_watched() and not is_dumb() else _Lines()
            amount = f"{done >> 20:,}/{total >> 20:,} MiB" if in_bytes else f"{done}/{total}"
            self._display.show(task, what, done, total, amount)

        return report

    def close(self) -> None:
        """Take everything off the terminal."""
        if self._display is not None:
            self._display.close()
            self._display = None


class _Bars:
    """For terminals."""

    def __init__(self) -> None:
        # rich takes 0.1 s to import, which commands without a bar should not pay.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
        self._bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._bars.start()

    def show(self, task: list[int], what: str, done: int, total: int, amount: str) -> None:
        if not task:
            task.append(self._bars.add_task(what, total=total, amount=amount))
        known = task[0] in self._bars.task_ids
        if known and done < total:
            self._bars.update(task[0], completed=done, total=total, amount=amount)  # type: ignore[arg-type]
        elif known:
            self._bars.remove_task(task[0])  # type: ignore[arg-type]

    def close(self) -> None:
        self._bars.stop()


class _Lines:
    """For logs, and for terminals that cannot go back: a stage that takes long says so, and not often."""

    def __init__(self) -> None:
        self._next = time.monotonic() + (WATCHED_S if is_watched() else FIRST_LINE_S)

    def show(self, task: list[int], what: str, done: int, total: int, amount: str) -> None:
        if done < total and time.monotonic() >= self._next:
            self._next = time.monotonic() + NEXT_LINE_S
            click.echo(f"psigraph: {what}: {amount}", err=True)

    def close(self) -> None:
        """Lines stay."""


@contextmanager
def stages() -> Iterator[Stages]:
    """Progress on stderr; bars go at the end, and before an error is printed."""
    found = Stages()
    try:
        yield found
    finally:
        found.close()
