"""The facts of one matrix-vector product that its emitter and its epilogue share."""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.graph import Node, Value
from .emission import Context, Factor
from .shapes import ProductShape
from .weight_types import WeightType, padded_columns, superblocks


@dataclass
class Product:
    """The facts of one product, and the argument list that grows while it is emitted."""

    node: Node
    ctx: Context
    weights: tuple[Value, ...]
    types: tuple[WeightType, ...]
    factor: Factor | None
    columns: int
    units: int
    tiles_per_unit: int
    shape: ProductShape
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
    def piece(self) -> int:
        """Superblocks of a ring stage."""
        return self.slice // self.shape.pieces

    @property
    def threads(self) -> int:
        """The product's warps, and one that runs errands: factor, residual, whatever the epilogue needs."""
        return self.shape.threads + 32

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
        ring = shape.warps * shape.depth * self.piece * self.widest
        barriers = -(-ring // 128) * 128
        partial = barriers + -(-shape.warps * shape.depth * 8 // 16) * 16
        floats = partial + shape.column_warps * self.tiles_per_block * 16 * 4
        total = floats + (0 if self.integer else padded_columns(self.columns) * 4)
        return SharedLayout(barriers, partial, floats, total)


@dataclass(frozen=True)
class SharedLayout:
    """Byte offsets in dynamic shared memory, after the rings: barriers, partial sums
    [column warp][row], activations as float32; and the total."""

    barriers: int
    partial: int
    floats: int
    total: int
