"""Every ggml tensor type: how many elements and bytes a block has, and where its float scales lie.

Source: ggml.h and ggml-common.h of llama.cpp; a test compares the table with the `gguf` package.
It is written out here because importing that package takes longer than reading a model's header.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GgmlType:
    """One tensor type.

    number      its number in a GGUF file.
    name        ggml's name in lower case, such as "q4_k".
    block       elements in a block; a row is a whole number of blocks.
    nbytes      bytes of a block.
    scales      byte offsets, in a block, of the f16 numbers that every weight is multiplied by or shifted by.
    floats      "f32", "f16", "bf16" or "f64" where the elements are floats themselves, else "".
    """

    number: int
    name: str
    block: int
    nbytes: int
    scales: tuple[int, ...] = ()
    floats: str = ""


_ROWS = (
    GgmlType(0, "f32", 1, 4, floats="f32"),
    GgmlType(1, "f16", 1, 2, floats="f16"),
    GgmlType(2, "q4_0", 32, 18, (0,)),
    GgmlType(3, "q4_1", 32, 20, (0, 2)),
    GgmlType(6, "q5_0", 32, 22, (0,)),
    GgmlType(7, "q5_1", 32, 24, (0, 2)),
    GgmlType(8, "q8_0", 32, 34, (0,)),
    GgmlType(9, "q8_1", 32, 40),
    GgmlType(10, "q2_k", 256, 84, (80, 82)),
    GgmlType(11, "q3_k", 256, 110, (108,)),
    GgmlType(12, "q4_k", 256, 144, (0, 2)),
    GgmlType(13, "q5_k", 256, 176, (0, 2)),
    GgmlType(14, "q6_k", 256, 210, (208,)),
    GgmlType(15, "q8_k", 256, 292),
    GgmlType(16, "iq2_xxs", 256, 66, (0,)),
    GgmlType(17, "iq2_xs", 256, 74, (0,)),
    GgmlType(18, "iq3_xxs", 256, 98, (0,)),
    GgmlType(19, "iq1_s", 256, 50, (0,)),
    GgmlType(20, "iq4_nl", 32, 18, (0,)),
    GgmlType(21, "iq3_s", 256, 110, (0,)),
    GgmlType(22, "iq2_s", 256, 82, (0,)),
    GgmlType(23, "iq4_xs", 256, 136, (0,)),
    GgmlType(24, "i8", 1, 1),
    GgmlType(25, "i16", 1, 2),
    GgmlType(26, "i32", 1, 4),
    GgmlType(27, "i64", 1, 8),
    GgmlType(28, "f64", 1, 8, floats="f64"),
    GgmlType(29, "iq1_m", 256, 56),
    GgmlType(30, "bf16", 1, 2, floats="bf16"),
    GgmlType(34, "tq1_0", 256, 54, (52,)),
    GgmlType(35, "tq2_0", 256, 66, (64,)),
    GgmlType(39, "mxfp4", 32, 17),
    GgmlType(40, "nvfp4", 64, 36),
    GgmlType(41, "q1_0", 128, 18),
)

GGML_TYPES = {row.number: row for row in _ROWS}
BY_NAME = {row.name: row for row in _ROWS}

# Numbers that ggml once used; files with them need a conversion by an llama.cpp of their time.
REMOVED_TYPES = {
    4: "q4_2", 5: "q4_3", 31: "q4_0_4_4", 32: "q4_0_4_8", 33: "q4_0_8_8",
    36: "iq4_nl_4_4", 37: "iq4_nl_4_8", 38: "iq4_nl_8_8",
}  # fmt: skip


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ggml type `dtype` and row-major `shape`, whose rows are whole blocks."""
    kind = BY_NAME[dtype]
    return math.prod(shape) // kind.block * kind.nbytes


# Unsigned view and exponent mask of each float type: a number with all exponent bits set is infinite or NaN.
_EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "f16": (np.dtype("<u2"), 0x7C00),
    "bf16": (np.dtype("<u2"), 0x7F80),
    "f32": (np.dtype("<u4"), 0x7F800000),
    "f64": (np.dtype("<u8"), 0x7FF0000000000000),
}
_CHUNK = 1 << 18  # elements tested at once: the temporaries stay in the cache


def first_not_finite(dtype: str, data: NDArray[np.uint8]) -> int | None:
    """Byte offset, in a tensor's bytes, of the first scale or element that is infinite or NaN; None if all are finite.

    dtype  ggml name; types whose scales this table does not list count as finite.
    data   uint8[n], whole blocks, as stored.
    """
    kind = BY_NAME[dtype]
    if kind.floats:
        view, mask = _EXPONENTS[kind.floats]
        return _first_masked(data.view(view), mask, kind.nbytes, 0)
    blocks = data.reshape(-1, kind.nbytes)
    view, mask = _EXPONENTS["f16"]
    found = (
        _first_masked(np.ndarray(len(blocks), view, data.data, at, (kind.nbytes,)), mask, kind.nbytes, at)
        for at in kind.scales
    )
    return min((at for at in found if at is not None), default=None)


def _first_masked(numbers: NDArray[Any], mask: int, stride: int, at: int) -> int | None:
    typed_mask = numbers.dtype.type(mask)
    for start in range(0, len(numbers), _CHUNK):
        bad = (numbers[start : start + _CHUNK] & typed_mask) == typed_mask
        if bad.any():
            return at + (start + int(bad.argmax())) * stride
    return None
