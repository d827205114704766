"""The q8 cache as it lies in memory, in numpy: what `device/cache.cuh` says of it, written a second time."""

from __future__ import annotations

import numpy as np
from half_memory import part_places

from psigraph.ir.types import Q8_GROUP, widen_q8

POSITIONS = 16


def pack(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int8[kv_heads, context, head_dim], f16[kv_heads, context, groups] -> uint8[bytes]; positions behind are zeros."""
    kv_heads, context, head_dim = integers.shape
    padded = np.zeros((kv_heads, -context % POSITIONS, head_dim), np.int8)
    values = np.concatenate([integers, padded], axis=1).reshape(kv_heads, -1, POSITIONS, head_dim)
    behind = np.zeros((kv_heads, -context % POSITIONS, scales.shape[2]), np.float16)
    factors = np.concatenate([scales, behind], axis=1).reshape(kv_heads, -1, POSITIONS, scales.shape[2])
    planes = np.empty(values.shape, np.uint8)
    planes[..., places(head_dim)] = (values.astype(np.int16) + 128).astype(np.uint8)
    planes = _ordered(planes)
    tiles = [planes.reshape(*planes.shape[:2], -1), _bytes(factors.swapaxes(2, 3)).reshape(*planes.shape[:2], -1)]
    return np.concatenate(tiles, axis=2).ravel()


def unpack(memory: np.ndarray, kv_heads: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The other way round: (integers, scales) of all positions, those behind the context too."""
    groups = -(-head_dim // Q8_GROUP)
    tiles = memory.reshape(kv_heads, -1, POSITIONS * (head_dim + 2 * groups))
    planes = tiles[..., : POSITIONS * head_dim].reshape(kv_heads, -1, POSITIONS, head_dim)
    planes = _ordered(planes).reshape(kv_heads, -1, head_dim)
    integers = (planes[..., places(head_dim)].astype(np.int16) - 128).astype(np.int8)
    factors = np.ascontiguousarray(tiles[..., POSITIONS * head_dim :]).view(np.float16)
    scales = factors.reshape(kv_heads, -1, groups, POSITIONS).swapaxes(2, 3).reshape(kv_heads, -1, groups)
    return integers, scales


def values_of(memory: np.ndarray, kv_heads: int, head_dim: int) -> np.ndarray:
    """What a cache in memory stands for: float16[kv_heads, positions, head_dim]."""
    return widen_q8(*unpack(memory, kv_heads, head_dim))


def poison(memory: np.ndarray, kv_heads: int, head_dim: int, first: int) -> np.ndarray:
    """A copy whose positions from `first` on stand for NaN."""
    integers, scales = unpack(memory, kv_heads, head_dim)
    scales = scales.copy()
    scales[:, first:] = np.nan
    return pack(integers, scales)


def places(head_dim: int) -> np.ndarray:
    """Where each column lies in its row: columns c and c + 8 of 16 are neighbours."""
    column = np.arange(head_dim)
    return (column & ~15) | (column & 7) << 1 | (column >> 3 & 1)


def _ordered(planes: np.ndarray) -> np.ndarray:
    """Rows [kv_heads, tile, position, head_dim] with the sixteen-value parts of each in the other order."""
    head_dim = planes.shape[3]
    order = part_places(head_dim // 16)[np.arange(POSITIONS) % 8]
    parts = planes.reshape(*planes.shape[:3], head_dim // 16, 16)
    return np.take_along_axis(parts, order[None, None, :, :, None], axis=3).reshape(planes.shape)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
