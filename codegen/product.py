"""The facts of one matrix-vector product that its emitter and its epilogue share."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Node, Value
from .emission import Context, Factor
from .shapes import ProductShape
from .target import LEAST_WARPS
from .weight_types import WeightType, padded_columns, superblocks

IN_FLIGHT = 32 * 1024  # bytes that a block has under way ahead of its turn, about: enough to keep the memory busy


@dataclass
class Product:
    """The facts of one product, and the argument list that grows while it is emitted.

    early: numbers a row that its epilogue fetches ahead (`product_epilogues.EARLY_NUMBERS`).
    """

    node: Node
    ctx: Context
    weights: tuple[Value, ...]
    types: tuple[WeightType, ...]
    factor: Factor | None
    columns: int
    units: int
    tiles_per_unit: int
    shape: ProductShape
    early: int
    parameters: list[str]
    args: list[str | int]

    def take(self, declaration: str, arg: str | int) -> None:
        self.parameters.append(declaration)
        self.args.append(arg)

    @property
    def integer(self) -> bool:
        return self.types[0].family == "integer"

    @property
    def superblocks(self) -> int:
        return superblocks(self.columns)

    @property
    def slice(self) -> int:
        return -(-self.superblocks // self.shape.column_warps)

    @property
    def threads(self) -> int:
        """The product's warps, one that runs errands (factor, residual, whatever the epilogue needs), and where bulk
        copies can be asked for by any warp, one that asks for all weights ahead. With fewer than ten warps a block
        would leave registers for a second one of the next kernel (`Target.place_registers`): some then do nothing."""
        needed = self.shape.threads + (64 if self.loads_ahead else 32)
        return max(needed, 32 * LEAST_WARPS) if self.ctx.target.places else needed

    @property
    def loads_ahead(self) -> bool:
        return self.ctx.target.programmatic

    @property
    def registers(self) -> int:
        """Of a thread: as many as its place has, no more and no fewer; 0: as many as it needs."""
        return self.ctx.target.place_registers(self.ctx.place(self.node))

    @property
    def stages(self) -> int:
        """Ring stages that a team of warps goes through, at most."""
        return -(-self.tiles_per_block // self.shape.tile_warps) * self.slice

    @property
    def ahead(self) -> int:
        """Ring stages of each team of warps that may be under way at once while the kernel waits for its turn."""
        return max(1, -(-IN_FLIGHT // (self.shape.warps * self.widest)))

    @property
    def launched(self) -> int:
        """Blocks of the launch: one a multiprocessor at least, so that every kernel of the step takes the same places
        (`Target.place_bytes`); those from `shape.grid` on have no rows."""
        return max(self.shape.grid, self.ctx.target.sm_count if self.ctx.target.places else 0)

    @property
    def tiles_per_block(self) -> int:
        return self.shape.units_per_block * self.tiles_per_unit

    @property
    def widest(self) -> int:
        """Bytes of a superblock of the widest weight type: what a ring stage must hold."""
        return max(row.superblock_bytes for row in self.types)

    @property
    def shared(self) -> SharedLayout:
        """Where things lie in the block's dynamic shared memory."""
        shape = self.shape
        ring = shape.warps * shape.depth * self.widest
        barriers = -(-ring // 128) * 128
        partial = barriers + shape.tile_warps * shape.depth * 16
        early = partial + shape.column_warps * self.tiles_per_block * 16 * 4
        activations_at = early + self.early * self.tiles_per_block * 16 * 4
        activations = 0 if self.integer else padded_columns(self.columns) * 4
        return SharedLayout(barriers, partial, early, activations_at, activations_at + activations)


@dataclass(frozen=True)
class SharedLayout:
    """Byte offsets in dynamic shared memory, after the rings: barriers, partial sums
    [column warp][row], what an epilogue fetches early [number][row], activations as float32; and the total."""

    barriers: int
    partial: int
    early: int
    activations: int
    total: int
