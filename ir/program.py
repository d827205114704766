"""Program: the terminal stage. Kernel texts, launches in order, and a table of buffers.

A Program needs no CUDA: `codegen` writes it, `runtime` compiles and runs it, `inspect`
prints it, and the JSON form (`to_json`) is what `psigraph compile` leaves on disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .graph import Graph

# In a Launch, in the place of a kernel's name: a product of halves that the runtime gives to a library.
# Its args: the buffers w (halves [rows, columns]), x (halves [tokens, columns]), c and y (float32 [tokens, rows]), then
# rows, tokens, columns, whether c is added (0 or 1), and the binary logarithm of what w @ x is multiplied with.
LIBRARY_PRODUCT = "library_product"


@dataclass(frozen=True)
class Buffer:
    """One piece of device memory.

    kind     weight (packed from the file), state, constant, table (computed on the host
             when the model is loaded), scratch (written and read within a step).
    dtype    element type as in the IR.
    shape    logical shape.
    layout   how the elements lie: `plain` (row-major), `tiles` (codegen.packing),
             `i8x2` (docs/layout.md), or the name of a table.
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
    """One kernel of the step.

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
class Program:
    """Everything the runtime needs to run one decode step, for one number of SMs.

    headers: texts that the kernels' include by name. defines: macros that its kernels are compiled with.
    """

    name: str
    graph: Graph
    headers: Mapping[str, str]
    kernels: tuple[Kernel, ...]
    launches: tuple[Launch, ...]
    buffers: tuple[Buffer, ...]
    sm_count: int
    programmatic: bool
    results: tuple[tuple[str, str], ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    defines: tuple[str, ...] = ()

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

    @property
    def weight_bytes_per_token(self) -> int:
        return sum(launch.bytes_read for launch in self.launches)

    def to_json(self) -> str:
        record = {
            "schema": "psigraph.program.v1",
            "name": self.name,
            "sm_count": self.sm_count,
            "programmatic": self.programmatic,
            "kernels": [kernel.name for kernel in self.kernels],
            "launches": [asdict(launch) for launch in self.launches],
            "buffers": [asdict(buffer) for buffer in self.buffers],
            "results": dict(self.results),
            "notes": self.notes,
        }
        return json.dumps(record, indent=1)
