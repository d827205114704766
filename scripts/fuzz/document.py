"""A GGUF file taken apart, so that one part of it can be made wrong while the rest stays right."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LAYOUTS = {
    U8: "<B", I8: "<b", U16: "<H", I16: "<h", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q", I64: "<q",
    F64: "<d",
}  # fmt: skip


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def scalar(kind: int, value: Any) -> bytes:
    """A value as it lies in a file; numbers are cut to the type's range as C would."""
    if kind == STRING:
        return text(value)
    if kind in (F32, F64):
        return struct.pack(LAYOUTS[kind], value)
    size = struct.calcsize(LAYOUTS[kind])
    return int(value % (1 << 8 * size)).to_bytes(size, "little")


@dataclass
class Pair:
    """kind: STRING, ARRAY or a number's. value: bytes, a number, or for an array a list of elements of kind `of`.

    claims: how many elements an array says that it has, if not its own number.
    """

    key: bytes
    kind: int
    value: Any
    of: int = U8
    claims: int | None = None

    def stored(self) -> bytes:
        head = text(self.key) + struct.pack("<I", self.kind)
        if self.kind != ARRAY:
            return head + scalar(self.kind, self.value)
        count = len(self.value) if self.claims is None else self.claims
        return head + struct.pack("<IQ", self.of, count) + b"".join(scalar(self.of, one) for one in self.value)


@dataclass
class Tensor:
    """claims: how many dimensions it says that it has, if not its own number."""

    name: bytes
    dimensions: list[int]
    kind: int
    offset: int
    claims: int | None = None

    def stored(self) -> bytes:
        count = len(self.dimensions) if self.claims is None else self.claims
        dimensions = b"".join(scalar(U64, one) for one in self.dimensions)
        head = text(self.name) + struct.pack("<I", count) + dimensions
        return head + scalar(U32, self.kind) + scalar(U64, self.offset)


@dataclass
class Document:
    """A file. counts: what the header says (pairs, tensors), if not the truth."""

    pairs: list[Pair]
    tensors: list[Tensor]
    data: bytearray
    magic: bytes = b"GGUF"
    version: int = 3
    counts: list[int | None] = field(default_factory=lambda: [None, None])

    def pair(self, key: bytes) -> Pair | None:
        return next((pair for pair in self.pairs if pair.key == key), None)

    def header(self) -> bytes:
        """Everything before the data, padded."""
        pairs, tensors = (
            len(own) if said is None else said
            for own, said in zip((self.pairs, self.tensors), self.counts, strict=True)
        )
        head = self.magic + scalar(U32, self.version) + scalar(U64, tensors) + scalar(U64, pairs)
        whole = head + b"".join(part.stored() for part in (*self.pairs, *self.tensors))
        return whole + b"\0" * (-len(whole) % 32)


def parse(file: bytes) -> Document:
    """A sound file of alignment 32."""
    at = 8

    def take(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            length = take(U64)
            at += length
            return file[at - length : at]
        at += struct.calcsize(LAYOUTS[kind])
        return struct.unpack_from(LAYOUTS[kind], file, at - struct.calcsize(LAYOUTS[kind]))[0]

    tensor_count, pair_count = take(U64), take(U64)
    pairs = []
    for _ in range(pair_count):
        key, kind = take(STRING), take(U32)
        if kind == ARRAY:
            of, count = take(U32), take(U64)
            pairs.append(Pair(key, kind, [take(of) for _ in range(count)], of))
        else:
            pairs.append(Pair(key, kind, take(kind)))
    tensors = []
    for _ in range(tensor_count):
        name, count = take(STRING), take(U32)
        tensors.append(Tensor(name, [take(U64) for _ in range(count)], take(U32), take(U64)))
    return Document(pairs, tensors, bytearray(file[at + -at % 32 :]))
