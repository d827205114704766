"""Which kernels of products there are: weight types and shape classes, and what a kernel's text says of its way.

A kernel's text depends on sizes in two ways: numbers in it change, and branches of the emitter change the lines around
them (a guard for a ragged edge, a refill of the ring, a second weight type). `statements` are the lines without their
numbers. Tests run every row of `product_cases` against float64, and hold the statements of every kernel that a model
needs against those of the tested kernels of the same op: a line that no test has run is reported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.ops import OPS


@dataclass(frozen=True)
class ShapeClass:
    """A matrix shape that makes product kernels take a way of their own.

    overrides: the launch shape, where the built-in rule would need a large matrix to choose it.
    older: as GPUs before compute capability 9.0 get it, where each warp fetches its own weights.
    types: weight types that take this way differently from others; none named: all.
    """

    name: str
    rows: int
    columns: int
    sm_count: int
    overrides: tuple[tuple[str, int], ...] = ()
    older: bool = False
    types: tuple[str, ...] = ()

    def suits(self, dtype: str) -> bool:
        """Whether the type is one of the class's, and a row a whole number of its blocks."""
        return dtype in (self.types or WEIGHT_TYPES) and self.columns % WEIGHT_TYPES[dtype].block_columns == 0


_RING = (("column_warps", 2), ("tile_warps", 2), ("ring_limit", 1))
_TWO_WARPS = (("column_warps", 2), ("tile_warps", 1))
_BOTH = ("q4_k", "q6_k")  # with 6-bit minima and without

SHAPE_CLASSES = (
    ShapeClass("one tile", 16, 256, 4),
    ShapeClass("ragged rows", 40, 512, 4),
    ShapeClass("ragged columns", 48, 672, 4),
    ShapeClass("few multiprocessors", 272, 768, 3),
    ShapeClass("more rows than threads", 520, 256, 1, (("column_warps", 1), ("tile_warps", 1))),
    ShapeClass("refilled ring", 264, 768, 2, _RING),
    ShapeClass("even refilled ring", 256, 1024, 4, (("column_warps", 4), ("tile_warps", 1), ("ring_limit", 1))),
    ShapeClass("slices in pieces", 80, 1024, 2, (("column_warps", 2), ("tile_warps", 1), ("ring_limit", 1))),
    ShapeClass("wide uneven slices", 48, 1792, 2, _TWO_WARPS, types=_BOTH),
    ShapeClass("two superblocks a warp", 32, 1024, 2, _TWO_WARPS, types=_BOTH),
    ShapeClass("three superblocks a warp", 32, 1536, 2, _TWO_WARPS, types=_BOTH),
    ShapeClass("more teams than tiles", 16, 1024, 4, _RING, types=("q4_k", "f16")),
    ShapeClass("uneven teams", 96, 256, 2, (("column_warps", 1), ("tile_warps", 4)), types=("q4_k",)),
    ShapeClass("older GPU", 112, 1792, 1, (("column_warps", 2), ("tile_warps", 2)), True, (*_BOTH, "f16")),
    ShapeClass("older GPU, one superblock a warp", 64, 512, 4, _TWO_WARPS, True, ("q4_k",)),
    ShapeClass("older GPU, two superblocks a warp", 40, 1024, 4, _TWO_WARPS, True, ("q4_k",)),
    ShapeClass("older GPU, three superblocks a warp", 56, 1536, 1, _TWO_WARPS, True, _BOTH),
    ShapeClass("H100", 64, 2048, 132),
    ShapeClass("uneven H100", 2128, 256, 132, types=(*_BOTH, "f16")),
)


MIXED = (("q4_k", "q6_k"), ("q4_k", "q4_k", "q6_k"), ("q5_k", "q6_k"), ("q6_k", "q8_0"), ("q8_0", "q5_k", "q4_k"),
         ("f16", "bf16", "f32"))  # fmt: skip
MIXED_SHAPES = (SHAPE_CLASSES[1], SHAPE_CLASSES[5])
EVERY_FORM = ("one tile",)  # elsewhere each op once: what follows the sums does not know the shape
PRODUCTS = tuple(name for name, op in OPS.items() if op.product)


def product_cases() -> tuple[tuple[str, ShapeClass], ...]:
    """Every weight type with every shape class that suits it; each case stands for all of `PRODUCTS`."""
    return tuple((dtype, shape) for dtype in WEIGHT_TYPES for shape in SHAPE_CLASSES if shape.suits(dtype))


# A number that is no part of a name: `16`, `1e-06f`, `0x0f`, but not the digits of Q4_K or weight0.
_NUMBER = re.compile(r"(?<![\w.])(?:0x[0-9a-fA-F]+|\d+(?:\.\d*)?(?:e[+-]?\d+)?f?)(?![\w.])")


def statements(text: str) -> frozenset[str]:
    """The lines of a kernel's text without numbers, comments and the kernel's own name."""
    body = re.sub(r"//[^\n]*", "", text)
    body = re.sub(r"((?:THREADS|REGISTERS)\([\w, ]+\)) \w+\(", r"\1 KERNEL(", body)
    lines = (_NUMBER.sub("#", line).strip() for line in body.split("\n"))
    return frozenset(line for line in lines if line)
