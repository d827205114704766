"""A Program on a GPU: memory, modules, the captured step, and the decode loop.

The step is captured once as a CUDA graph and replayed per token. Token, position, stop
flag and the log of chosen tokens live on the device, and the host queues replays ahead:
it learns tokens in chunks, copied behind the step that made them.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import DeviceError, OutOfMemoryError, UnsupportedModelError, UsageError
from ..ir.program import Buffer, Launch, Program
from .cuda.compiler import CompiledKernel
from .cuda.driver import Driver, HostMemory
from .measuring import PROBE, Timings, read_bandwidth, step_times
from .prefill import FEWEST, Prefill, PrefillMaker
from .replay import captured, replayed
from .tables import end_token_slots, table_values
from .upload import WeightSource, upload_weights

ALIGNMENT = 256
CHUNK = 16  # tokens that the host fetches at once; two chunks are queued ahead


@dataclass
class Engine:
    """Runs a Program. Close it, or use it in a `with` statement.

    graph: replay a captured CUDA graph (True) or launch kernel after kernel (False).
    constants: arrays for the program's constants beside `end_tokens`, by name (`set_constant`);
    UsageError names one that is missing.
    prefill: makes what takes a prompt in by chunks, called for the first prompt or by `prepare_prefill`; None: every
    token takes a step. Where it raises UnsupportedModelError or memory is short, prompts take steps too, and
    `prefill_way` says why; unless must_prefill says what was asked for, and the error names it.
    """

    driver: Driver
    program: Program
    compiled: dict[str, CompiledKernel]
    source: WeightSource
    end_tokens: Sequence[int] = ()
    graph: bool = True
    progress: Callable[[int, int], None] | None = None
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    prefill: PrefillMaker | None = None
    must_prefill: str = ""

    def __post_init__(self) -> None:
        self.context = int(self.program.notes["context"])
        self._address: dict[str, int] = {}
        self._functions: dict[str, Any] = {}
        self._modules: list[Any] = []
        self._host: list[HostMemory] = []
        self._events: list[Any] = []
        self._extra: list[int] = []
        self._staged: dict[str, tuple[HostMemory, Any]] = {}
        self._arena = 0
        self._stream: Any = None
        self._graph: Any = None
        self._executable: Any = None
        self._failed = ""  # the failure after which nothing can be trusted
        self._prefill: Prefill | None = None
        self._no_prefill = "" if self.prefill else "switched off"
        self.position = 0
        try:
            self._stream = self.driver.call("cuStreamCreate", 1)
            self._load_modules()
            self._allocate()
            self._fill()
            self._ids = self.pinned(self.context * 4)
            self._logits = self.pinned(self.program.buffer(self._result("logits")).nbytes) if self.has_logits else None
            if self.graph:
                self._capture()
            self.reset()
        except BaseException:
            self.close()
            raise

    # --- building ---

    def _load_modules(self) -> None:
        started = time.perf_counter()
        needs: dict[str, tuple[int, int]] = {}
        for launch in self.program.launches:  # one kernel may be launched with more shared memory than elsewhere
            shared, cluster = needs.get(launch.kernel, (0, 1))
            needs[launch.kernel] = (max(shared, launch.shared_bytes), max(cluster, launch.cluster))
        for name, kernel in self.compiled.items():
            module, function = self.driver.load_kernel(kernel.image, name, *needs.get(name, (0, 1)))
            self._modules.append(module)
            self._functions[name] = function
        self.timings.modules_s = time.perf_counter() - started

    def _allocate(self) -> None:
        offset = 0
        offsets = {}
        for buffer in self.program.buffers:
            offsets[buffer.name] = offset
            offset += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
        self.arena_bytes = offset
        cache = sum(b.nbytes for b in self.program.buffers if b.kind == "state")
        what = f"this model with a context of {self.context} tokens ({cache / 2**20:,.0f} MiB of it KV cache)"
        self._arena = self.driver.allocate(offset, what)
        self._address = {name: self._arena + at for name, at in offsets.items()}

    def _fill(self) -> None:
        started = time.perf_counter()
        call, stream = self.driver.call, self._stream
        for buffer in self.program.buffers:
            if buffer.zeroed:
                call("cuMemsetD8Async", self._address[buffer.name], 0, buffer.nbytes, stream)
            elif buffer.kind == "table":
                self._write(buffer.name, table_values(buffer))
        given = {"end_tokens": end_token_slots(self.end_tokens), **self.constants}
        for buffer in self.program.buffers:
            if buffer.kind == "constant":
                if buffer.source not in given:
                    raise UsageError(f"the program {self.program.name} needs the constant {buffer.source}")
                self.set_constant(buffer.source, given[buffer.source])
        self.timings.bytes_loaded = upload_weights(
            self.driver, stream, self.program, self._functions, self._address, self.source, self.progress
        )
        self.timings.load_s = time.perf_counter() - started

    def _write(self, buffer: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values)
        self._guard("cuMemcpyHtoD", self._address[buffer], data.ctypes.data, data.nbytes)

    def pinned(self, nbytes: int) -> HostMemory:
        """Page-locked memory until the engine is closed."""
        memory: HostMemory = self._guarded(self.driver.host_memory, nbytes)
        self._host.append(memory)
        return memory

    def event(self) -> Any:
        """An event until the engine is closed."""
        event = self._guard("cuEventCreate", 0)
        self._events.append(event)
        return event

    def _capture(self) -> None:
        started = time.perf_counter()
        self._graph, self._executable = self.captured(self._launch_all)
        self.timings.capture_s = time.perf_counter() - started

    def captured(self, launch_all: Callable[[], None]) -> tuple[Any, Any]:
        """What the function queues as a graph, and that graph ready for replay."""
        return captured(self.driver, self._stream, launch_all)

    # --- for a prompt's chunks ---

    @property
    def stream(self) -> Any:
        """The stream that everything is queued on."""
        return self._stream

    def address(self, name: str) -> int:
        """Where a buffer of the Program lies on the device."""
        return self._address[name]

    def guard(self, name: str, *args: Any) -> Any:
        """A driver call after whose failure the engine refuses everything."""
        return self._guard(name, *args)

    def give_up(self, error: DeviceError) -> None:
        """Refuse everything from here on."""
        self._failed = self._failed or str(error)

    def shared(self) -> dict[Buffer, int]:
        """Where the step keeps what is no scratch memory."""
        return {buffer: self._address[buffer.name] for buffer in self.program.buffers if buffer.kind != "scratch"}

    def prepare_prefill(self) -> Prefill | None:
        """What takes prompts in by chunks, made now if it was not yet; None where there is none (`prefill_way`).

        With must_prefill UnsupportedModelError or OutOfMemoryError instead of None.
        """
        if self._prefill is None and self.prefill is not None:
            self._check()
            maker, self.prefill = self.prefill, None
            try:
                self._prefill = Prefill(self, maker(), self.graph)
            except (UnsupportedModelError, OutOfMemoryError) as error:
                if self.must_prefill:
                    self.prefill = maker  # asked again, it must not fall back either
                    raise type(error)(
                        f"{self.must_prefill}: {error}; auto or off takes prompts token by token"
                    ) from None
                self._no_prefill = str(error)
            except DeviceError as error:
                self._failed = self._failed or str(error)
                raise
        return self._prefill

    @property
    def chunked(self) -> bool:
        """Whether long prompts go in by chunks, as far as is known."""
        return not self._no_prefill

    @property
    def prefill_way(self) -> str:
        """How long prompts go in, in words."""
        if self._no_prefill:
            return f"token by token: {self._no_prefill}"
        if self._prefill is None:
            return "by chunks, from the first prompt on"
        by = self._prefill.library.name if self._prefill.library else "own kernels"
        return f"{by}, {self._prefill.tokens} tokens at once"

    def _take_in(self, count: int) -> int:
        """Queue chunks for the first of `count` page-locked ids; how many they take."""
        prefill = self.prepare_prefill() if count >= FEWEST else None
        taken = turn = 0
        while prefill is not None and count - taken >= FEWEST:
            size = min(prefill.tokens, count - taken)
            prefill.queue(self._ids.address + 4 * taken, size, self.position, turn)
            self.position += size
            taken, turn = taken + size, turn + 1
        return taken

    def _launch_all(self) -> None:
        for launch in self.program.launches:
            self.launch(launch)

    def launch(self, launch: Launch) -> None:
        """Launch one kernel of the step on the engine's stream."""
        self._check()
        args = [
            (self._address[arg], ctypes.c_void_p) if isinstance(arg, str) else (arg, ctypes.c_int)
            for arg in launch.args
        ]
        try:
            self.driver.launch(
                self._functions[launch.kernel],
                launch.grid,
                launch.block,
                launch.shared_bytes,
                self._stream,
                args,
                launch.programmatic,
                launch.cluster,
            )
        except DeviceError as error:  # out of memory too: half a step is no state to go on from
            self._failed = str(error)
            raise

    # --- state ---

    @property
    def has_logits(self) -> bool:
        """Whether the program leaves the logits of each step in memory."""
        return any(name == "logits" for name, _ in self.program.results)

    def _result(self, name: str) -> str:
        return dict(self.program.results)[name]

    def reset(self) -> None:
        """Back to position 0; the cache's old contents are never read again."""
        self._check()
        for state in ("token", "position", "stop"):
            self._guard("cuMemsetD8Async", self._address[state], 0, 4, self._stream)
        self.synchronize()
        self.position = 0

    def set_constant(self, name: str, values: np.ndarray) -> None:
        """Queue new contents of a constant: steps queued before this see the old ones, later steps the new.

        UsageError for a name that is no constant of the program, another shape or another element type.
        """
        buffer = next((b for b in self.program.buffers if b.kind == "constant" and b.source == name), None)
        if buffer is None:
            known = ", ".join(b.source for b in self.program.buffers if b.kind == "constant")
            raise UsageError(f"the program {self.program.name} has no constant {name}; it has {known}")
        data = np.ascontiguousarray(values)
        wanted = np.dtype({"i32": np.int32, "f32": np.float32, "f16": np.float16}[buffer.dtype])
        if data.shape != buffer.shape or data.dtype != wanted:
            raise UsageError(f"the constant {name} is {wanted}{list(buffer.shape)}, not {data.dtype}{list(data.shape)}")
        if name not in self._staged:
            self._staged[name] = (self.pinned(buffer.nbytes), self.event())
        memory, copied = self._staged[name]
        self._guard("cuEventSynchronize", copied)  # the copy of the contents before may still be under way
        memory.view[:] = data.tobytes()
        self._guard("cuMemcpyHtoDAsync", self._address[buffer.name], memory.address, buffer.nbytes, self._stream)
        self._guard("cuEventRecord", copied, self._stream)

    def rewind(self, position: int) -> None:
        """Back to an earlier position: what the caches hold before it stays, the rest is never read again.

        Go on with `feed`. UsageError for a position that was not reached.
        """
        if not 0 <= position <= self.position:
            raise UsageError(f"position {position} was not reached; positions are 0 to {self.position}")
        self.reset()
        if position:
            self._write("position", np.array([position], np.int32))
            self.position = position

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._guard("cuStreamSynchronize", self._stream)

    def _check(self) -> None:
        if self._failed:
            raise DeviceError(f"the GPU failed earlier in this process: {self._failed}")
        if self._stream is None:
            raise UsageError("this engine is closed; open another")

    def _guard(self, name: str, *args: Any) -> Any:
        """A call after which a failure leaves nothing that can be trusted: whatever follows is refused at once."""
        return self._guarded(self.driver.call, name, *args)

    def _guarded(self, function: Callable[..., Any], *args: Any) -> Any:
        self._check()
        try:
            return function(*args)
        except OutOfMemoryError:
            raise
        except DeviceError as error:
            self._failed = str(error)
            raise

    def step(self) -> None:
        """Queue one decode step; it reads `token` and `position` on the device."""
        if self.position >= self.context:
            raise UsageError(f"the context of {self.context} tokens is full; give a larger --ctx")
        if self._executable is not None:
            self._guard("cuGraphLaunch", self._executable, self._stream)
        else:
            self._launch_all()
        self.position += 1

    def feed(self, ids: Sequence[int], on_step: Callable[[int], None] | None = None) -> None:
        """Take ids in: by chunks where there is a prefill, and by a step for the last id and where ids are few.

        The last step's choice is the first generated token. on_step(index) is called after each step is queued; with it
        every id takes a step.
        """
        self._check()
        if self.position + len(ids) > self.context:
            raise UsageError(
                f"{len(ids)} tokens from position {self.position} exceed the context of {self.context}; "
                "give a larger --ctx"
            )
        self.synchronize()  # the page-locked ids of an earlier feed may still be in use
        view = np.frombuffer(self._ids.view, dtype=np.int32)
        view[: len(ids)] = ids
        for index in range(0 if on_step else self._take_in(len(ids) - 1), len(ids)):
            source = self._ids.address + 4 * index
            self._guard("cuMemcpyHtoDAsync", self._address["token"], source, 4, self._stream)
            self.step()
            if on_step:
                on_step(index)

    def logits(self) -> np.ndarray:
        """Logits of the last step, float32[vocabulary]; waits for it."""
        if self._logits is None:
            raise UsageError("this engine was built without logits")
        name = self._result("logits")
        nbytes = self.program.buffer(name).nbytes
        self._guard("cuMemcpyDtoHAsync", self._logits.address, self._address[name], nbytes, self._stream)
        self.synchronize()
        return np.frombuffer(self._logits.view, dtype=np.float32).copy()

    def forced_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`, float32[len(ids), vocabulary], the ids given, not chosen."""
        rows: list[np.ndarray] = []
        self.feed(ids, lambda _: rows.append(self.logits()))
        return np.stack(rows)

    def chosen(self) -> int:
        """The token that the last step chose; waits for it."""
        return int(self._fetch_log(self.position - 1, 1)[0])

    def _fetch_log(self, first: int, count: int) -> np.ndarray:
        out = np.empty(count, np.int32)
        self.synchronize()
        self._guard("cuMemcpyDtoH", out.ctypes.data, self._address["log"] + 4 * first, out.nbytes)
        return out

    # --- decoding ---

    def decode(self, count: int, chunk: int = CHUNK) -> Iterator[list[int]]:
        """`count` tokens in chunks, the first of them chosen by the step already queued by `feed`.

        Replays are queued ahead: while the host handles one chunk, the GPU is busy with
        the next two. UsageError if the context cannot hold them.
        """
        self._check()
        if self.position + count - 1 > self.context:
            raise UsageError(
                f"{count} tokens after {self.position} exceed the context of {self.context}; give a larger --ctx"
            )
        yield from replayed(self, count, chunk)

    # --- measuring ---

    def adopt(self, program: Program, compiled: dict[str, CompiledKernel]) -> None:
        """Run another Program over the same memory: other kernels and launches, perhaps more scratch.

        Weights lie the same whatever the launch shapes are, so that tuning loads them once.
        UsageError if a buffer that holds something differs.
        """
        self._check()
        known = {buffer.name: buffer for buffer in self.program.buffers}
        for buffer in program.buffers:
            if buffer.kind != "scratch" and known.get(buffer.name) != buffer:
                raise UsageError(f"the other program keeps {buffer.name} differently; open a new engine")
        self.synchronize()
        try:
            self._exchange(program, compiled, known)
        except DeviceError as error:  # out of memory too: neither program is whole
            self._failed = self._failed or str(error)
            raise

    def _exchange(self, program: Program, compiled: dict[str, CompiledKernel], known: dict[str, Buffer]) -> None:
        for buffer in program.buffers:
            if known.get(buffer.name) != buffer:
                address = self.driver.allocate(buffer.nbytes, "scratch memory of another program")
                self._extra.append(address)
                self._address[buffer.name] = address
                self.driver.call("cuMemsetD8Async", address, 0, buffer.nbytes, self._stream)
        if self._executable is not None:
            self.driver.call("cuGraphExecDestroy", self._executable)
            self._executable = None
            self.driver.call("cuGraphDestroy", self._graph)
            self._graph = None
        self._functions = {}
        while self._modules:
            self.driver.call("cuModuleUnload", self._modules.pop())
        self.program, self.compiled = program, compiled
        self._load_modules()
        if self.graph:
            self._capture()

    def read(self, name: str) -> np.ndarray:
        """The bytes of a buffer, uint8; waits for everything queued."""
        out = np.empty(self.program.buffer(name).nbytes, np.uint8)
        self.synchronize()
        self._guard("cuMemcpyDtoH", out.ctypes.data, self._address[name], out.nbytes)
        return out

    def clear(self, name: str) -> None:
        """Zero a buffer, in order with the steps."""
        nbytes = self.program.buffer(name).nbytes
        self._guard("cuMemsetD8Async", self._address[name], 0, nbytes, self._stream)

    def read_bandwidth(self, repeats: int = 5) -> float:
        """Bytes per second that plain loads read from the weights' memory; the median of `repeats`."""
        return read_bandwidth(self, self._functions[PROBE], repeats)

    def step_times(self, count: int) -> np.ndarray:
        """Microseconds of `count` further steps, one event between each; float64[count]."""
        return step_times(self, count)

    # --- ending ---

    def close(self) -> None:
        """Wait, then free everything; a failure while freeing is not reported again."""
        api = self.driver.api
        if self._stream is not None:
            api.cuStreamSynchronize(self._stream)  # never destroy a graph that is running
        if self._prefill is not None:
            self._prefill.close()
            self._prefill = None
        if self._executable is not None:
            api.cuGraphExecDestroy(self._executable)
        if self._graph is not None:
            api.cuGraphDestroy(self._graph)
        for event in self._events:
            api.cuEventDestroy(event)
        for memory in self._host:
            memory.close()
        for address in (self._arena, *self._extra):
            if address:
                api.cuMemFree(address)
        for module in self._modules:
            api.cuModuleUnload(module)
        if self._stream is not None:
            api.cuStreamDestroy(self._stream)
        self._executable = self._graph = self._stream = None
        self._events, self._host, self._modules, self._extra, self._arena = [], [], [], [], 0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
