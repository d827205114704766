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
WARPS_OF_WIDE_SLICES = 15  # of the built-in shapes, where a warp has more than one superblock: 128 registers a thread
MANY_WARPS = 20  # more leave too few registers to each thread: the assembler spills
MOST_WARPS = 31  # that a block can have beside the errand warp
RING_LIMIT = 112 * 1024  # bytes of ring a block: two kernels resident on an SM with 227 KB


@dataclass(frozen=True)
class ProductShape:
    """grid in blocks; warps per block = column_warps * tile_warps; depth in ring stages.

    pieces: ring stages that an item is cut into, where a block's shared memory cannot hold
    one item of each warp.
    """

    grid: int
    column_warps: int
    tile_warps: int
    pieces: int
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
    pieces: int | None = None,
    ring_limit: int = RING_LIMIT,
) -> ProductShape:
    """The shape of a product: the first that fits, of those that are likely to be fast.

    units, tiles_per_unit, superblocks: the matrix; superblock_bytes: of its widest weight
    type; reserve: shared bytes that the kernel needs besides ring and partial sums.
    column_warps, tile_warps, pieces, ring_limit: what tuning or a test asks for. UnsupportedModelError if
    nothing fits.
    """
    problem = "is wider than kernels support (31744)"
    for columns in (column_warps,) if column_warps is not None else _column_warps(superblocks):
        slice_ = -(-superblocks // columns)
        if columns > superblocks or columns > MOST_WARPS or slice_ > MAX_SLICE or (columns - 1) * slice_ >= superblocks:
            continue
        problem = f"needs more shared memory than {target.arch} has"
        per_block = _units_per_block(units, tiles_per_unit, columns, target)
        tiles = per_block * tiles_per_unit
        room = target.shared_bytes - reserve - _row_bytes(columns) * tiles * 16 - 256
        most = (MAX_WARPS if slice_ == 1 else WARPS_OF_WIDE_SLICES) // columns
        wanted = tile_warps if tile_warps is not None else max(1, min(most, tiles // 2))
        for turns in range(wanted, 0, -1) if tile_warps is None else (wanted,):
            warps = columns * turns
            if warps > MOST_WARPS:
                continue
            for cuts in _pieces(superblocks, columns, slice_):
                if pieces not in (None, cuts):
                    continue
                stage = warps * (slice_ // cuts if cuts > 1 else slice_) * superblock_bytes
                items = -(-tiles // turns) * cuts
                depth = max(1, min(items, 8, min(ring_limit, room - warps * 64) // stage))
                if depth * stage <= room - warps * 64:
                    return ProductShape(-(-units // per_block), columns, turns, cuts, depth, per_block)
    raise UnsupportedModelError(f"a product over {superblocks * 256} columns {problem}")


def _units_per_block(units: int, tiles_per_unit: int, column_warps: int, target: Target) -> int:
    """One block a multiprocessor, or more where a block's sums would leave no room for weights."""
    per_block = -(-units // target.sm_count)
    while per_block > 1 and _row_bytes(column_warps) * per_block * tiles_per_unit * 16 > target.shared_bytes // 4:
        per_block = -(-per_block // 2)
    return per_block


def _pieces(superblocks: int, column_warps: int, slice_: int) -> list[int]:
    """Even ways to cut a slice; one that is not as wide as the others stays whole, so that no stage is empty."""
    if superblocks % column_warps:
        return [1]
    return [pieces for pieces in range(1, slice_ + 1) if slice_ % pieces == 0]


def _row_bytes(column_warps: int) -> int:
    """Shared bytes for each row of a block: a partial sum a warp, and what an epilogue fetches early (two numbers)."""
    return (column_warps + 2) * 4


def _column_warps(superblocks: int) -> list[int]:
    """Warps that may share a tile's columns, the likely fastest first: even slices of at most 2 superblocks.

    Fewer superblocks a warp mean a shorter chain of work between the wait and the exit, which is what a step
    is made of; measured on an H200, three superblocks a warp cost 10 to 30 us a step more than two. Many warps leave
    few registers to each (`MANY_WARPS`, `WARPS_OF_WIDE_SLICES`).
    """
    even = [w for w in range(1, MOST_WARPS + 1) if superblocks % w == 0 and superblocks // w <= MAX_SLICE]
    order = sorted(even, key=lambda w: (w > MANY_WARPS, max(superblocks // w, 2), w < 4, abs(w - 8), w))
    uneven = [-(-superblocks // slice_) for slice_ in (3, MAX_SLICE)]
    return order + [w for w in uneven if w <= MOST_WARPS]
