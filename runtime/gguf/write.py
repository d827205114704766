"""Writes the header of a GGUF file (version 3); the grammar stands in `file`.

The `gguf` package's writer keeps a Python object for every token and needs seconds for a vocabulary of 151,936.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .ggml_types import BY_NAME, tensor_bytes

ALIGNMENT = 32

# Value types by the names that `pair` takes: number in the file and struct format.
_SCALARS = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q")}
_STRING, _ARRAY = 8, 9


def string(text: str | bytes) -> bytes:
    """A string as GGUF stores it: u64 length, bytes."""
    raw = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: str, value: Any) -> bytes:
    """One key with its value.

    kind: u32, i32, f32, bool, u64, str; or a list of one of these, written `[str]` or `[i32]`.
    """
    if kind.startswith("["):
        return string(key) + struct.pack("<I", _ARRAY) + _array(kind.strip("[]"), value)
    if kind == "str":
        return string(key) + struct.pack("<I", _STRING) + string(value)
    number, layout = _SCALARS[kind]
    return string(key) + struct.pack("<I", number) + struct.pack(layout, value)


def _array(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "str":
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(string, values))
    number, layout = _SCALARS[kind]
    return struct.pack("<IQ", number, len(values)) + np.asarray(values, layout.replace("i", "i4")).tobytes()


def padded(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def header(pairs: Sequence[bytes], tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Everything before the data, padded; tensors are (name, ggml type name, row-major shape) in the data's order."""
    entries = []
    offset = 0
    for name, dtype, shape in tensors:
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries.append(string(name) + dimensions + struct.pack("<IQ", BY_NAME[dtype].number, offset))
        offset += padded(tensor_bytes(dtype, shape))
    start = struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(pairs))
    whole = start + b"".join(pairs) + b"".join(entries)
    return whole.ljust(padded(len(whole)), b"\0")
