"""The f16 cache as it lies in memory, in numpy: what `device/cache.cuh` says of it, written a second time."""

from __future__ import annotations

import numpy as np

POSITIONS = 16  # of a tile


def pack(halves: np.ndarray) -> np.ndarray:
    """f16[kv_heads, context, head_dim] -> f16[kv_heads, positions of whole tiles, head_dim]; NaN behind the context."""
    kv_heads, context, head_dim = halves.shape
    behind = np.full((kv_heads, -context % POSITIONS, head_dim), np.nan, np.float16)
    return ordered(np.concatenate([halves.astype(np.float16), behind], axis=1))


def unpack(memory: np.ndarray, kv_heads: int, context: int, head_dim: int) -> np.ndarray:
    """The other way round, of the memory's bytes: f16[kv_heads, context, head_dim]."""
    rows = np.ascontiguousarray(memory).view(np.float16).reshape(kv_heads, -1, head_dim)
    return ordered(rows)[:, :context].copy()


def ordered(rows: np.ndarray) -> np.ndarray:
    """Rows [kv_heads, positions, head_dim] with the eight-value parts of each in the other order."""
    kv_heads, positions, head_dim = rows.shape
    places = part_places(head_dim // 8)[np.arange(positions) % 8]  # [position][part]
    parts = rows.reshape(kv_heads, positions, head_dim // 8, 8)
    return np.take_along_axis(parts, places[None, :, :, None], axis=2).reshape(rows.shape)


def part_places(parts: int) -> np.ndarray:
    """int[8, parts]: where each of a row's 16-byte parts stands in the row of position 0 to 7."""
    even = parts & -parts
    return np.arange(parts) ^ (np.arange(8)[:, None] % min(even, 8))
