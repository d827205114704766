"""Launch shapes of products: how a matrix is cut over blocks, warps and ring stages.

A product's rows are cut into *units* (one tile of 16 rows; for SwiGLU a tile of the gate
and the same tile of up). Unit u belongs to block u mod grid. Inside a block, `column_warps`
warps share the columns of a tile (each a *slice* of whole superblocks) and `tile_warps`
such teams take turns with the block's tiles. Each warp has a ring of `depth` stages in
shared memory, one stage an *item*: its slice of one tile.

Measured on the GPU (docs/performance.md): everything that the ring can hold is requested
before the kernel waits for the one before it, so a deep ring hides the memory; a small
block lets kernels of several hops be resident at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import UnsupportedModelError
from .target import Target

MAX_SLICE = 4  # superblocks a warp keeps in registers: 12 registers each
MAX_WARPS = 16  # of the built-in shapes
MOST_WARPS = 31  # that a block can have beside the errand warp
RING_LIMIT = 112 * 1024  # bytes of ring a block: two kernels resident on an SM with 227 KB


@dataclass(frozen=True)
class ProductShape:
    """grid in blocks; warps per block = column_warps * tile_warps; depth in ring stages."""

    grid: int
    column_warps: int
    tile_warps: int
    depth: int
    units_per_block: int

    @property
    def warps(self) -> int:
        return self.column_warps * self.tile_warps

    @property
    def threads(self) -> int:
        return 32 * self.warps


def product_shape(
    units: int,
    tiles_per_unit: int,
    superblocks: int,
    superblock_bytes: int,
    target: Target,
    *,
    reserve: int = 0,
    column_warps: int | None = None,
    tile_warps: int | None = None,
    ring_limit: int = RING_LIMIT,
) -> ProductShape:
    """The shape of a product.

    units, tiles_per_unit, superblocks: the matrix; superblock_bytes: of its widest weight
    type; reserve: shared bytes that the kernel needs besides ring and partial sums.
    UnsupportedModelError if the columns exceed what a block's warps can hold.
    """
    if column_warps is None:
        column_warps = _column_warps(superblocks)
    per_block = -(-units // target.sm_count)
    # Many rows on few multiprocessors: more blocks than multiprocessors, so that a block's sums leave room for weights.
    while per_block > 1 and _row_bytes(column_warps) * per_block * tiles_per_unit * 16 > target.shared_bytes // 4:
        per_block = -(-per_block // 2)
    grid = -(-units // per_block)
    tiles_per_block = per_block * tiles_per_unit
    slice_ = -(-superblocks // column_warps)
    if slice_ > MAX_SLICE or column_warps > MOST_WARPS:
        raise UnsupportedModelError(f"a product over {superblocks * 256} columns is wider than kernels support (31744)")
    item_bytes = slice_ * superblock_bytes
    rows = tiles_per_block * 16
    available = target.shared_bytes - reserve - _row_bytes(column_warps) * rows - 256
    if tile_warps is None:
        tile_warps = max(1, min(MAX_WARPS // column_warps, tiles_per_block // 2))
        # Wide rows of wide types: as many turns as one stage each fits.
        while tile_warps > 1 and column_warps * tile_warps * (item_bytes + 64) > available:
            tile_warps -= 1
    if column_warps * tile_warps > MOST_WARPS or column_warps > superblocks:
        raise UnsupportedModelError(
            f"{column_warps} x {tile_warps} warps do not fit a product over {superblocks * 256} columns"
        )
    items = -(-tiles_per_block // tile_warps)
    warps = column_warps * tile_warps
    room = available - warps * 64
    depth = max(1, min(items, 8, min(ring_limit, room) // (warps * item_bytes)))
    if depth * warps * item_bytes > room:
        raise UnsupportedModelError(
            f"a product over {superblocks * 256} columns needs more shared memory than {target.arch} has"
        )
    return ProductShape(grid, column_warps, tile_warps, depth, per_block)


def _row_bytes(column_warps: int) -> int:
    """Shared bytes for each row of a block: a partial sum a warp, and what an epilogue fetches early (two numbers)."""
    return (column_warps + 2) * 4


def _column_warps(superblocks: int) -> int:
    """Warps that share a tile's columns: even slices of at most 2 superblocks if 16 warps can hold them.

    Fewer superblocks a warp mean a shorter chain of work between the wait and the exit, which is what a step
    is made of; measured on an H200, three superblocks a warp cost 25 us a step more than two.
    """
    for longest in (2, 3, MAX_SLICE):
        even = [w for w in range(4, 20 if longest == 2 else 17) if superblocks % w == 0 and superblocks // w <= longest]
        if even:
            return min(even, key=lambda w: (abs(w - 8), w))
    if superblocks < 4:
        return superblocks
    return min(MOST_WARPS, -(-superblocks // 3) if superblocks <= 48 else -(-superblocks // MAX_SLICE))
