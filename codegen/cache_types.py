"""One row a type of KV cache: what a position takes, and which struct of the device header knows how it lies in memory.

A new type is a row here and in `ir/types.py`, its rounding in `ir/interpret.py`, a struct in
`device/cache.cuh` that stores a row and hands a tile to the tensor cores as halves, and one in
`device/many_rows.cuh` that brings tiles to a prompt's kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

TILE = 16  # positions that a warp takes at once


@dataclass(frozen=True)
class CacheType:
    """A type of KV cache, which lies in memory as whole tiles [key/value head][tile].

    name         as in the IR and behind --kv-type.
    struct       of the device header, a template over the head's size.
    value_bytes  of a value without its scale.
    group        values that share a scale of two bytes; 0: there are no scales.
    value_room   bytes of a value in the struct's `Row`, a row on its way into the cache.
    chunk_bytes  head_dim, keys -> shared memory for `attend_block`'s tiles of so many keys and values.
    chunk_tiles  the template that brings tiles to `attend_block`.
    """

    name: str
    struct: str
    value_bytes: int
    group: int
    value_room: int
    chunk_bytes: Callable[[int, int], int]
    chunk_tiles: str

    def position_bytes(self, head_dim: int) -> int:
        """Bytes of one position of one key/value head, of keys or of values."""
        return head_dim * self.value_bytes + (2 * -(-head_dim // self.group) if self.group else 0)

    def tile_bytes(self, head_dim: int) -> int:
        """Bytes of a tile of keys or of values, in memory and in shared memory."""
        return TILE * self.position_bytes(head_dim)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the struct's `Row`."""
        scales = 2 * -(-head_dim // self.group) if self.group else 0
        return -(-(head_dim * self.value_room + scales) // 16) * 16

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a cache [sequences, key/value heads, context, head_dim]."""
        sequences, kv_heads, context, head_dim = shape
        return sequences * kv_heads * -(-context // TILE) * self.tile_bytes(head_dim)

    @property
    def layout(self) -> str:
        """The name of a cache's layout in a Program."""
        return f"{self.name} tiles"

    def typedef(self, head_dim: int) -> str:
        """The line by which a kernel calls the struct `Cache`."""
        return f"typedef {self.struct}<{head_dim}> Cache;"


def _half_stages(head_dim: int, keys: int) -> int:
    """Two stages of halves."""
    return 2 * keys * (2 * head_dim + 24) * 2


def _q8_stage(head_dim: int, keys: int) -> int:
    """One stage of halves, and the bytes that are widened into it."""
    return _half_stages(head_dim, keys) // 2 + 2 * keys * (head_dim + 2 * -(-head_dim // 32))


CACHE_TYPES: dict[str, CacheType] = {
    row.name: row
    for row in (
        CacheType("f16", "HalfCache", 2, 0, 2, _half_stages, "HalfTiles"),
        CacheType("q8", "Q8", 1, 32, 5, _q8_stage, "Q8Tiles"),
    )
}
