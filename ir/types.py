"""Element types: which exist, what family of kernels reads them, the i8x2 activation and the q8 cache."""

from __future__ import annotations

import numpy as np

# Weight types whose blocks hold integers: a GPU multiplies them with int8 activations.
INTEGER_WEIGHTS = ("q4_k", "q5_k", "q6_k", "q8_0")
# Weight types that hold plain numbers: a GPU multiplies them with f32 activations.
FLOAT_WEIGHTS = ("f16", "bf16", "f32")
WEIGHT_DTYPES = INTEGER_WEIGHTS + FLOAT_WEIGHTS

# Elements per quantization block of a row (1: no blocks); rows are whole numbers of blocks.
BLOCK_SIZE = {"q4_k": 256, "q5_k": 256, "q6_k": 256, "q8_0": 32, "f16": 1, "bf16": 1, "f32": 1}

# What a step computes with: f32 or f16 rows, quantized rows, token ids and counters, the cache.
DTYPES = (*WEIGHT_DTYPES, "i8x2", "q8", "i32")

# What a KV cache may hold, the default first. A spec declares its caches as `cache[...]`; binding chooses the type.
CACHE_DTYPES = ("f16", "q8")
CACHE = "cache"

I8X2_GROUP = 16
"""Values that share one scale in an i8x2 vector."""

Q8_GROUP = 32
"""Neighbouring values of a head that share one scale in a q8 cache; the last group of a head may be shorter."""


def family(dtype: str) -> str:
    """`integer` or `float` for a weight type; KeyError for anything that is no weight type."""
    if dtype in INTEGER_WEIGHTS:
        return "integer"
    if dtype in FLOAT_WEIGHTS:
        return "float"
    raise KeyError(f"{dtype} is no weight type")


def quantize_i8x2(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits f32 values into two int8 planes, the way the kernels do it (same float32 order).

    values: any shape whose size is a multiple of 16. Returns (hi int8, lo int8, scale f32):
    hi and lo shaped [groups, 16], scale [groups]. A value is scale * (254 * hi + lo).
    """
    groups = np.asarray(values, dtype=np.float32).reshape(-1, I8X2_GROUP)
    amax = np.abs(groups).max(axis=1)
    # A subnormal amax would overflow 127/amax; such a group is as good as zero.
    alive = ~(amax < np.finfo(np.float32).tiny * 128)  # and what is no number stays none
    inverse = np.where(alive, np.float32(127) / np.where(alive, amax, np.float32(1)), np.float32(0))[:, None]
    with np.errstate(invalid="ignore"):
        scaled = groups * inverse
    scaled[np.isnan(scaled)] = 0  # its scale says it
    high = np.clip(np.rint(scaled), -127, 127).astype(np.float32)
    low = np.clip(np.rint((scaled - high) * np.float32(254)), -127, 127).astype(np.float32)
    scale = np.where(alive, amax * np.float32(1 / 32258), np.float32(0)).astype(np.float32)
    return high.astype(np.int8), low.astype(np.int8), scale


def round_i8x2(values: np.ndarray) -> np.ndarray:
    """The values that an i8x2 vector holds instead of `values`; same shape and dtype."""
    high, low, scale = quantize_i8x2(values)
    whole = 254.0 * high.astype(np.float64) + low.astype(np.float64)
    return (whole * scale.astype(np.float64)[:, None]).reshape(values.shape).astype(values.dtype)


def quantize_q8(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a q8 cache, the way the kernels make them (same float32 order; the numbers of ggml's q8_0).

    rows: float[..., columns]. Returns (integers int8[..., columns], scales f16[..., groups of 32 columns]): a scale is
    the group's largest magnitude over 127, and an integer the value over that scale, to nearest.
    """
    values = np.asarray(rows, dtype=np.float32)
    columns = values.shape[-1]
    whole = [(0, 0)] * (values.ndim - 1) + [(0, -columns % Q8_GROUP)]
    groups = np.pad(values, whole).reshape(*values.shape[:-1], -1, Q8_GROUP)
    amax = np.abs(groups).max(axis=-1)
    # As in i8x2: 127 / amax must not overflow. Its scale would be zero as a half anyway.
    alive = amax >= np.finfo(np.float32).tiny * 128
    inverse = np.where(alive, np.float32(127) / np.where(alive, amax, np.float32(1)), np.float32(0))
    integers = np.clip(np.rint(groups * inverse[..., None]), -127, 127).astype(np.int8)
    with np.errstate(over="ignore"):
        scales = (amax * np.float32(1 / 127)).astype(np.float16)
    return integers.reshape(*values.shape[:-1], -1)[..., :columns], scales


def widen_q8(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """What q8 rows stand for, float16[..., columns]: an integer times its scale, rounded to a half.

    The half belongs to the meaning: it is what kernels multiply, on tensor cores that take no wider operand.
    """
    wide = np.repeat(scales.astype(np.float32), Q8_GROUP, axis=-1)[..., : integers.shape[-1]]
    with np.errstate(over="ignore", invalid="ignore"):
        return (integers.astype(np.float32) * wide).astype(np.float16)


def round_q8(rows: np.ndarray) -> np.ndarray:
    """The values that a q8 cache holds instead of `rows`: float16, same shape."""
    return widen_q8(*quantize_q8(rows))
