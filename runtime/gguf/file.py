"""Strict reader of GGUF model files.

A model file comes from a stranger. Every length is compared with the bytes that are left before anything is
allocated, every table has an upper bound, tensor bytes come by `pread` (a file that shrinks gives an error,
not a SIGBUS), and whatever is wrong ends in one exception, `ModelFileError`, that names field and byte offset.

    file     = header, pairs, tensors, padding, data          (all numbers little-endian)
    header   = "GGUF", u32 version, u64 tensor count, u64 pair count
    pair     = string key, u32 type, value
    string   = u64 length, bytes
    array    = u32 element type, u64 count, elements
    tensor   = string name, u32 dimensions, u64 dimension..., u32 ggml type, u64 offset in data

Source: the GGUF specification (ggml, docs/gguf.md) and llama.cpp's ggml/src/gguf.cpp.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import ModelFileError
from .cursor import Cursor, pread_into, quoted
from .file_digest import file_digest
from .ggml_types import GGML_TYPES, REMOVED_TYPES, first_not_finite
from .other_files import BEGINNING, foreign_kind

# More of those upper bounds stand in cursor.py.
MAX_PAIRS = 16_384
MAX_TENSORS = 32_768
MAX_KEY_BYTES = 256  # errors name them whole
MAX_TEXT_BYTES = 16 << 20
MAX_NAME_BYTES = 63  # ggml keeps 64 bytes for a tensor's name
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 65_536
MAX_LAYERS = 4096

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_HEADER = struct.Struct("<4sIQQ")
_SMALLEST_PAIR = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), 10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip

# Sizes that size a buffer or divide something, by their key after the architecture's name. The graph's own checks
# come later; these keep nonsense from ever reaching an allocation. One value per layer (an array) is left to them.
_RANGES: dict[str, tuple[float, float]] = {
    "block_count": (1, MAX_LAYERS),
    "context_length": (1, 2**31 - 1),
    "embedding_length": (1, 2**20),
    "feed_forward_length": (1, 2**24),
    "attention.head_count": (1, 2**16),
    "attention.head_count_kv": (1, 2**16),
    "attention.key_length": (1, 2**16),
    "attention.value_length": (1, 2**16),
    "attention.layer_norm_rms_epsilon": (0.0, 1.0),
    "rope.freq_base": (1.0, 1e15),
}

# The plain letters of tensor names: what else a name may hold is only good for tricking a path or a terminal.
_NAME = re.compile(r"[0-9A-Za-z_.:+-]+")
_LAYER = re.compile(r"blk\.(\d+)")
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


class TensorInfo(NamedTuple):
    """Where a tensor lies.

    dtype   ggml's type name in lower case, such as "q4_k".
    shape   row-major: the last dimension is the one along a row (GGUF stores the reverse).
    offset  of the first byte, from the start of the file.
    nbytes  bytes of all blocks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GgufFile:
    """An open model file; use it in a `with`, or call `close`. Made by `open_gguf`.

    path           as given.
    size           bytes of the file when it was opened.
    version        of the format, 2 or 3.
    alignment      bytes; every tensor starts at a multiple of it from data_offset.
    header_end     first byte after the tensor table.
    data_offset    first byte of tensor data.
    metadata       key to value: bool, int, float, str; numpy array (arrays of numbers and bools); StringArray
                   (arrays of strings: a sequence that decodes when it is asked, see `strings`).
    value_offsets  key to the byte offset of its value, for error messages.
    tensors        name to TensorInfo, in the file's order.
    """

    path: Path
    size: int
    version: int
    alignment: int
    header_end: int
    data_offset: int
    metadata: dict[str, Any]
    value_offsets: dict[str, int]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.metadata = {}
        self.value_offsets = {}
        self.tensors = {}

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def fileno(self) -> int:
        """The open descriptor."""
        return self._descriptor

    def read(self, name: str, check: bool = True) -> NDArray[np.uint8]:
        """All bytes of a tensor, uint8[nbytes], as stored.

        Safe to call from several threads. check: refuse a scale (or float weight) that is infinite or NaN.
        Raises ModelFileError where there is no such tensor, the file has shrunk, or the check fails.
        """
        try:
            info = self.tensors[name]
        except KeyError:
            raise ModelFileError("no such tensor in the file", name) from None
        data = np.empty(info.nbytes, np.uint8)
        pread_into(self._descriptor, data.data, info.offset, f"tensor {name}")
        bad = first_not_finite(info.dtype, data) if check else None
        if bad is not None:
            raise ModelFileError(
                f"{info.dtype} data holds a scale or weight that is infinite or NaN; convert or download it again",
                f"tensor {name}",
                info.offset + bad,
            )
        return data

    def sha256(
        self, progress: Callable[[int, int], None] | None = None, cache_dir: str | os.PathLike[str] | None = None
    ) -> str:
        """SHA-256 of the whole file, 64 hexadecimal digits.

        progress(bytes done, bytes in all); cache_dir: where digests are remembered by path, size, inode and
        times of change, so that a file of gigabytes is hashed once. Raises ModelFileError if it changes meanwhile.
        """
        return file_digest(self._descriptor, self.path, progress, cache_dir)


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Open a model file and read its header.

    Raises ModelFileError for what is not a sound, whole, regular GGUF file of one part.
    """
    path = Path(path)
    descriptor = _open_regular(path)
    file = GgufFile(path, descriptor)
    try:
        _refuse_split_name(path)
        _read_header(file)
        _refuse_split_metadata(file)
        _check_ranges(file)
    except ModelFileError as error:
        file.close()
        # One of several files may be at fault: the line names it.
        error.args = (f"{_shown(path)}: {error}",)
        raise
    except BaseException:
        file.close()
        raise
    return file


def _shown(path: Path) -> str:
    """A path for a message: whole, since what names the file is at its end."""
    return quoted(str(path), limit=4096)


def _open_regular(path: Path) -> int:
    """Descriptor of a regular file; a FIFO or device is refused without waiting for it."""
    try:
        # stat first: opening a device can have effects. O_NONBLOCK: it may have become a FIFO in between.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFileError("is not a regular file; give the path of a .gguf file", _shown(path))
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ModelFileError("no such file", _shown(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"cannot be opened: {reason}", _shown(path)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelFileError("is not a regular file; give the path of a .gguf file", _shown(path))
    return descriptor


def _read_header(file: GgufFile) -> None:
    cursor = Cursor(file.fileno(), file.size)
    begin = os.pread(file.fileno(), BEGINNING, 0)
    if begin[: len(_MAGIC)] != _MAGIC[: len(begin)]:
        kind = foreign_kind(begin)
        raise ModelFileError(
            f"not a GGUF file: it {f'is {kind}' if kind else f'starts with {begin[:4]!a}'}", "magic", 0
        )
    if file.size < _HEADER.size:
        raise ModelFileError(f"not a whole GGUF file: it has {file.size} bytes, a header {_HEADER.size}", "header", 0)
    _, version, tensor_count, pair_count = _HEADER.unpack(cursor.take(_HEADER.size, "header"))
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
        why = "a big-endian file" if swapped in _VERSIONS else f"version {version}"
        raise ModelFileError(f"{why}; little-endian GGUF of version 2 or 3 is read", "version", 4)
    file.version = version
    _check_count(pair_count, MAX_PAIRS, _SMALLEST_PAIR, cursor.left, "metadata_kv_count", 16)
    _check_count(tensor_count, MAX_TENSORS, _SMALLEST_TENSOR, cursor.left, "tensor_count", 8)
    damaged: list[str] = []
    for index in range(pair_count):
        _read_pair(cursor, index, file.metadata, file.value_offsets, damaged)
    if damaged:
        # One line, however many there are.
        others = f" (and {len(damaged) - 1} more)" if damaged[1:] else ""
        warnings.warn(f"{damaged[0][:80]}{others} is not UTF-8; what is not is shown as U+FFFD", stacklevel=3)
    file.alignment = _alignment(file)
    infos = [_read_tensor(cursor, index) for index in range(tensor_count)]
    file.header_end = cursor.position
    file.data_offset = -(-file.header_end // file.alignment) * file.alignment
    _place_tensors(file, infos)


def _check_count(count: int, limit: int, smallest: int, left: int, field: str, offset: int) -> None:
    if count > limit:
        raise ModelFileError(f"{count} entries; at most {limit} are allowed", field, offset)
    if count * smallest > left:
        raise ModelFileError(f"{count} entries do not fit into the {left} bytes that follow", field, offset)


def _read_pair(
    cursor: Cursor, index: int, metadata: dict[str, Any], value_offsets: dict[str, int], damaged: list[str]
) -> None:
    """`damaged` gets the key of a text that is not UTF-8, where that does no harm."""
    at = cursor.position
    key = _text(cursor.string(f"key {index}", MAX_KEY_BYTES), f"key {index}", at)
    if not key or not key.isprintable():
        raise ModelFileError(f"{quoted(key)} is not a key: it is empty or holds control characters", f"key {index}", at)
    if key in metadata:
        raise ModelFileError("the key occurs twice", key, at)
    at = value_offsets[key] = cursor.position
    kind = cursor.u32(key)
    if kind == _STRING:
        raw = cursor.string(key, MAX_TEXT_BYTES)
        # Of the words about the model nothing but this one decides anything.
        if key.startswith("general.") and key != "general.architecture" and not _is_utf8(raw):
            damaged.append(key)
            metadata[key] = raw.decode("utf-8", "replace")
        else:
            metadata[key] = _text(raw, key, at)
    elif kind == _ARRAY:
        metadata[key] = _read_array(cursor, key)
    elif kind == _BOOL:
        metadata[key] = bool(_bools(cursor, 1, key)[0])
    elif kind in _NUMBERS:
        metadata[key] = cursor.numbers(_NUMBERS[kind], 1, key)[0].item()
    else:
        raise ModelFileError(f"unknown value type {kind}", key, at)


def _text(raw: bytes, field: str, at: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ModelFileError("the text is not UTF-8", field, at) from None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _read_array(cursor: Cursor, key: str) -> Any:
    at = cursor.position
    kind, count = cursor.u32(key), cursor.u64(key)
    if kind == _STRING:
        return cursor.strings(count, key)
    if kind == _BOOL:
        return _bools(cursor, count, key)
    if kind in _NUMBERS:
        return cursor.numbers(_NUMBERS[kind], count, key)
    what = "arrays of arrays are not allowed" if kind == _ARRAY else f"unknown element type {kind}"
    raise ModelFileError(what, key, at)


def _bools(cursor: Cursor, count: int, key: str) -> NDArray[np.bool_]:
    at = cursor.position
    stored = cursor.numbers(np.dtype("u1"), count, key)
    if count and stored.max() > 1:
        where = int((stored > 1).argmax())
        raise ModelFileError(f"a bool stored as {stored[where]}; 0 or 1 is allowed", key, at + where)
    return stored.view(np.bool_)


def _alignment(file: GgufFile) -> int:
    key = "general.alignment"
    value = file.metadata.get(key, 32)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        shown = quoted(value) if isinstance(value, str) else quoted(repr(value))
        raise ModelFileError(
            f"{shown}; a power of two from 8 to {MAX_ALIGNMENT} is allowed", key, file.value_offsets[key]
        )
    return value


def _read_tensor(cursor: Cursor, index: int) -> tuple[TensorInfo, int]:
    """The table's entry, its offset still counted from the data's start, and where the entry lies."""
    at = cursor.position
    field = f"tensor {index}"
    raw = cursor.string(field, MAX_NAME_BYTES)
    name = raw.decode("ascii", "replace")
    if not _NAME.fullmatch(name):
        raise ModelFileError(f"{quoted(name)} is not a tensor name: letters, digits and _.:+- are allowed", field, at)
    field = f"tensor {name}"
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= MAX_LAYERS:
        raise ModelFileError(f"a layer of this number; at most {MAX_LAYERS} layers are allowed", field, at)
    at_dimensions = cursor.position
    count = cursor.u32(field)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise ModelFileError(f"{count} dimensions; 1 to {MAX_DIMENSIONS} are allowed", field, at_dimensions)
    dimensions = struct.unpack(f"<{count}Q", cursor.take(8 * count, field))
    elements = 1
    for dimension in dimensions:  # Python's integers do not wrap, so the product is the true one
        elements *= dimension
    if not 0 < elements < 2**63 or max(dimensions) >= 2**63:
        shown = " x ".join(map(str, dimensions))
        raise ModelFileError(f"impossible shape {shown}", field, at_dimensions)
    at_type = cursor.position
    number = cursor.u32(field)
    kind = GGML_TYPES.get(number)
    if kind is None:
        removed = REMOVED_TYPES.get(number)
        what = (
            f"type {number} ({removed}) was removed from ggml; convert the model again"
            if removed
            else f"unknown type {number}; the file is damaged or newer than this reader"
        )
        raise ModelFileError(what, field, at_type)
    if dimensions[0] % kind.block:
        raise ModelFileError(
            f"rows of {dimensions[0]} elements; {kind.name} needs a multiple of {kind.block}", field, at_dimensions
        )
    offset = cursor.u64(field)
    info = TensorInfo(name, kind.name, tuple(reversed(dimensions)), offset, elements // kind.block * kind.nbytes)
    return info, at


def _place_tensors(file: GgufFile, infos: list[tuple[TensorInfo, int]]) -> None:
    """Turn offsets into absolute ones; refuse what is misaligned, outside the file, doubled or overlapping."""
    for info, at in infos:
        field = f"tensor {info.name}"
        if info.name in file.tensors:
            raise ModelFileError("the name occurs twice in the tensor table", field, at)
        if info.offset % file.alignment:
            raise ModelFileError(f"offset {info.offset} is no multiple of the alignment {file.alignment}", field, at)
        begin = file.data_offset + info.offset
        if begin + info.nbytes > file.size:
            raise ModelFileError(
                f"its bytes {begin} to {begin + info.nbytes} reach past the file's end {file.size}; it is truncated",
                field,
                at,
            )
        file.tensors[info.name] = info._replace(offset=begin)
    end, before = 0, ""
    for info in sorted(file.tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise ModelFileError(f"overlaps tensor {before}", f"tensor {info.name}", info.offset)
        end, before = info.offset + info.nbytes, info.name


def _check_ranges(file: GgufFile) -> None:
    """Refuse hyper-parameters that no model has, before anything is sized or divided by them."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        return  # who asks for the architecture says that it is missing
    for suffix, (low, high) in _RANGES.items():
        key = f"{architecture}.{suffix}"
        value = file.metadata.get(key)
        if value is None or isinstance(value, np.ndarray):
            continue
        if (isinstance(low, int) and type(value) is not int) or not isinstance(value, int | float):
            kind = "an integer" if isinstance(low, int) else "a number"
            raise ModelFileError(f"{quoted(str(value))} is not {kind}", key, file.value_offsets[key])
        if not low <= value <= high:  # false for NaN too
            raise ModelFileError(f"{value} is outside {low} to {high}", key, file.value_offsets[key])


def _refuse_split_name(path: Path) -> None:
    match = _SPLIT_NAME.fullmatch(path.name)
    if match and int(match["count"]) > 1:
        raise _split_error(match["stem"], int(match["count"]), "file name")


def _refuse_split_metadata(file: GgufFile) -> None:
    count = file.metadata.get("split.count", 1)
    if type(count) is not int:
        raise ModelFileError("must be a whole number", "split.count", file.value_offsets["split.count"])
    if count > 1:
        raise _split_error(file.path.stem, count, "split.count", file.value_offsets["split.count"])


def _split_error(stem: str, count: int, field: str, offset: int | None = None) -> ModelFileError:
    def part(index: int) -> str:
        return f"{stem}-{index:05d}-of-{count:05d}.gguf"

    parts = [part(index) for index in (range(1, count + 1) if count <= 4 else (1, 2))]
    if count > 4:
        parts += ["...", part(count)]
    shown = ", ".join(parts).encode("ascii", "backslashreplace").decode()
    first = part(1).encode("ascii", "backslashreplace").decode()
    return ModelFileError(
        f"the model is split into {count} files ({shown}); join them first: llama-gguf-split --merge {first} OUT.gguf",
        field,
        offset,
    )
