"""Logits in an .npz file: written by `perplexity --save-logits`, read whoever wrote them."""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..ir.errors import OutputError, UsageError
from ..json_file import check_writable, read_json
from ..runtime.whole_files import whole_file

_MOST_PACKED = 8  # times: logits do not compress so well, bombs do
_SMALL = 1 << 20  # bytes that any file may unpack to
# What zipfile, its decompressors and numpy's reader of headers raise for files that are none of theirs.
_DAMAGED = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError, SyntaxError, MemoryError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)


@dataclass(frozen=True)
class Reference:
    """Saved logits: after ids[i], read in windows of `window`, logits[i]."""

    name: str
    key: str
    ids: list[int]
    window: int
    logits: np.ndarray


def load_reference(path: str | os.PathLike[str], tier: str, key: str | None = None) -> Reference:
    """Saved logits out of an .npz file, or the one that a report of `psigraph perplexity` names.

    The file holds ids, int[n], and logits, float[n, vocabulary], under `key`: by itself `logits`, or `logits_` and the
    tier of the model ("Q4_K_M"), or the only one there is. It may hold window, the size of the windows.
    UsageError where it is not like that.
    """
    source = Path(path)
    if source.suffix == ".json":
        named = read_json(source).get("logits_file")
        if not isinstance(named, str) or "\0" in named:
            raise UsageError(f"{source}: this report names no logits_file; --save-logits makes one")
        source = source.parent / named
    try:
        chosen, ids, logits, window = _arrays(source, tier, key)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read: {error.strerror or error}") from None
    except _DAMAGED:
        raise UsageError(f"{source}: is no .npz file of plain arrays") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids) or window < 1:
        raise UsageError(f"{source}: ids must be a list of whole numbers, and a window at least 1")
    if logits.ndim != 2 or logits.dtype.kind != "f" or len(logits) != len(ids) or not logits.shape[1]:
        raise UsageError(f"{source}: {chosen} must be float[{len(ids)}, vocabulary], one row for every id")
    if np.isnan(logits).any() or not np.isfinite(logits.max(-1)).all():
        raise UsageError(f"{source}: {chosen} holds values that are no logits")
    return Reference(source.name, chosen, ids.tolist(), window, logits)


def _arrays(source: Path, tier: str, key: str | None) -> tuple[str, np.ndarray, np.ndarray, int]:
    """(name of the logits, ids, logits, window), nothing of which is checked but that the file is one of arrays."""
    # Not blocking: a pipe that nobody writes to would be waited for.
    with open(os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        with zipfile.ZipFile(file) as archive:
            sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in archive.infolist()}
            if sum(sizes.values()) > _MOST_PACKED * size + _SMALL:
                raise UsageError(f"{source}: unpacks to {sum(sizes.values()):,} bytes, which no logits do")
            names = [name for name in sizes if name.startswith("logits")]
            chosen = key or next(
                (name for name in ("logits", f"logits_{tier.lower()}") if name in names),
                names[0] if len(names) == 1 else "",
            )
            if chosen not in sizes or "ids" not in sizes:
                held = ", ".join(name[:40] for name in list(sizes)[:20]) or "nothing"
                advice = "; choose with --key" if len(names) > 1 else ""
                raise UsageError(f"{source}: needs ids and {chosen or 'logits'}; it holds {held}{advice}")
            ids, logits = _array(archive, "ids"), _array(archive, chosen)
            window = int(_array(archive, "window")) if "window" in sizes else len(ids)
    return chosen, ids, logits, window


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One member. Its header's shape must be what is there: numpy takes that much memory before it reads."""
    with archive.open(f"{name}.npy") as member:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, column_major, dtype = read[np.lib.format.read_magic(member)](member)
        data = member.read()
    if dtype.hasobject or dtype.itemsize * int(np.prod(shape, dtype=object)) != len(data):
        raise ValueError
    return np.frombuffer(data, dtype).reshape(shape, order="F" if column_major else "C")


def save_logits(path: str | os.PathLike[str], ids: Sequence[int], window: int, rows: Sequence[np.ndarray]) -> None:
    """Write what `load_reference` reads, whole or not at all; OutputError where that fails."""
    check_writable(path)
    target = Path(os.path.realpath(path))  # a link stays, what it points to is replaced
    try:
        with whole_file(target, 0o666) as file:
            np.savez(file, ids=np.asarray(ids, np.int32), window=np.int32(window), logits=np.concatenate(rows))
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from None
