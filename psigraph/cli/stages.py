"""Several bars below each other for work that has stages: hash, compile, load, measure."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .terminal import Progress


class Stages:
    """Makes bars; each appears with its first report and goes when its work is done."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._display: _Display | None = None

    def bar(self, what: str, *, in_bytes: bool = False) -> Progress:
        """A function to call with (done, all). what: `loading weights`; in_bytes: the two counts are bytes."""
        task: list[int] = []

        def report(done: int, total: int) -> None:
            if not self._shown:
                return
            if self._display is None:
                self._display = _Display()
            self._display.show(task, what, done, total, in_bytes)

        return report

    def close(self) -> None:
        """Take everything off the terminal."""
        if self._display is not None:
            self._display.close()
            self._display = None


class _Display:
    def __init__(self) -> None:
        # rich takes 0.1 s to import, which commands without a bar should not pay.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}"))
        self._bars = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bars.start()

    def show(self, task: list[int], what: str, done: int, total: int, in_bytes: bool) -> None:
        amount = f"{done >> 20:,}/{total >> 20:,} MiB" if in_bytes else f"{done}/{total}"
        if not task:
            task.append(self._bars.add_task(what, total=total, amount=amount))
        known = task[0] in self._bars.task_ids
        if known and done < total:
            self._bars.update(task[0], completed=done, total=total, amount=amount)  # type: ignore[arg-type]
        elif known:
            self._bars.remove_task(task[0])  # type: ignore[arg-type]

    def close(self) -> None:
        self._bars.stop()


@contextmanager
def stages() -> Iterator[Stages]:
    """Bars on a terminal, nothing elsewhere; all of them go at the end, and before an error is printed."""
    found = Stages(sys.stderr is not None and sys.stderr.isatty())
    try:
        yield found
    finally:
        found.close()
