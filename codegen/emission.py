"""What an emitter gets and gives: the lowering context, and kernels with their launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..ir.graph import Literal, Node, Value
from ..ir.program import LibraryProduct
from ..ir.regime import Regime
from .target import Slot, Target


@dataclass(frozen=True)
class Factor:
    """How an RMS factor lies in memory: partial sums of squares, finished by each reader."""

    buffer: str
    parts: int
    size: int
    eps: float


@dataclass(frozen=True)
class RowView:
    """Where the rows of a value lie, in elements of a buffer: row t begins at offset + t * stride.

    up: halves are stored times 2^-up, so that large values fit; whoever reads them multiplies it back.
    """

    buffer: str
    offset: int
    stride: int
    up: int = 0


class Parameters:
    """A kernel's parameters with what a launch gives for them, in order."""

    def __init__(self) -> None:
        self.parameters: list[str] = []
        self.args: list[str | int] = []

    def param(self, declaration: str, arg: str | int) -> str:
        """One more, as C declares it; its name."""
        self.parameters.append(declaration)
        self.args.append(arg)
        return declaration.replace("*", " ").split()[-1]

    def spec(self, stem: str, include: str, threads: int, body: str, grid: int, **launch: Any) -> KernelSpec:
        """The kernel that has them. launch: further fields of `KernelSpec`."""
        return KernelSpec(stem, (include,), threads, tuple(self.parameters), tuple(self.args), body, grid, **launch)


@dataclass(frozen=True)
class KernelSpec:
    """One kernel and how to launch it: all of its text but its name.

    stem        its name, up to a number.
    includes    device headers that the text stands on.
    threads, registers, parameters, body: see `writer.kernel_text`.
    args        buffer names or 32-bit integers, one a parameter.
    grid        blocks; cluster: how many of them reach each other's shared memory.
    The other fields are those of `ir.program.Launch`; describe: a line about the shape, for the text's comment.
    """

    stem: str
    includes: tuple[str, ...]
    threads: int
    parameters: tuple[str, ...]
    args: tuple[str | int, ...]
    body: str
    grid: int
    registers: int = 0
    shared_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cache_bytes_per_position: int = 0
    cluster: int = 1
    describe: str = ""


class Context(Protocol):
    """What lowering offers to an emitter."""

    target: Target
    regime: Regime
    rows: int
    ctx: int
    library: bool
    shapes: Mapping[str, dict[str, int]]

    def read(self, value: Value) -> str:
        """The buffer in which a value lies."""

    def view(self, value: Value) -> RowView:
        """Where the rows of a value lie."""

    def write(self, value: Value) -> str:
        """A buffer for a result."""

    def write_rows(self, *values: Value, up: int = 0) -> RowView:
        """Memory for results of a node, side by side in one row a token; the view of the first."""

    def write_factor(self, value: Value, parts: int, size: int, eps: float) -> str:
        """A buffer of partial sums of squares for a factor."""

    def factor(self, value: Value) -> Factor:
        """Where a factor's partial sums lie."""

    def in_place(self, result: Value, state: Value) -> str:
        """The result takes the state's own buffer."""

    @property
    def count(self) -> str:
        """The buffer that says how many of a step's rows there are; those behind them are absent."""

    @property
    def beyond(self) -> str:
        """Words of a chunk: the first is no longer zero once a value was beyond what halves hold; in each further one
        is the largest of some activations that a node stored times a power of two (`sampled_slot`), a float's bits."""

    def sampled_slot(self, node: Node) -> int:
        """A node's word of `beyond`."""

    def slot(self, node: Node) -> Slot:
        """Which slot a product of the step takes."""

    def slot_bytes(self, node: Node) -> int:
        """Dynamic shared memory of that slot (`Target.slot_bytes`)."""

    @property
    def attention_stages(self) -> int:
        """Stages of the ring of each warp of attention (`occupancy`)."""

    def attention_after(self, node: Node) -> Node:
        """The `rope_attention` of the next layer; of the first one after the last."""

    def scratch(self, name: str, nbytes: int, zeroed: bool = False) -> str:
        """Memory private to this node's launches."""

    def table(self, name: str, nbytes: int, **attrs: object) -> str:
        """A table that the runtime fills when the model is loaded."""


Emitter = Callable[[Node, Context], "KernelSpec | Sequence[KernelSpec | LibraryProduct]"]
Emitters = Mapping[tuple[str, Regime], Emitter]


class ReadNode(Node):
    """A node that knows which of its attributes an emitter has read: lowering refuses those that none did."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.outs, node.op, node.ins, node.attrs, node.origin)
        object.__setattr__(self, "read", set())

    def attr(self, key: str, default: Literal | None = None) -> Literal:
        self.read.add(key)  # type: ignore[attr-defined]
        return super().attr(key, default)

    def unread(self) -> list[str]:
        """The attributes that nobody asked for."""
        return [key for key, _ in self.attrs if key not in self.read]  # type: ignore[attr-defined]
