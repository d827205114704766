"""What emitters of a prompt's kernels get and give: places of values, and pieces of the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..ir.graph import Value
from .small_kernel import SmallKernel


@dataclass(frozen=True)
class Place:
    """Where the rows of a value lie, in elements of a buffer: row t begins at offset + t * stride.

    up: halves are stored times 2^-up, so that large values fit; whoever reads them multiplies it back.
    """

    buffer: str
    offset: int
    stride: int
    up: int = 0


class PrefillContext(Protocol):
    """What lowering offers to an emitter."""

    tokens: int
    ctx: int
    library: bool

    def place(self, value: Value) -> Place:
        """Where a value that was written lies."""

    def param(self, value: Value) -> str:
        """The buffer of a weight or state."""

    def write(self, *values: Value, up: int = 0) -> Place:
        """Memory for results of a node, side by side in one row a token; the place of the first."""

    def in_place(self, result: Value, state: Value) -> str:
        """The result takes the state's own buffer."""

    def scratch(self, name: str, nbytes: int) -> str:
        """Memory between two launches of one node."""

    def table(self, name: str, nbytes: int, **attrs: object) -> str:
        """A table that the runtime fills when the model is loaded."""


class PrefillKernel(SmallKernel):
    """A kernel of a prompt's chunk."""

    includes = ("many_rows.cuh",)
