"""How a command ends that is asked to end: by Ctrl-C (SIGINT), by SIGTERM, or since its terminal went away (SIGHUP).

The first signal raises in the main thread, so that what is under way ends in order. What must not be torn is not:
an import that an exception cuts short can keep its lock for ever or swallow the exception, so there the process ends
at once; so it does at a second signal, and after MOST_SECONDS where nothing else ended it, by a thread that waits for
that. Either way nothing is left: children are ended, unfinished files removed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from .runtime.whole_files import remove_unfinished

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_SECONDS = 0.8  # for what is under way to end in order
CHILDREN_SECONDS = 0.6  # for children to end by themselves before they are killed

before_leaving: set[Callable[[], None]] = set()  # what keeps a thread from starting children
_asked: int | None = None
_inherited: frozenset[int] = frozenset()  # children of the shell that became this process by exec


def asked() -> int | None:
    """The exit code that a signal asks for, None as long as none came."""
    return None if _asked is None else 128 + _asked


def listen() -> None:
    """Answer the signals from here on; one that is ignored, as SIGHUP under nohup, stays ignored."""
    global _inherited
    with contextlib.suppress(OSError):
        _inherited = frozenset(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _answer)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="psigraph-ending", daemon=True).start()
    for hook in ("excepthook", "unraisablehook"):
        setattr(sys, hook, _quiet(getattr(sys, hook)))
    threading.excepthook = _quiet(threading.excepthook)


@contextlib.contextmanager
def own_interrupts() -> Iterator[None]:
    """While the block runs, Ctrl-C is a KeyboardInterrupt that the block may answer by going on."""
    if signal.getsignal(signal.SIGINT) is not _answer:  # not in a command of its own, or ignored
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _answer)


def leave_if_asked() -> None:
    """End the process if a signal asked for it."""
    if _asked is not None:
        leave(_asked)


def leave(number: int) -> NoReturn:
    """End the process now, with the exit code of a signal; nothing is left."""
    for stop in tuple(before_leaving):
        stop()
    _end_children()
    remove_unfinished()
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None and sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # a progress bar hides the cursor
    os._exit(128 + number)


def _answer(number: int, frame: FrameType | None) -> None:
    global _asked
    if _asked is not None or _imports(frame):
        leave(number)
    _asked = number
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _imports(frame):
        leave(number)
    raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether the signal came during an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _watch(reader: int) -> None:
    """Python runs handlers between two steps of the main thread; this thread hears of signals whatever that does."""
    while True:
        for number in os.read(reader, 16):
            if signal.getsignal(number) is _answer:
                time.sleep(MOST_SECONDS)
                leave(number)


def _quiet(hook: Callable[..., object]) -> Callable[..., object]:
    """A hook for exceptions that nobody caught: after a signal they end the process, and nobody reads about them."""

    def answer(*what: object) -> None:
        leave_if_asked()
        hook(*what)

    return answer


def _end_children() -> None:
    """End every process that this one started, and those that they started: kindly, then not."""
    kill_at = time.monotonic() + CHILDREN_SECONDS
    give_up_at = kill_at + 0.2
    quiet = 0
    while quiet < 2 and (now := time.monotonic()) < give_up_at:
        found = _descendants()
        quiet = 0 if found else quiet + 1
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGTERM if now < kill_at else signal.SIGKILL)
        time.sleep(0.01)


def _descendants() -> list[int]:
    """Process ids of living descendants, parents first."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # pid (name) state parent ...; a name may hold anything, parentheses too.
                state, parent = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    parents.setdefault(int(parent), []).append(int(entry))
    found = [process for process in parents.get(os.getpid(), []) if process not in _inherited]
    for process in found:
        found.extend(parents.get(process, ()))
    return found
