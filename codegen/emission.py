"""What an emitter gets and gives: the lowering context, and kernels with their launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..ir.graph import Node, Value
from .target import Place, Target


@dataclass(frozen=True)
class Factor:
    """How an RMS factor lies in memory: partial sums of squares, finished by each reader."""

    buffer: str
    parts: int
    size: int
    eps: float


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
    ctx: int

    def read(self, value: Value) -> str:
        """The buffer in which a value lies."""

    def write(self, value: Value) -> str:
        """A buffer for a result."""

    def write_factor(self, value: Value, parts: int, size: int, eps: float) -> str:
        """A buffer of partial sums of squares for a factor."""

    def factor(self, value: Value) -> Factor:
        """Where a factor's partial sums lie."""

    def in_place(self, result: Value, state: Value) -> str:
        """The result takes the state's own buffer."""

    def place(self, node: Node) -> Place:
        """Which place a product of the step takes."""

    def place_bytes(self, node: Node) -> int:
        """Dynamic shared memory of that place (`Target.place_bytes`)."""

    @property
    def attention_stages(self) -> int:
        """Stages of the ring of each warp of attention (`places`)."""

    def attention_after(self, node: Node) -> Node:
        """The attention of the next layer; of the first one after the last."""

    def scratch(self, name: str, nbytes: int, zeroed: bool = False) -> str:
        """Memory private to this launch."""

    def table(self, name: str, nbytes: int, **attrs: object) -> str:
        """A table that the runtime fills when the model is loaded."""
