"""Arrays of strings out of a GGUF header: found at once, decoded when somebody asks.

A vocabulary has 300,000 strings with its merges, and most commands want three of them. A Python loop over them takes a
tenth of a second, so their places are found by numpy: almost every length is below 256, and eight bytes that hold such
a length stand hardly anywhere but in front of a string. What numpy finds is a chain from one string to the next or it
is not believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

_U64 = struct.Struct("<Q")
_AT_ONCE = 4096  # strings that an iterator decodes at once
_STEPS = 64  # strings to walk one by one where the chain breaks, before numpy's places are looked at again


class StringArray(Sequence[str]):
    """The strings of an array, in order; each is decoded when it is asked for, bytes that are not UTF-8 kept as
    surrogate escapes.

    data     the array's bytes as they lie in the file, each string behind its length (u64).
    lengths  bytes of each string, int64[count].
    """

    def __init__(self, data: bytes, lengths: NDArray[np.int64]) -> None:
        self._data = data
        ends = np.cumsum(lengths + 8)
        # There are a million of them at most, of less than 2**32 bytes; half the room lets a vocabulary be small.
        self._ends, self._begins = ends.astype(np.uint32), (ends - lengths).astype(np.uint32)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._decoded(self._begins[index], self._ends[index])
        return self._data[int(self._begins[index]) : int(self._ends[index])].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self[first : first + _AT_ONCE]

    def _decoded(self, begins: NDArray[np.uint32], ends: NDArray[np.uint32]) -> list[str]:
        data = self._data
        places = zip(begins.tolist(), ends.tolist(), strict=True)
        return [data[begin:end].decode("utf-8", "surrogateescape") for begin, end in places]


def string_lengths(buffer: bytes, begin: int, most: int) -> tuple[NDArray[np.int64], int]:
    """Lengths of up to `most` strings that lie whole in the buffer, the first length at `begin`, and where they end."""
    places = _likely_places(buffer, begin)
    ends = places + 8 + np.frombuffer(buffer, np.uint8)[places]
    breaks = np.flatnonzero(np.append(ends[:-1] != places[1:], True))
    found: list[NDArray[np.int64]] = []
    count, at, size = 0, begin, len(buffer)
    while count < most:
        first = int(np.searchsorted(places, at))
        if first < len(places) and places[first] == at:
            # From a true place on, every place up to the next break follows from the one before.
            last = int(breaks[np.searchsorted(breaks, first)])
            last = min(last, first + most - count - 1)
            if ends[last] > size:
                last -= 1
            if last >= first:
                found.append(ends[first : last + 1] - places[first : last + 1] - 8)
                count, at = count + last + 1 - first, int(ends[last])
        walked: list[int] = []
        while count < most and len(walked) < _STEPS and at + 8 <= size:
            (length,) = _U64.unpack_from(buffer, at)
            if at + 8 + length > size:
                break
            walked.append(length)
            count, at = count + 1, at + 8 + length
        found.append(np.array(walked, np.int64))
        if len(walked) < _STEPS:  # the rest is not in the buffer
            break
    return np.concatenate(found) if found else np.empty(0, np.int64), at


def _likely_places(buffer: bytes, begin: int) -> NDArray[np.int64]:
    """Where eight bytes hold a number below 256, ascending."""
    likely = np.zeros(len(buffer), np.bool_)
    for shift in range(begin, min(begin + 8, len(buffer) - 7)):
        words = np.frombuffer(buffer, "<u8", (len(buffer) - shift) // 8, shift)
        likely[shift : shift + 8 * len(words) : 8] = words < 256
    return np.flatnonzero(likely)
