"""Bounded reading of a GGUF header: nothing is allocated before its size is compared with what the file has.

The file's grammar is in `file`; here are the limits, the reads and the texts of strangers made safe to show.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import ModelFileError
from .strings import StringArray, string_lengths

# Upper bounds. The largest vocabularies of 2026 have 0.26 million tokens and 0.52 million merges, in 20 MB of
# metadata; the bounds leave room above that and keep a hostile file below a second and 64 MB + 5x its metadata.
MAX_METADATA_BYTES = 128 << 20
MAX_STRINGS = 1_000_000
MAX_ELEMENT_BYTES = 1 << 20  # of a string in an array

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_READ_AHEAD = 1 << 20


def pread_into(descriptor: int, target: memoryview, offset: int, field: str) -> None:
    """Fill `target` from `offset` on, however short the single reads are."""
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise ModelFileError(f"cannot be read: {error.strerror}", field, offset + done) from None
        if count == 0:
            raise ModelFileError(
                f"the file ends here, {len(target) - done} bytes short; it is truncated or changed while it was read",
                field,
                offset + done,
            )
        done += count


def quoted(text: str, limit: int = 80) -> str:
    """A stranger's text, safe to show: no control characters, not too long."""
    shown = ascii(text[: limit + 1])
    # A character outside ASCII is shown as up to ten letters, so it is those that are counted.
    return shown if len(shown) <= limit + 2 else f"{shown[: limit + 1]}...{shown[0]}"


def too_long(length: int, limit: int, field: str, at: int) -> ModelFileError:
    return ModelFileError(f"a string of {length} bytes; at most {limit} are allowed", field, at)


class Cursor:
    """Reads forward through the header, never past the end of the file or the bound on metadata."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._buffer = b""
        self._start = 0  # file offset of the buffer's first byte
        self.position = 0
        self._strings = 0

    @property
    def left(self) -> int:
        return self._size - self.position

    def require(self, count: int, field: str) -> None:
        """Raise unless `count` more bytes are there and may be read."""
        if count > self.left:
            raise ModelFileError(
                f"needs {count} bytes, the file has {self.left} left; it is truncated or damaged", field, self.position
            )
        if self.position + count > MAX_METADATA_BYTES:
            raise ModelFileError(f"metadata of more than {MAX_METADATA_BYTES >> 20} MiB", field, self.position)

    def take(self, count: int, field: str) -> bytes:
        self.require(count, field)
        begin = self.position - self._start
        if begin + count > len(self._buffer):
            self._refill(count, field)
            begin = 0
        self.position += count
        return self._buffer[begin : begin + count]

    def _refill(self, count: int, field: str) -> None:
        """Let the buffer begin at the position and hold at least `count` bytes."""
        target = bytearray(min(max(count, _READ_AHEAD), self.left))
        pread_into(self._descriptor, memoryview(target), self.position, field)
        self._buffer = bytes(target)
        self._start = self.position

    def u32(self, field: str) -> int:
        return int(_U32.unpack(self.take(4, field))[0])

    def u64(self, field: str) -> int:
        return int(_U64.unpack(self.take(8, field))[0])

    def numbers(self, dtype: np.dtype[Any], count: int, field: str) -> NDArray[Any]:
        """An array of its own memory, read straight into place."""
        self.require(count * dtype.itemsize, field)
        array = np.empty(count, dtype)
        if count:  # a memoryview of nothing cannot be cast
            pread_into(self._descriptor, array.data.cast("B"), self.position, field)
        self.position += array.nbytes
        return array

    def string(self, field: str, limit: int) -> bytes:
        at = self.position
        length = self.u64(field)
        if length > limit:
            raise too_long(length, limit, field, at)
        return self.take(length, field)

    def strings(self, count: int, field: str) -> StringArray:
        """An array of strings."""
        self.require(count * 8, field)
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise ModelFileError(f"more than {MAX_STRINGS} strings in the metadata's arrays", field, self.position)
        pieces: list[bytes] = []
        lengths: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
        left = count
        while left:
            begin = self.position - self._start
            found, end = string_lengths(self._buffer, begin, left)
            pieces.append(self._buffer[begin:end])
            lengths.append(found)
            self.position, left = self._start + end, left - len(found)
            if left:
                self._refill_for_string(f"{field}[{count - left}]")
        return StringArray(b"".join(pieces), np.concatenate(lengths))

    def _refill_for_string(self, field: str) -> None:
        """Let the buffer hold the whole string at the position."""
        at = self.position
        length = self.u64(field)
        self.position = at
        if length > MAX_ELEMENT_BYTES:
            raise too_long(length, MAX_ELEMENT_BYTES, field, at)
        self.require(8 + length, field)
        self._refill(8 + length, field)
