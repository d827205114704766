"""Program: the terminal stage. Kernel texts, and steps of launches in order over one table of buffers.

A Program needs no CUDA: `codegen` writes it, `runtime` compiles and runs it, `inspect`
prints it, and the JSON form (`to_json`) is what `psigraph compile` leaves on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .graph import Graph
from .regime import Regime

SCHEMA = "psigraph.program.v2"  # of program.json
DECODE, PREFILL = "decode", "prefill"  # names of steps: the one replayed per token, and the one of a prompt's chunk


@dataclass(frozen=True)
class Buffer:
    """One piece of device memory.

    kind     weight (packed from the file), state, constant, input (of one step, written by the host before it runs),
             table (computed on the host when the model is loaded), scratch (written and read within a step).
    dtype    element type as in the IR.
    shape    logical shape.
    layout   how the elements lie: `plain` (row-major), `tiles` (docs/layout.md, "Layouts in memory"),
             `i8x2`, `halves`, or the name of a table.
    nbytes   size in bytes, padding included.
    zeroed   must be zero before the first step.
    source   the tensor's name (weights), the state's name, or "" .
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    nbytes: int
    zeroed: bool = False
    source: str = ""
    attrs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """CUDA C++ text of one kernel, which includes device headers; `name` is its extern "C" entry."""

    name: str
    text: str


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    args          buffer names, or ints passed as 32-bit scalars, in the kernel's order.
    grid, block   blocks and threads (x only).
    shared_bytes  dynamic shared memory.
    programmatic  launched with a programmatic edge: it waits inside the kernel.
    cluster       blocks that run side by side and reach each other's shared memory; 1 for none.
    bytes_read    bytes of weights and activations read from device memory per step at
                  position 0; the cache's share is `cache_bytes_per_position`.
    bytes_written bytes of large results (logits that are drawn from); vectors of a layer are a few kilobytes
                  and not counted.
    """

    kernel: str
    nodes: tuple[str, ...]
    args: tuple[str | int, ...]
    grid: int
    block: int
    shared_bytes: int = 0
    programmatic: bool = False
    cluster: int = 1
    bytes_read: int = 0
    bytes_written: int = 0
    cache_bytes_per_position: int = 0
    layer: int | None = None


@dataclass(frozen=True)
class LibraryProduct:
    """A product that the runtime gives to a library: y = 2^up * x @ w.T, plus c if `add`.

    w: halves [rows, columns]; x: halves [tokens, columns]; c, y: float32 [tokens, rows]; all of them buffers.
    """

    nodes: tuple[str, ...]
    w: str
    x: str
    c: str
    y: str
    rows: int
    tokens: int
    columns: int
    add: bool
    up: int
    layer: int | None = None


@dataclass(frozen=True)
class Step:
    """What is launched for so many rows, in order. results: the graph's results and the buffers that hold them."""

    name: str
    graph: Graph
    regime: Regime
    rows: int
    launches: tuple[Launch | LibraryProduct, ...]
    results: tuple[tuple[str, str], ...] = ()

    @property
    def kernels(self) -> tuple[Launch, ...]:
        """The launches that are kernels of ours."""
        return tuple(launch for launch in self.launches if isinstance(launch, Launch))


@dataclass(frozen=True)
class Program:
    """Everything the runtime needs to run its steps over the same memory, for one number of SMs.

    headers: texts that the kernels' include by name. defines: macros that its kernels are compiled with.
    """

    name: str
    headers: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    sm_count: int
    programmatic: bool
    notes: dict[str, Any] = field(default_factory=dict)
    defines: tuple[str, ...] = ()

    def step(self, name: str = DECODE) -> Step:
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(f"program {self.name} has no step {name}")

    def kernel(self, name: str) -> Kernel:
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        raise KeyError(f"program {self.name} has no kernel {name}")

    def buffer(self, name: str) -> Buffer:
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(f"program {self.name} has no buffer {name}")

    def with_step(self, step: Step) -> Program:
        """The Program with this step in the place of the one of its name."""
        return replace(self, steps=tuple(step if step.name == old.name else old for old in self.steps))

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes that one decode step reads at position 0."""
        return sum(launch.bytes_read for launch in self.step().kernels)

    def to_json(self) -> str:
        record = {
            "schema": SCHEMA,
            "name": self.name,
            "sm_count": self.sm_count,
            "programmatic": self.programmatic,
            "kernels": [kernel.name for kernel in self.kernels],
            "steps": [
                {
                    "name": step.name,
                    "rows": step.rows,
                    "regime": str(step.regime),
                    "launches": [asdict(launch) for launch in step.launches],
                    "results": dict(step.results),
                }
                for step in self.steps
            ],
            "buffers": [asdict(buffer) for buffer in self.buffers],
            "notes": self.notes,
        }
        return json.dumps(record, indent=1)
