"""Weights of every type as raw bytes, and what they mean according to the `gguf` package."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType, quants

from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.runtime.gguf.ggml_types import BY_NAME
from psigraph.runtime.synth.blocks import random_blocks

DRAWN = ("q4_k", "q5_k", "q6_k", "q8_0", "f16")


def any_bytes(dtype: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Uniform random bytes of a matrix: every bit pattern may occur."""
    return np.random.default_rng(seed).integers(0, 256, WEIGHT_TYPES[dtype].file_bytes(rows, columns), np.uint8)


def raw_weights(dtype: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Bytes of a matrix whose values have mean 0 and deviation 1 / sqrt(columns), uint8."""
    deviation = columns**-0.5
    if dtype in DRAWN:
        chunks = random_blocks(dtype, rows * columns, deviation, np.random.PCG64(seed))
        return np.concatenate([np.array(chunk).view(np.uint8).ravel() for chunk in chunks])
    values = (np.random.default_rng(seed).standard_normal(rows * columns) * deviation).astype(np.float32)
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.view(np.uint8)


def dequantized(raw: np.ndarray, dtype: str, rows: int, columns: int) -> np.ndarray:
    """float32[rows, columns] as the `gguf` package decodes them."""
    kind = GGMLQuantizationType(BY_NAME[dtype].number)
    if dtype == "f32":
        return raw.view(np.float32).reshape(rows, columns)
    if dtype == "f16":
        return raw.view(np.float16).astype(np.float32).reshape(rows, columns)
    return np.asarray(quants.dequantize(raw.reshape(rows, -1), kind), np.float32).reshape(rows, columns)
