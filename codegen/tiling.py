"""Launch shapes of products: how a matrix is cut over blocks, warps and ring stages.

A product's rows are cut into *units* (one tile of 16 rows; for SwiGLU a tile of the gate
and the same tile of up). Unit u belongs to block u mod grid. Inside a block, `column_warps`
warps share the columns of a tile (each a *slice* of whole superblocks) and `tile_warps`
such teams take turns with the block's tiles. Each team has a ring of `depth` stages in
shared memory; a stage holds a superblock of a tile for each of the team's warps.

Measured on the GPU (docs/performance.md): everything that the ring can hold is requested
before the kernel waits for the one before it, so a deep ring hides the memory; a small
block lets kernels of several hops be resident at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import UnsupportedModelError
from .target import STATIC_BYTES, Target

MAX_SLICE = 6  # superblocks of a row that one warp may multiply
MOST_WARPS = 30  # that a block can have beside its helpers
RING_LIMIT = 112 * 1024  # bytes of ring a block, where no slot says so
MOST_STAGES = 16  # of a team's ring


@dataclass(frozen=True)
class ProductShape:
    """grid in blocks; warps per block = column_warps * tile_warps; depth in ring stages a team; shared_bytes of dynamic
    shared memory."""

    grid: int
    column_warps: int
    tile_warps: int
    depth: int
    units_per_block: int
    shared_bytes: int

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
    early: int = 0,
    slot: int = 0,
    most_warps: int = 16,
    column_warps: int | None = None,
    tile_warps: int | None = None,
    ring_limit: int | None = None,
) -> ProductShape:
    """The shape of a product: the first that fits, of those that are likely to be fast.

    units, tiles_per_unit, superblocks: the matrix; superblock_bytes: of its widest weight type; reserve: shared bytes
    that the kernel needs besides ring and sums; early: numbers a row that its epilogue fetches ahead; slot: dynamic
    shared bytes that it may take if it can, and most_warps warps that may multiply (`Target.slot_bytes`,
    `Target.most_warps`). column_warps, tile_warps, ring_limit: what tuning or a test asks for. UnsupportedModelError if
    nothing fits.
    """
    limit = ring_limit or slot or RING_LIMIT
    most_bytes = target.shared_bytes - STATIC_BYTES
    problem = "is wider than kernels support (46080)"
    for columns in (column_warps,) if column_warps is not None else _column_warps(superblocks, most_warps):
        slice_ = -(-superblocks // columns)
        if columns > superblocks or columns > MOST_WARPS or slice_ > MAX_SLICE or (columns - 1) * slice_ >= superblocks:
            continue
        problem = f"needs more shared memory than {target.arch} has"
        per_block = _units_per_block(units, tiles_per_unit, columns, target)
        tiles = per_block * tiles_per_unit
        sums = reserve + (columns + early) * tiles * 16 * 4
        most = most_warps // columns
        wanted = tile_warps if tile_warps is not None else max(1, min(most, tiles))
        tried = [
            (total, turns)
            for total in ((slot, most_bytes) if slot else (most_bytes,))
            for turns in (range(wanted, 0, -1) if tile_warps is None else (wanted,))
            if columns * turns <= MOST_WARPS
        ]
        for total, turns in tried:
            stage = columns * turns * superblock_bytes
            depth = max(1, min(-(-tiles // turns) * slice_, MOST_STAGES, limit // stage))
            while depth > 1 and _bytes(stage, depth, turns, sums) > total:
                depth -= 1
            needed = _bytes(stage, depth, turns, sums)
            if needed <= total:
                return ProductShape(-(-units // per_block), columns, turns, depth, per_block, needed)
    raise UnsupportedModelError(f"a product over {superblocks * 256} columns {problem}")


def _units_per_block(units: int, tiles_per_unit: int, column_warps: int, target: Target) -> int:
    """One block a multiprocessor, or more where a block's sums would leave no room for weights."""
    per_block = -(-units // target.sm_count)
    while per_block > 1 and _row_bytes(column_warps) * per_block * tiles_per_unit * 16 > target.shared_bytes // 4:
        per_block = -(-per_block // 2)
    return per_block


def _bytes(stage: int, depth: int, tile_warps: int, sums: int) -> int:
    """Dynamic shared bytes: rings, barriers, partial sums (`SharedLayout` of device/product.cuh says where)."""
    return -(-stage * depth // 128) * 128 + tile_warps * depth * 16 + sums


def _row_bytes(column_warps: int) -> int:
    """Shared bytes for each row of a block: a partial sum a warp, and what an epilogue fetches early (two numbers)."""
    return (column_warps + 2) * 4


def _column_warps(superblocks: int, most: int) -> list[int]:
    """Warps that may share a tile's columns, the likely fastest first: about eight, with even slices if there are such.

    Fewer superblocks a warp mean a shorter chain of work between the wait and the exit, which is what a step
    is made of; but with more than `most` the kernels of a step cannot share a multiprocessor.
    """
    shares = [w for w in range(1, MOST_WARPS + 1) if -(-superblocks // w) <= MAX_SLICE]

    def cost(warps: int) -> tuple[bool, bool, int, bool, int, int]:
        slice_ = -(-superblocks // warps)
        crowded = warps > most
        return crowded, superblocks % warps != 0, max(slice_, 2), warps < 4, abs(warps - 8), warps

    return sorted(shares, key=cost)
