"""What commands show while they work: on stderr, so that a pipe gets the result alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]


@contextmanager
def progress_bar(what: str, *, in_bytes: bool = False) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere. Gives a function to call with (done, all), as often as wanted.

    what: what is being done, such as `writing model.gguf`; in_bytes: the two counts are bytes.
    The bar goes when the work is done, and before an error is printed.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total: None
        return

    # rich takes 0.1 s to import, which commands without a bar should not pay.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    counts = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), counts, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
