"""A model on a GPU: prompts taken in, tokens chosen, one decode step replayed for each.

Tokens, positions, stop flags and the log of chosen tokens live on the device, and the host queues replays ahead:
it learns tokens in chunks, copied behind the step that made them. A prompt goes in by chunks, a step of many rows each:
its tokens, their positions and how many they are are copied to the device before each replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ir.errors import DeviceError, OutOfMemoryError, UnsupportedModelError, UsageError
from ..ir.program import DECODE, PREFILL, Launch, LibraryProduct, Program
from .cuda.compiler import CompiledKernel
from .cuda.driver import Driver, HostMemory
from .decode import Spare, checked, replayed
from .half_range import check_half_range, not_held
from .library import Library
from .measuring import Timings, read_bandwidth, step_times
from .program import LoadedProgram
from .stream import Stream
from .tables import end_token_slots
from .upload import WeightSource, upload_weights

CHUNK = 16  # tokens that the host fetches at once; two chunks are queued ahead
FEWEST = 8
"""Tokens from which on a chunk of a prompt pays: it costs a few decode steps, however few its tokens are."""


@dataclass(frozen=True)
class PrefillPlan:
    """A Program that has the step `prefill` beside the engine's own, compiled, and the library that it needs."""

    program: Program
    compiled: Mapping[str, CompiledKernel]
    library: Library | None = None


PrefillMaker = Callable[[Program, Mapping[str, CompiledKernel]], PrefillPlan]


