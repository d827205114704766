"""Folders that keep what this user computed, and from which nothing is believed that another user could have put there.

Code and digests are read from them, so a folder or an entry that belongs to somebody else or that others may write is
refused, never made private afterwards: what lies in it by then proves nothing.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path

from .whole_files import remove_stale

KEPT_SECONDS = 90 * 86_400  # unused for longer, an entry goes
KEPT_BYTES = 512 << 20  # of a folder; the longest unused entries go first
LARGEST = 64 << 20  # bytes of an entry; kernels have a tenth of a megabyte
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_DAY = 86_400


def user_cache_dir() -> Path:
    """`psigraph` in the user's cache folder (XDG Base Directory). A user without a home has one beside other temporary
    files."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "psigraph"
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home):
        with contextlib.suppress(KeyError):  # a user whom the system does not know, as in containers
            home = pwd.getpwuid(os.getuid()).pw_dir
    if os.path.isabs(home):
        return Path(home) / ".cache" / "psigraph"
    return Path(tempfile.gettempdir()) / f"psigraph-{os.getuid()}"


def make_private(folder: Path) -> None:
    """Make a folder if it is missing. OSError, its strerror a reason, where it cannot be made or is not ours alone."""
    for each in (*reversed(folder.parents), folder):  # `parents=True` would make those above by the umask alone
        each.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise OSError(0, "belongs to another user")
    if found.st_mode & _OTHERS_WRITE:
        raise OSError(0, f"others may write it; empty it and chmod go-w {folder}")
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OSError(0, f"everybody may write {above}, and so replace it")


def read_private(path: Path) -> bytes:
    """An entry's bytes; it counts as used then. OSError where it is no regular file of ours alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "is no regular file")
        if found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
            raise OSError(0, "others could have written it")
        if found.st_size > LARGEST:
            raise OSError(0, "is larger than any entry")
        if time.time() - found.st_mtime > _DAY:
            with contextlib.suppress(OSError):
                os.utime(descriptor)
        return file.read()


def prune(folder: Path, names: re.Pattern[str]) -> None:
    """Remove entries of these names that are unused for KEPT_SECONDS, then the longest unused ones beyond KEPT_BYTES.

    An entry is what has one name up to its suffix: an image and its text go together. Other names are not ours to
    remove; another process may do the same.
    """
    remove_stale(folder, seconds=3600)
    used: dict[str, float] = {}
    parts: dict[str, list[tuple[int, Path]]] = {}
    with contextlib.suppress(OSError):
        for file in os.scandir(folder):
            if names.fullmatch(file.name):
                with contextlib.suppress(OSError):
                    found = file.stat(follow_symlinks=False)
                    stem = Path(file.name).stem
                    used[stem] = max(used.get(stem, 0.0), found.st_mtime)
                    parts.setdefault(stem, []).append((_size(file, found.st_size), Path(file.path)))
    left = sum(size for entry in parts.values() for size, _ in entry)
    for stem in sorted(used, key=lambda name: used[name]):
        if time.time() - used[stem] <= KEPT_SECONDS and left <= KEPT_BYTES:
            return
        for size, path in parts.get(stem, ()):
            left -= size
            with contextlib.suppress(OSError):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _size(entry: os.DirEntry[str], own: int) -> int:
    if not entry.is_dir(follow_symlinks=False):
        return own
    return sum(file.stat(follow_symlinks=False).st_size for file in os.scandir(entry.path))
