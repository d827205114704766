"""Random weight blocks: every bit that carries a weight is drawn, only the scales are chosen.

The `gguf` package cannot quantize the K types, and quantizing gigabytes takes minutes; drawing raw blocks takes a
second a gigabyte. A block is uniform random bytes, then its f16 scales are set so that the weights it stands for have
mean zero and a given standard deviation. The f16 scale differs from block to block (by up to a quarter), so that a
kernel which takes a neighbour's scale gives other numbers.

Block layouts: ggml-common.h of llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..gguf.ggml_types import BY_NAME

CHUNK_BYTES = 8 << 20
_STEPS = 256  # different scales; which one is taken is the block's first drawn byte
_SPREAD = 0.25
_MEAN_SPREAD = math.sqrt(1 + _SPREAD + _SPREAD**2 / 3)  # root mean square of a factor uniform in 1 to 1.25

Blocks = NDArray[np.uint8]  # [blocks, bytes of a block], one chunk of raw random bytes, changed in place


def _deviation(levels: int) -> float:
    """Standard deviation of an integer uniform over `levels` neighbouring values."""
    return math.sqrt((levels**2 - 1) / 12)


def _root_mean_square(low: int, high: int) -> float:
    """Of an integer uniform from low to high."""
    return math.sqrt(sum(value * value for value in range(low, high + 1)) / (high - low + 1))


def _scales(first: float) -> Blocks:
    """f16 numbers from `first` up to 1.25 times it, uint8[256, 2]."""
    values = first * (1 + _SPREAD * np.arange(_STEPS) / _STEPS)
    return values.astype("<f2").view(np.uint8).reshape(_STEPS, 2)


def _k_with_minimum(blocks: Blocks, deviation: float, levels: int) -> None:
    """q4_k (16 levels) and q5_k (32): weight = d * scale * q - dmin * minimum.

    The packed 6-bit minimums are made equal to the scales and dmin to the mean of q times d: each group of 32 then
    has mean zero, and every part of the decoding still matters.
    """
    blocks[:, 8:12] = blocks[:, 4:8]
    nibbles = blocks[:, 12:16] & 15
    blocks[:, 12:16] = nibbles << 4 | nibbles
    unit = deviation / (_deviation(levels) * _root_mean_square(0, 63) * _MEAN_SPREAD)
    pick = blocks[:, 0].copy()
    blocks[:, 0:2] = _scales(unit)[pick]
    blocks[:, 2:4] = _scales(unit * (levels - 1) / 2)[pick]


def _q4_k(blocks: Blocks, deviation: float) -> None:
    _k_with_minimum(blocks, deviation, 16)


def _q5_k(blocks: Blocks, deviation: float) -> None:
    _k_with_minimum(blocks, deviation, 32)


def _q6_k(blocks: Blocks, deviation: float) -> None:
    """weight = d * scale * (q - 32), scale a signed byte of random sign, q of 64 levels with mean -1/2."""
    unit = deviation / (_root_mean_square(-32, 31) * _root_mean_square(-128, 127) * _MEAN_SPREAD)
    blocks[:, 208:210] = _scales(unit)[blocks[:, 208]]


def _q8_0(blocks: Blocks, deviation: float) -> None:
    """weight = d * q; q is never -128, as no quantizer writes it."""
    weights = blocks[:, 2:].view(np.int8)
    np.maximum(weights, -127, out=weights)
    unit = deviation / (_root_mean_square(-127, 127) * _MEAN_SPREAD)
    blocks[:, 0:2] = _scales(unit)[blocks[:, 0]]


def _iq3_s(blocks: Blocks, deviation: float) -> None:
    """weight = d * (1 + 2 * scale) * grid * sign, with grid values odd, 1 to 15; only its size is right."""
    unit = deviation / (_root_mean_square(0, 15) * 2 * 8 * _MEAN_SPREAD)
    blocks[:, 0:2] = _scales(unit)[blocks[:, 0]]


def _f16(blocks: Blocks, deviation: float) -> None:
    """Each drawn 16-bit number picks a value of a uniform distribution."""
    edge = deviation * math.sqrt(3)
    values = np.linspace(-edge, edge, 1 << 16).astype("<f2")
    drawn = blocks.reshape(-1).view("<u2")
    drawn[:] = values.view("<u2")[drawn]


_FILLS: dict[str, Callable[[Blocks, float], None]] = {
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
    "iq3_s": _iq3_s,
    "f16": _f16,
}


def random_blocks(dtype: str, elements: int, deviation: float, generator: np.random.PCG64) -> Iterator[NDArray[Any]]:
    """The bytes of a tensor in chunks, uint8[at most about CHUNK_BYTES]: weights of mean 0 and the given deviation.

    dtype one of q4_k, q5_k, q6_k, q8_0, iq3_s, f16; elements a whole number of blocks. The bytes depend on the
    generator's state alone (PCG64's raw stream is fixed by numpy's compatibility policy).
    """
    kind = BY_NAME[dtype]
    fill = _FILLS[dtype]
    left = elements // kind.block
    # Whole 64-bit draws in every chunk but the last, so that chunking does not change what is drawn.
    chunk = CHUNK_BYTES // (8 * kind.nbytes) * 8
    while left:
        count = min(chunk, left)
        drawn = generator.random_raw(-(-count * kind.nbytes // 8)).astype("<u8", copy=False)
        blocks = drawn.view(np.uint8)[: count * kind.nbytes].reshape(count, kind.nbytes)
        fill(blocks, deviation)
        yield blocks.reshape(-1)
        left -= count


def norm_weights(elements: int, generator: np.random.PCG64) -> NDArray[Any]:
    """f32[elements] as bytes, uniform from 0.9 to 1.1: norms of trained models lie around 1."""
    drawn = generator.random_raw(elements).astype(np.float64) / 2.0**64
    return (0.9 + 0.2 * drawn).astype("<f4").view(np.uint8)
