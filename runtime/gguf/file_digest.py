"""SHA-256 of a large file, remembered on disk: hashing a model of gigabytes takes seconds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from ...ir.errors import ModelFileError
from ..private_cache import make_private, prune, read_private
from ..whole_files import write_whole

_BLOCK = 4 << 20
_NAMES = re.compile(r"[0-9a-f]{32}\.json")


def file_digest(
    descriptor: int,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str:
    """SHA-256 of the open file, 64 hexadecimal digits; progress(bytes done, bytes in all).

    With a cache directory the digest is kept there for as long as path, size, device, inode and both times of
    change stay the same (ctime too: no ordinary call can set it back). A cache that cannot be used, or in which others
    could have written, is left out.
    Raises ModelFileError if the file changes while it is hashed.
    """
    before = _identity(descriptor, path)
    entry = _entry(cache_dir, before)
    known = _look_up(entry, before)
    if known is not None:
        return known
    size = int(before["size"])
    digest = hashlib.sha256()
    done = 0
    while done < size:
        block = os.pread(descriptor, _BLOCK, done)
        if not block:
            break
        digest.update(block)
        done += len(block)
        if progress is not None:
            progress(done, size)
    if done != size or _identity(descriptor, path) != before:
        raise ModelFileError("the file changed while its digest was computed; try again", str(path), done)
    _remember(entry, before, digest.hexdigest())
    return digest.hexdigest()


def _identity(descriptor: int, path: Path) -> dict[str, int | str]:
    status = os.fstat(descriptor)
    return {
        "path": os.path.realpath(path),
        "size": status.st_size,
        "device": status.st_dev,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _entry(cache_dir: str | os.PathLike[str] | None, identity: dict[str, int | str]) -> Path | None:
    if cache_dir is None:
        return None
    name = hashlib.sha256(os.fsencode(str(identity["path"]))).hexdigest()[:32]
    return Path(cache_dir) / f"{name}.json"


def _look_up(entry: Path | None, identity: dict[str, int | str]) -> str | None:
    if entry is None:
        return None
    try:
        if entry.parent.exists():
            make_private(entry.parent)
        kept = json.loads(read_private(entry))
        digest = kept.pop("sha256")
        bytes.fromhex(digest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return digest if kept == identity and len(digest) == 64 else None


def _remember(entry: Path | None, identity: dict[str, int | str], digest: str) -> None:
    if entry is None:
        return
    with contextlib.suppress(OSError):  # a full or read-only disk costs the next caller time, nothing else
        make_private(entry.parent)
        write_whole(entry, json.dumps({**identity, "sha256": digest}).encode())
        prune(entry.parent, _NAMES)