@dataclass
class Engine:
    """Runs a Program. Close it, or use it in a `with` statement.

    graph: replay a captured CUDA graph (True) or launch kernel after kernel (False).
    constants: arrays for the program's constants beside `end_tokens`, by name (`set_constant`);
    UsageError names one that is missing.
    prefill: makes what takes a prompt in by chunks, of the engine's program and its kernels, called for the first
    prompt or by `prepare_prefill`; None: every token takes a step. Where it raises UnsupportedModelError or memory is
    short, prompts take steps too, and `prefill_way` says why; unless must_prefill says what was asked for, and the
    error names it.
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
        self.position = 0
        self._no_prefill = "" if self.prefill else "switched off"
        self._prefill_maker = self.prefill
        self._beyond: tuple[HostMemory, Any] | None = None  # the chunks' word, and when it has come
        self._stream = Stream(self.driver)
        self._spare: dict[int, Spare] = {}  # by tokens of a chunk
        self._loaded = LoadedProgram(self._stream, self.graph)
        try:
            self._load()
            self._ids = self._stream.pinned(self.context * 4)
            self._numbers = self._stream.pinned(4 * (self.context + 1))  # 0, 1, 2, ...: positions, and counts of rows
            np.frombuffer(self._numbers.view, np.int32)[:] = np.arange(self.context + 1)
            self._logits: HostMemory | None = None
            if self.has_logits:
                self._logits = self._stream.pinned(self.program.buffer(self._result("logits")).nbytes)
            started = time.perf_counter()
            self._loaded.capture(DECODE)
            self.timings.capture_s = time.perf_counter() - started
            self.reset()
        except BaseException:
            self.close()
            raise

    def _load(self) -> None:
        cache = sum(b.nbytes for b in self.program.buffers if b.kind == "state")
        what = f"this model with a context of {self.context} tokens ({cache / 2**20:,.0f} MiB of it KV cache)"
        started = time.perf_counter()
        self._loaded.load(self.program, self.compiled, what)
        self.timings.modules_s = time.perf_counter() - started
        started = time.perf_counter()
        given = {"end_tokens": end_token_slots(self.end_tokens), **self.constants}
        for buffer in self.program.buffers:
            if buffer.kind == "constant":
                if buffer.source not in given:
                    raise UsageError(f"the program {self.program.name} needs the constant {buffer.source}")
                self.set_constant(buffer.source, given[buffer.source])
        self.timings.bytes_loaded = upload_weights(self._loaded, self.program, self.source, self.progress)
        self.timings.load_s = time.perf_counter() - started

    # --- prompts ---

    def prepare_prefill(self) -> bool:
        """Whether prompts go in by chunks (`prefill_way` says why not); what they need is made now if it was not yet.

        With must_prefill UnsupportedModelError or OutOfMemoryError instead of False.
        """
        self._stream.check()
        if not self._no_prefill and self.prefill is not None:
            maker, self.prefill = self.prefill, None
            try:
                self._add_prefill(maker(self.program, self.compiled))
            except (UnsupportedModelError, OutOfMemoryError) as error:
                if self.must_prefill:
                    self.prefill = maker  # asked again, it must not fall back either
                    raise type(error)(
                        f"{self.must_prefill}: {error}; auto or off takes prompts token by token"
                    ) from None
                self._no_prefill = str(error)
            except DeviceError as error:
                self._stream.give_up(error)
                raise
        return not self._no_prefill

    def _add_prefill(self, plan: PrefillPlan) -> None:
        """Load the plan's step; whatever fails, the engine stays as it was."""
        loaded, before, compiled = self._loaded, self.program, self.compiled
        step = plan.program.step(PREFILL)
        try:
            for launch in step.launches:
                if isinstance(launch, LibraryProduct):
                    if plan.library is None:
                        raise UsageError(f"the program {plan.program.name} needs a library for its products")
                    plan.library.prepare(launch.rows, launch.tokens, launch.columns)
            loaded.load(plan.program, plan.compiled, f"taking a prompt in by chunks of {step.rows} tokens")
            loaded.library = plan.library
            try:
                if plan.library is not None:
                    # A chunk of no tokens: a library loads its kernels when they are first used, which a capture does
                    # not suffer.
                    self._copy_numbers(f"{PREFILL}.count", 0, 1)
                    loaded.launch_all(step)
                    self.synchronize()
                check_half_range(loaded, plan.program)
                self.clear(f"{PREFILL}.beyond")
                loaded.capture(PREFILL)
            except BaseException:
                loaded.library = None
                loaded.load(before, compiled, "")
                raise
        except BaseException:
            if plan.library is not None:
                plan.library.close()
            raise
        self.program, self.compiled = plan.program, dict(plan.compiled)

    @property
    def chunked(self) -> bool:
        """Whether long prompts go in by chunks, as far as is known."""
        return not self._no_prefill

    @property
    def prefill_way(self) -> str:
        """How long prompts go in, in words."""
        if self._no_prefill:
            return f"token by token: {self._no_prefill}"
        if self.prefill is not None:
            return "by chunks, from the first prompt on"
        by = self._loaded.library.name if self._loaded.library else "own kernels"
        return f"{by}, {self.program.step(PREFILL).rows} tokens at once"

    def _copy_numbers(self, buffer: str, first: int, count: int) -> None:
        """Queue first, first + 1, ... into a buffer of integers."""
        self._copy(buffer, self._numbers.address + 4 * first, 4 * count)

    def _copy(self, buffer: str, source: int, nbytes: int) -> None:
        address = self._loaded.memory.address(buffer)
        self._stream.call("cuMemcpyHtoDAsync", address, source, nbytes, self._stream.handle)

    def _take_in(self, count: int) -> int:
        """Queue chunks for the first of `count` page-locked ids; how many they take."""
        if count < FEWEST or not self.prepare_prefill():
            return 0
        taken, rows = 0, self.program.step(PREFILL).rows
        while count - taken >= FEWEST:
            size = min(rows, count - taken)
            self._copy(f"{PREFILL}.tokens", self._ids.address + 4 * taken, 4 * size)
            self._copy_numbers(f"{PREFILL}.positions", self.position, size)
            self._copy_numbers(f"{PREFILL}.count", size, 1)
            self._loaded.run(PREFILL)
            self.position += size
            taken += size
        self._copy_numbers("positions", self.position, 1)
        told = self._loaded.memory.buffer(f"{PREFILL}.beyond")
        if self._beyond is None or len(self._beyond[0].view) != told.nbytes:
            self._beyond = self._stream.pinned(told.nbytes), self._stream.event()
        memory, copied = self._beyond
        source = self._loaded.memory.address(told.name)
        self._stream.call("cuMemcpyDtoHAsync", memory.address, source, told.nbytes, self._stream.handle)
        self._stream.call("cuEventRecord", copied, self._stream.handle)
        return taken

    def _not_held_by_halves(self) -> str:
        """What the chunks that were queued last met that halves do not hold, "" for nothing. Waits for them, and not
        for the step behind them, so that the device never does."""
        assert self._beyond is not None
        memory, copied = self._beyond
        self._stream.call("cuEventSynchronize", copied)
        return not_held(np.frombuffer(memory.view, np.uint32))

    def _take_steps(self, ids: Sequence[int], what: str) -> None:
        """Instead of chunks that met what halves do not hold: the same ids, and all prompts from here on, by steps.

        With must_prefill UnsupportedModelError, and the engine is where it was before.
        """
        self.rewind(self.position - len(ids))
        if self.must_prefill:
            raise UnsupportedModelError(f"{self.must_prefill}: {what}; auto or off takes prompts token by token")
        self._no_prefill = what
        self.feed(ids)

    # --- state ---

    @property
    def has_logits(self) -> bool:
        """Whether the program leaves the logits of each step in memory."""
        return any(name == "logits" for name, _ in self.program.step().results)

    def _result(self, name: str) -> str:
        return dict(self.program.step().results)[name]

    @property
    def arena_bytes(self) -> int:
        """Device memory of the program's buffers."""
        return self._loaded.memory.nbytes

    @property
    def stream(self) -> Stream:
        """What everything is queued on."""
        return self._stream

    def reset(self) -> None:
        """Back to position 0; the cache's old contents are never read again."""
        self._stream.check()
        for state in ("tokens", "positions", "stop"):
            self.clear(state)
        self.synchronize()
        self.position = 0

    def set_constant(self, name: str, values: np.ndarray) -> None:
        """Queue new contents of a constant: steps queued before this see the old ones, later steps the new.

        UsageError for a name that is no constant of the program, another shape or another element type.
        """
        self._stream.check()
        self._loaded.memory.set_constant(name, values)

    def rewind(self, position: int) -> None:
        """Back to an earlier position: what the caches hold before it stays, the rest is never read again.

        Go on with `feed`. UsageError for a position that was not reached.
        """
        self._stream.check()
        if not 0 <= position <= self.position:
            raise UsageError(f"position {position} was not reached; positions are 0 to {self.position}")
        self.reset()
        if position:
            self._copy_numbers("positions", position, 1)
            self.position = position

    def synchronize(self) -> None:
        """Wait for everything queued."""
        self._stream.synchronize()

    def step(self) -> None:
        """Queue one decode step; it reads `tokens` and `positions` on the device."""
        self._stream.check()
        if self.position >= self.context:
            raise UsageError(f"the context of {self.context} tokens is full; give a larger --ctx")
        self._loaded.run(DECODE)
        self.position += 1

    def launch(self, launch: Launch | LibraryProduct) -> None:
        """Queue one launch of a step alone."""
        self._loaded.launch(launch)

    def feed(self, ids: Sequence[int], on_step: Callable[[int], None] | None = None) -> None:
        """Take ids in: by chunks where there is a prefill, and by a step for the last id and where ids are few.

        The last step's choice is the first generated token. on_step(index) is called after each step is queued; with it
        every id takes a step.
        """
        self._stream.check()
        if self.position + len(ids) > self.context:
            raise UsageError(
                f"{len(ids)} tokens from position {self.position} exceed the context of {self.context}; "
                "give a larger --ctx"
            )
        self.synchronize()  # the page-locked ids of an earlier feed may still be in use
        view = np.frombuffer(self._ids.view, dtype=np.int32)
        view[: len(ids)] = ids
        taken = 0 if on_step else self._take_in(len(ids) - 1)
        for index in range(taken, len(ids)):
            self._copy("tokens", self._ids.address + 4 * index, 4)
            self.step()
            if on_step:
                on_step(index)
        if taken:
            self.clear(f"{PREFILL}.beyond")  # for the next prompt, behind what this one's first token waits for
            if what := self._not_held_by_halves():
                self._take_steps(ids, what)

    def logits(self) -> np.ndarray:
        """Logits of the last step, float32[vocabulary]; waits for it."""
        return self.logits_view().copy()

    def logits_view(self) -> np.ndarray:
        """The same where they came to the host, read-only: the next call overwrites it, closing frees it."""
        self._stream.check()
        if self._logits is None:
            raise UsageError("this engine was built without logits")
        memory, name = self._loaded.memory, self._result("logits")
        nbytes = memory.buffer(name).nbytes
        self._stream.call("cuMemcpyDtoHAsync", self._logits.address, memory.address(name), nbytes, self._stream.handle)
        self.synchronize()
        view = np.frombuffer(self._logits.view, dtype=np.float32)
        view.flags.writeable = False
        return view

    def forced_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`, float32[len(ids), vocabulary], the ids given, not chosen."""
        found = np.empty((len(ids), len(self.logits_view())), np.float32)
        self.feed(ids, lambda index: np.copyto(found[index], self.logits_view()))
        return found

    def chosen(self) -> int:
        """The token that the last step chose; waits for it. ModelFileError as `decode`."""
        out = np.empty(1, np.int32)
        self.synchronize()
        last = self.position - 1
        self._stream.call("cuMemcpyDtoH", out.ctypes.data, self._loaded.memory.address("log") + 4 * last, out.nbytes)
        return next(checked(out.tolist(), last))[0]

    def decode(self, count: int, chunk: int = CHUNK) -> Iterator[list[int]]:
        """`count` tokens in chunks, the first of them chosen by the step already queued by `feed`.

        Replays are queued ahead: while the host handles one chunk, the GPU is busy with
        the next two. UsageError if the context cannot hold them, ModelFileError, behind the tokens before it, for a
        step whose logits are not finite numbers.
        """
        self._stream.check()
        if self.position + count - 1 > self.context:
            raise UsageError(
                f"{count} tokens after {self.position} exceed the context of {self.context}; give a larger --ctx"
            )
        spare = self._spare.setdefault(chunk, [])
        log, position = self._loaded.memory.address("log"), self.position - 1
        yield from replayed(self._stream, self.step, log, position, count, chunk, spare)

    # --- measuring ---

    def adopt(self, program: Program, compiled: Mapping[str, CompiledKernel]) -> None:
        """Run another Program over the same memory: other kernels and launches, perhaps more scratch.

        Weights lie the same whatever the launch shapes are, so that tuning loads them once. Where it takes no prompts
        in, that is made anew for the next one. UsageError if a buffer that holds something differs.
        """
        self.synchronize()
        try:
            self._loaded.load(program, compiled, "scratch memory of another program")
            for step in self.program.steps:
                self._loaded.forget(step.name)
            for step in program.steps:
                self._loaded.capture(step.name)
        except DeviceError as error:  # out of memory too: neither program is whole
            self._stream.give_up(error)
            raise
        self.program, self.compiled = program, dict(compiled)
        if all(step.name != PREFILL for step in program.steps):
            self.prefill = self._prefill_maker
            self._loaded.close_library()

    def read(self, name: str) -> np.ndarray:
        """The bytes of a buffer, uint8; waits for everything queued."""
        self._stream.check()
        return self._loaded.memory.read(name)

    def clear(self, name: str) -> None:
        """Zero a buffer, in order with the steps."""
        self._stream.check()
        self._loaded.memory.clear(name)

    def read_bandwidth(self, repeats: int = 5) -> float:
        """Bytes per second that plain loads read from the weights' memory; the median of `repeats`."""
        return read_bandwidth(self._loaded, self.program, repeats)

    def step_times(self, count: int) -> np.ndarray:
        """Microseconds of `count` further steps, one event between each; float64[count]."""
        return step_times(self._stream, self.step, count)

    def chunk_times(self, ids: Sequence[int], count: int, position: int = 0) -> np.ndarray:
        """Microseconds of taking in the same ids at a position `count` times, at most a chunk's rows; float64[count].

        UsageError where prompts do not go in by chunks, or beyond the context. The engine is at position 0 afterwards.
        """
        if not self.prepare_prefill() or len(ids) > self.program.step(PREFILL).rows:
            raise UsageError(f"{len(ids)} tokens do not go in by one chunk: {self.prefill_way}")
        if position + len(ids) > self.context:
            raise UsageError(f"{len(ids)} tokens from position {position} exceed the context of {self.context}")
        self.reset()
        np.frombuffer(self._ids.view, dtype=np.int32)[: len(ids)] = ids
        self._copy(f"{PREFILL}.tokens", self._ids.address, 4 * len(ids))
        self._copy_numbers(f"{PREFILL}.positions", position, len(ids))
        self._copy_numbers(f"{PREFILL}.count", len(ids), 1)
        times = step_times(self._stream, lambda: self._loaded.run(PREFILL), count)
        self.clear(f"{PREFILL}.beyond")
        return times

    # --- ending ---

    def close(self) -> None:
        """Wait, then free everything; a failure while freeing is not reported again. A forked child frees nothing."""
        if self.driver.forked:
            return
        self._stream.settle()  # never destroy a graph that is running
        self._loaded.close()
        self._stream.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
