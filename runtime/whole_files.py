"""Files and folders that are whole or not there, in whatever moment a process ends.

What is being written lies beside its target under a name of its own (`.NAME.XXXXXXXXXXXX.partial`), is known to
`remove_unfinished` from before it exists until it is whole or gone, and is locked while its process lives: what lies
there unlocked was left by a process that was killed, and `remove_stale` takes it away.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
_LONGEST = 40  # letters of a target's name in that of its partial file: with four bytes each it stays below 255

_unfinished: set[Path] = set()


@contextlib.contextmanager
def whole_file(target: Path, permissions: int = 0o600) -> Iterator[BinaryIO]:
    """A new file that takes the place of `target` if the block ends well, and is gone if it does not.

    permissions: of the file, as far as the umask allows. Raises OSError where it cannot be written.
    """
    partial = _partial(target.parent, target.name)
    _unfinished.add(partial)
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, permissions), "wb") as file:
            _lock(file.fileno())
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
        _unfinished.discard(partial)


def write_whole(target: Path, data: bytes, permissions: int = 0o600) -> None:
    """Write a file so that a reader sees all of it or none. Raises OSError."""
    with whole_file(target, permissions) as file:
        file.write(data)


@contextlib.contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` that is gone after the block. Raises OSError."""
    folder = _partial(parent, name)
    _unfinished.add(folder)
    descriptor = -1
    try:
        folder.mkdir(mode=0o700)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        _lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)
        _unfinished.discard(folder)


def replace_folder(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`, and remove what was there; an OSError leaves it as it was."""
    old = _partial(target.parent, target.name)
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _unfinished.add(old)
    shutil.rmtree(old, ignore_errors=True)
    _unfinished.discard(old)


def lasting_scratch_folder(parent: Path, name: str) -> Path:
    """A new folder in `parent` that is gone when the process ends. Raises OSError."""
    context = scratch_folder(parent, name)
    folder = context.__enter__()
    atexit.register(context.__exit__, None, None, None)
    return folder


def remove_stale(parent: Path, name: str = "", seconds: float = 0.0) -> None:
    """Remove what processes that were killed left of the file or folder `name`, by default of any, and that is at least
    so many seconds old; what cannot be removed stays."""
    begin = f".{name[:_LONGEST]}." if name else "."
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if entry.name.startswith(begin) and entry.name.endswith(PARTIAL):
                _remove_if_unlocked(Path(entry.path), time.time() - seconds)


def remove_unfinished() -> None:
    """Remove everything that this process has begun and not ended: it is about to end in the middle."""
    for path in tuple(_unfinished):
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _partial(parent: Path, name: str) -> Path:
    return parent / f".{name[:_LONGEST]}.{secrets.token_hex(6)}{PARTIAL}"


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_unlocked(path: Path, latest: float) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            if found.st_uid != os.getuid() or found.st_mtime > latest:
                return
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(descriptor)
