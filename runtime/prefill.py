"""A prompt's tokens in chunks: the Program of a chunk beside that of a step, over the same weights and caches.

A chunk is one graph for any number of tokens up to its rows: the tokens and the span (where they begin, how many they
are) are copied to the device before each replay, and rows beyond the span do nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..ir.errors import DeviceError, UsageError
from ..ir.program import LIBRARY_PRODUCT, Launch, Program
from .cuda.compiler import CompiledKernel
from .cuda.driver import HostMemory
from .tables import table_values

if TYPE_CHECKING:
    from .engine import Engine

FEWEST = 8
"""Tokens from which on a chunk pays: it costs a few decode steps, however few its tokens are."""

_ALIGNMENT = 256
_SPAN_BYTES = 8


class Library(Protocol):
    """Products of halves with float32 sums, by somebody else's code (`runtime.cuda.cublas`)."""

    name: str

    def prepare(self, rows: int, tokens: int, columns: int) -> None:
        """Whatever may allocate or measure, before anything is captured."""

    def product(
        self, w: int, x: int, c: int, y: int, rows: int, tokens: int, columns: int, add: bool, up: int, stream: Any
    ) -> None:
        """Queue y[tokens, rows] = 2^up * x[tokens, columns] @ w[rows, columns].T, plus c[tokens, rows] if add.

        w, x: addresses of halves; c, y: of float32, rows without gaps.
        """

    def close(self) -> None:
        """Give everything back; nothing may be running."""


@dataclass(frozen=True)
class PrefillPlan:
    """What a Prefill is made of. library: needed by a Program with `LIBRARY_PRODUCT`s."""

    program: Program
    compiled: Mapping[str, CompiledKernel]
    library: Library | None = None


PrefillMaker = Callable[[], PrefillPlan]


class Prefill:
    """The chunk's launches on an engine's stream and memory. The engine closes it.

    engine: whose buffers of the same names are shared; its stream must exist. UsageError if one differs.
    graph: replay a captured graph, as the engine does with its step.
    """

    def __init__(self, engine: Engine, plan: PrefillPlan, graph: bool) -> None:
        self.program, self.library = plan.program, plan.library
        self.tokens = int(self.program.notes["tokens"])
        self._engine = engine
        self._address: dict[str, int] = {}
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._arena = 0
        self._graph: Any = None
        self._executable: Any = None
        self._spans: HostMemory | None = None
        try:
            self._load(plan.compiled)
            self._allocate()
            most = -(-engine.context // self.tokens) + 1  # chunks of one `feed`: only its last one is not full
            self._spans = engine.driver.host_memory(most * _SPAN_BYTES)
            for launch in self.program.launches:
                if launch.kernel == LIBRARY_PRODUCT:
                    self._of_library().prepare(*(int(arg) for arg in launch.args[4:7]))
            if self.library is not None:
                self._warm_up()
            if graph:
                self._graph, self._executable = engine.captured(self.launch_all)
        except BaseException:
            self.close()
            raise

    @property
    def device_bytes(self) -> int:
        """Device memory of its own."""
        return self._bytes

    def _load(self, compiled: Mapping[str, CompiledKernel]) -> None:
        shared = {launch.kernel: launch.shared_bytes for launch in self.program.launches}
        for name, kernel in compiled.items():
            module, function = self._engine.driver.load_kernel(kernel.image, name, shared.get(name, 0))
            self._modules.append(module)
            self._functions[name] = function

    def _allocate(self) -> None:
        offset, own, shared = 0, {}, self._engine.shared()
        for buffer in self.program.buffers:
            if buffer in shared:
                self._address[buffer.name] = shared[buffer]
            elif buffer.kind not in ("scratch", "table") and buffer.name not in ("tokens", "span"):
                raise UsageError(f"the decode step keeps no {buffer.name} as a prompt's kernels want it")
            else:
                own[buffer.name] = offset
                offset += -(-buffer.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._bytes = offset
        driver, stream = self._engine.driver, self._engine.stream
        self._arena = driver.allocate(offset, f"taking a prompt in by chunks of {self.tokens} tokens")
        driver.call("cuMemsetD8Async", self._arena, 0, offset, stream)
        self._address |= {name: self._arena + at for name, at in own.items()}
        for buffer in self.program.buffers:
            if buffer.kind == "table" and buffer.name in own:
                data = np.ascontiguousarray(table_values(buffer))
                driver.call("cuStreamSynchronize", stream)
                driver.call("cuMemcpyHtoD", self._address[buffer.name], data.ctypes.data, data.nbytes)

    def _warm_up(self) -> None:
        """A chunk of no tokens, launch after launch: a library loads its kernels when they are first used, which a
        capture does not suffer. The state stays what it is."""
        assert self._spans is not None
        driver, stream = self._engine.driver, self._engine.stream
        np.frombuffer(self._spans.view, np.int32)[:2] = (self._engine.position, 0)
        driver.call("cuMemcpyHtoDAsync", self._address["span"], self._spans.address, _SPAN_BYTES, stream)
        self.launch_all()
        driver.call("cuStreamSynchronize", stream)

    def _of_library(self) -> Library:
        if self.library is None:
            raise UsageError(f"the program {self.program.name} needs a library for its products")
        return self.library

    def queue(self, ids: int, count: int, position: int, turn: int) -> None:
        """Queue a chunk: `count` token ids from the page-locked address `ids`, which stay there until it is done, at
        `position` and after. turn: number of this chunk since the stream was last synchronized."""
        assert self._spans is not None
        engine = self._engine
        np.frombuffer(self._spans.view, np.int32)[2 * turn : 2 * turn + 2] = (position, count)
        engine.guard("cuMemcpyHtoDAsync", self._address["tokens"], ids, 4 * count, engine.stream)
        source = self._spans.address + _SPAN_BYTES * turn
        engine.guard("cuMemcpyHtoDAsync", self._address["span"], source, _SPAN_BYTES, engine.stream)
        if self._executable is not None:
            engine.guard("cuGraphLaunch", self._executable, engine.stream)
        else:
            try:
                self.launch_all()
            except DeviceError as error:  # out of memory too: half a chunk is no state to go on from
                engine.give_up(error)
                raise

    def launch_all(self) -> None:
        """Launch the chunk's kernels, one after the other."""
        for launch in self.program.launches:
            self.launch(launch)

    def launch(self, launch: Launch) -> None:
        """Launch one of them."""
        stream = self._engine.stream
        if launch.kernel == LIBRARY_PRODUCT:
            w, x, c, y = (self._address[str(arg)] for arg in launch.args[:4])
            rows, tokens, columns, add, up = (int(arg) for arg in launch.args[4:])
            self._of_library().product(w, x, c, y, rows, tokens, columns, bool(add), up, stream)
            return
        args = [
            (self._address[arg], ctypes.c_void_p) if isinstance(arg, str) else (arg, ctypes.c_int)
            for arg in launch.args
        ]
        function = self._functions[launch.kernel]
        self._engine.driver.launch(function, launch.grid, launch.block, launch.shared_bytes, stream, args)

    def close(self) -> None:
        """Free everything; nothing of it may be running. A failure while freeing is not reported."""
        api = self._engine.driver.api
        if self._executable is not None:
            api.cuGraphExecDestroy(self._executable)
        if self._graph is not None:
            api.cuGraphDestroy(self._graph)
        if self._spans is not None:
            self._spans.close()
        if self._arena:
            api.cuMemFree(self._arena)
        for module in self._modules:
            api.cuModuleUnload(module)
        if self.library is not None:
            self.library.close()
        self._executable = self._graph = self._spans = self.library = None
        self._modules, self._arena = [], 0
