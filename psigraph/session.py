"""One model, ready to decode, wherever it runs: on a GPU, on the stand-in driver, or in numpy.

with open_session("model.gguf", SessionOptions("cuda", ctx=8192)) as session:
    session.feed([151644])
    for tokens in session.decode(64):
        ...
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import ending, gpu_start
from .arguments import first_that_is_not_whole
from .bench.report import ENGINES
from .bench.tuned import load_tuned
from .build import Model, fuse, open_model
from .codegen.lower import lower
from .codegen.target import arch_of_capability, stand_in_target, target_for
from .gpu_choice import settled, tell_of_numpy
from .gpu_start import GPU_BACKENDS, GpuStart
from .ir.errors import UsageError
from .ir.graph import Graph
from .ir.program import Program
from .ir.spec.model import check_cache_type
from .ir.types import CACHE_DTYPES
from .options import DEFAULTS, Progress, SessionOptions
from .passes.use_sampler import SAMPLER
from .prefill import EXPLICIT, check_prefill, prefill_maker
from .runtime.cuda.kernel_cache import KernelCache, default_cache_dir
from .runtime.engine import FEWEST
from .runtime.tables import END_TOKEN_SLOTS
from .text.sampler import SamplerSettings

if TYPE_CHECKING:
    from .runtime.cuda.driver import DeviceFacts, Driver

BACKENDS = ("auto", "cuda", "host", "cpu")


class DecodeEngine(Protocol):
    """What `runtime.engine.Engine` and `numpy_path.NumpyEngine` have in common; both document it."""

    context: int
    position: int
    timings: Any

    @property
    def has_logits(self) -> bool: ...
    @property
    def chunked(self) -> bool: ...
    @property
    def prefill_way(self) -> str: ...

    def reset(self) -> None: ...
    def rewind(self, position: int) -> None: ...
    def synchronize(self) -> None: ...
    def feed(self, ids: Sequence[int], on_step: Callable[[int], None] | None = None) -> None: ...
    def decode(self, count: int, chunk: int = ...) -> Iterator[list[int]]: ...
    def chosen(self) -> int: ...
    def logits(self) -> np.ndarray: ...
    def logits_view(self) -> np.ndarray: ...
    def forced_logits(self, ids: Sequence[int]) -> np.ndarray: ...
    def step_times(self, count: int) -> np.ndarray: ...
    def set_constant(self, name: str, values: np.ndarray) -> None: ...
    def close(self) -> None: ...


@dataclass
class Session:
    """A loaded model. Made by `open_session`; close it, or use it in a `with` statement. One that nobody refers to
    closes itself. Any thread may use it, but one at a time (`psigraph.text.turns`).

    backend    "cuda", "host" or "cpu": what it runs on, never "auto".
    program    what the GPU or the stand-in runs; None in numpy.
    facts      for reports: where it runs and in what arithmetic.
    timings    milliseconds of open_ms, driver_ms, fuse_ms, compile_ms, load_ms, modules_ms, capture_ms and, once a
               prompt is expected, prefill_ms; counts of kernels and of those that came from the cache.
    end_tokens ids after which a text is over; decoding does not stop at them by itself.
    """

    model: Model
    backend: str
    graph: Graph
    engine: DecodeEngine
    end_tokens: tuple[int, ...]
    program: Program | None = None
    driver: Driver | None = None
    device_facts: DeviceFacts | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._process = os.getpid()
        self._free = weakref.finalize(self, _free, self.engine, self.driver, self.model)
        self._free.atexit = False  # the system does that; and a forked child ends, too

    @property
    def forked(self) -> bool:
        """Whether this is a child that was forked from the process that opened it."""
        return os.getpid() != self._process

    @property
    def label(self) -> str:
        """The execution engine's name in reports."""
        return ENGINES[self.backend]

    @property
    def context(self) -> int:
        """Positions that the caches hold."""
        return self.engine.context

    @property
    def larger_context(self) -> str:
        """Advice behind an error, ", or ...", where the model allows more positions; else ""."""
        limit = self.model.binding.context_limit
        return f", or give a larger --ctx (up to {limit:,})" if limit > self.context else ""

    @property
    def position(self) -> int:
        """Positions that are taken."""
        return self.engine.position

    @property
    def kv_type(self) -> str:
        """The type of the KV cache: "f16" or "q8"; in numpy also "f32", a cache that is not rounded."""
        return str(self.facts["kv_type"])

    @property
    def vocabulary(self) -> int:
        """Number of token ids: 0 to vocabulary - 1."""
        return vocabulary_of(self.model)

    @property
    def samples(self) -> bool:
        """Whether tokens can be drawn; else the likeliest is taken, which is faster."""
        return any(param.name == SAMPLER for param in self.graph.params)

    def check_sampler(self, settings: SamplerSettings, may_change: bool = False) -> None:
        """UsageError for settings that the vocabulary does not allow, and for any but greedy ones in a session that was
        opened without sampling=True, unless another will take its place (may_change)."""
        settings.words(self.vocabulary)
        if not (self.samples or settings.greedy or may_change):
            raise UsageError("this session takes the likeliest token; open it with sampling=True to draw others")

    def set_sampler(self, settings: SamplerSettings) -> None:
        """How the steps from here on draw their tokens, the one after the last id of the next `feed` first.

        UsageError as from `check_sampler`.
        """
        self.check_sampler(settings)
        if self.samples:
            self.engine.set_constant(SAMPLER, settings.words(self.vocabulary))

    @property
    def prefill(self) -> str:
        """How long prompts go in: "own kernels, 512 tokens at once", or "token by token" and why."""
        return self.engine.prefill_way

    def prefill_of(self, tokens: int) -> str:
        """How a prompt of so many tokens goes in: `prefill`, unless it is too short for a chunk."""
        if self.engine.chunked and tokens <= FEWEST:
            return f"token by token: a prompt of up to {FEWEST} tokens"
        return self.prefill

    @property
    def fed_at_once(self) -> int:
        """Ids that one `feed` may have so that it takes no longer than a person waits who wants to stop it."""
        if self.backend == "cpu":
            return 1
        if self.backend == "host":
            return 128 if self.engine.chunked else 1
        return 8192 if self.engine.chunked else 512

    def expect_prompt(self, tokens: int) -> None:
        """Make ready now what takes a prompt of so many tokens in, which else the first such prompt waits for."""
        prepare = getattr(self.engine, "prepare_prefill", None)
        if prepare is not None and tokens > FEWEST:
            began = time.perf_counter()
            prepare()
            self.timings["prefill_ms"] = 1e3 * (time.perf_counter() - began)

    def reset(self) -> None:
        """Back to position 0."""
        self.engine.reset()

    def rewind(self, position: int) -> None:
        """Back to an earlier position, as if nothing after it had been fed; UsageError if it was not reached."""
        self.engine.rewind(position)

    def feed(self, ids: Sequence[int]) -> None:
        """Take in token ids; UsageError for none, for one outside the vocabulary, or too many for the context."""
        check_ids(ids, self.vocabulary)
        self.engine.feed(ids)

    def decode(self, count: int, chunk: int | None = None) -> Iterator[list[int]]:
        """`count` tokens in chunks, the first chosen by the last id of `feed`: the likeliest, or as the sampler draws.

        chunk: tokens at once; None: as many as keep a GPU busy, one by one on a CPU.
        """
        if self.position == 0:
            raise UsageError("nothing was fed yet: decoding continues at least one token")
        if chunk is None:
            return self.engine.decode(count) if self.backend == "cuda" else self.engine.decode(count, 1)
        return self.engine.decode(count, chunk)

    def forced_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after each of `ids`, float[len(ids), vocabulary]; needs a session with outputs=("logits",)."""
        check_ids(ids, self.vocabulary)
        return self.engine.forced_logits(ids)

    def sha256(self, progress: Progress | None = None) -> str:
        """Of the model file; remembered on disk."""
        return self.model.file.sha256(progress, default_cache_dir())

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._free()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _free(engine: DecodeEngine, driver: Driver | None, model: Model) -> None:
    engine.close()
    if driver is not None:
        driver.close()
    model.file.close()


def open_session(path: str | os.PathLike[str], options: SessionOptions = DEFAULTS) -> Session:
    """Open a model file and make it ready to decode.

    Raises the errors of `open_model`, UsageError for options that cannot work, DeviceError and OutOfMemoryError.
    """
    _check(options)
    opener = _Opener(options)
    # A driver takes a third of a second to start, which the header and the passes can use.
    starting = (options.start or GpuStart(options.device)) if options.backend in GPU_BACKENDS else None
    model: Model | None = None
    try:
        began = time.perf_counter()
        model = open_model_for(path, options)
        if options.check is not None:
            options.check(model)
        opener.timings["open_ms"] = 1e3 * (time.perf_counter() - began)
        return opener.open(model, starting)
    except BaseException:
        if starting is not None:
            starting.close()
        if model is not None:
            model.file.close()
        raise


def _check(options: SessionOptions) -> None:
    """UsageError for options that no model can be opened with."""
    backend, kv_type, cache_dtype = options.backend, options.kv_type, options.cache_dtype
    if backend not in BACKENDS:
        raise UsageError(f"--backend {backend}: choose one of {', '.join(BACKENDS)}")
    check_cache_type(kv_type)
    if cache_dtype != "f16" and (backend != "cpu" or kv_type != CACHE_DTYPES[0]):
        raise UsageError(f"a {cache_dtype} cache: only the backend cpu has it, without a --kv-type of another")
    if options.device and backend in ("cpu", "host"):
        why = "numpy uses no GPU" if backend == "cpu" else "the stand-in driver has one device, number 0"
        raise UsageError(f"--device {options.device}: {why}; leave it out, or take --backend cuda")
    check_prefill(options.prefill, backend)


def open_model_for(path: str | os.PathLike[str], options: SessionOptions = DEFAULTS) -> Model:
    """A model file whose caches will hold `options.positions`; reads no weights.

    UsageError if they cannot, naming what would work.
    """
    ctx, positions, filling = options.ctx, options.positions, options.filling
    model = open_model(path, ctx, options.admit, options.kv_type, options.rope)
    try:
        if callable(positions):
            positions = positions(model)
        held, limit = int(model.binding.sizes["context"]), model.binding.context_limit
        if positions is None or positions <= held:
            return model
        if positions > limit:
            raise UsageError(
                f"{filling.what} fill {positions} positions, the model's context has {limit}; {filling.advice}"
            )
        if ctx is not None:
            raise UsageError(f"--ctx {ctx}: {filling.what} fill {positions} positions; give at least that many")
        binding = replace(model.binding, sizes={**model.binding.sizes, "context": positions})
        return replace(model, binding=binding)
    except BaseException:
        model.file.close()
        raise


def vocabulary_of(model: Model) -> int:
    """Number of token ids of a model."""
    return int(model.binding.sizes["vocabulary"])


def check_ids(ids: Sequence[int], vocabulary: int, named: str = "") -> None:
    """UsageError for an empty prompt or an id outside the vocabulary, TypeError for one that is no whole number. named:
    the option that gave the ids."""
    begin = f"{named}: " if named else ""
    if not len(ids):
        raise UsageError(f"{begin}the prompt is empty: give at least one token")
    place = first_that_is_not_whole(ids)
    if place is not None:
        raise TypeError(f"{begin}token id {ids[place]!r} is no whole number")
    if min(ids) < 0 or max(ids) >= vocabulary:
        token = next(token for token in ids if not 0 <= token < vocabulary)
        raise UsageError(f"{begin}token id {token} is outside the vocabulary; ids are 0 to {vocabulary - 1}")


class _Opener:
    """The way of a model from its options to an engine."""

    def __init__(self, options: SessionOptions) -> None:
        self.options = options
        self.timings: dict[str, float] = {}
        self.constants = {SAMPLER: SamplerSettings(temperature=0.0).words()} if options.sampling else {}

    def open(self, model: Model, starting: GpuStart | None) -> Session:
        options = self.options
        ends = _end_tokens(model)
        began = time.perf_counter()
        fused = fuse(model.graph(options.outputs, options.sampling), options.disable)[0]
        self._lap("fuse_ms", began)
        if starting is not None:
            began = time.perf_counter()
            found, reason = settled(starting, may_fail=options.backend == "auto")
            self._lap("driver_ms", began)
            if found is not None:
                return self._on_device("cuda", model, fused, ends, found)
            check_prefill(options.prefill, "cpu", f"no GPU works here ({reason}), and ")
            return self._in_numpy(model, fused, ends, reason)
        if options.backend == "cpu":
            return self._in_numpy(model, fused, ends, "")
        from .runtime import host

        began = time.perf_counter()
        ending.before_leaving.add(host.stop_compilers)
        host.activate()
        driver = gpu_start.start_driver(options.device)
        self._lap("driver_ms", began)
        return self._on_device("host", model, fused, ends, driver)

    def _shapes(self, backend: str, facts: DeviceFacts) -> dict[str, dict[str, int]]:
        """The shapes asked for, or those that `psigraph tune` keeps for this GPU, or the built-in ones."""
        if self.options.shapes is not None:
            return self.options.shapes
        return load_tuned(facts) if backend == "cuda" else {}

    def _on_device(self, backend: str, model: Model, fused: Graph, ends: tuple[int, ...], driver: Driver) -> Session:
        from .runtime.cuda.compiler import compile_program
        from .runtime.engine import Engine

        options = self.options
        try:
            facts = driver.facts()
            arch = "host" if backend == "host" else arch_of_capability(*facts.capability)
            # PSIGRAPH_HOST_CAPABILITY tries out other GPUs.
            on_host = backend == "host"
            target = stand_in_target(facts.capability, facts.sm_count) if on_host else target_for(arch, facts.sm_count)
            began = time.perf_counter()
            shapes = self._shapes(backend, facts)
            program = lower(fused, target, shapes)
            self._lap("lower_ms", began)
            began = time.perf_counter()
            compiled = compile_program(program, arch, KernelCache(default_cache_dir()), options.on_compile)
            self._lap("compile_ms", began)
            engine = Engine(
                driver,
                program,
                compiled,
                model,
                end_tokens=ends[:END_TOKEN_SLOTS],
                graph=options.graph,
                progress=options.on_load,
                constants=self.constants,
                prefill=prefill_maker(
                    options.prefill, backend, model, options.sampling, options.disable, target, driver
                ),
                must_prefill=f"prefill {options.prefill}" if options.prefill in EXPLICIT else "",
            )
            if options.prefill == "library":  # who asks hears now, and not at the first prompt, that there is none
                try:
                    engine.prepare_prefill()
                except BaseException:
                    engine.close()
                    raise
        except BaseException:
            driver.close()
            raise
        self.timings["kernels"] = len(compiled)
        self.timings["kernels_from_cache"] = sum(kernel.cached for kernel in compiled.values())
        self._engine_timings(engine.timings)
        where = {"gpu": facts.name} if backend == "cuda" else {"stand_in_driver": True}
        session_facts = {
            **where,
            "capability": ".".join(map(str, facts.capability)),
            "multiprocessors": facts.sm_count,
            "arch": arch,
            "launch_shapes": "tuned" if shapes else "built in",
            "kv_type": model.binding.kv_type,
            "arithmetic": f"int8 dot products of two digits, float32 sums, {model.binding.kv_type} cache",
            **self._stretched(),
            "graph": options.graph,
            "device_bytes": engine.arena_bytes,
            "weight_bytes": sum(buffer.nbytes for buffer in program.buffers if buffer.kind == "weight"),
            "state_bytes": sum(buffer.nbytes for buffer in program.buffers if buffer.kind == "state"),
        }
        return Session(model, backend, fused, engine, ends, program, driver, facts, session_facts, dict(self.timings))

    def _in_numpy(self, model: Model, fused: Graph, ends: tuple[int, ...], reason: str) -> Session:
        from .numpy_path import NumpyEngine

        options = self.options
        engine = NumpyEngine(
            fused,
            model,
            ends[:END_TOKEN_SLOTS],
            cache_dtype=options.cache_dtype,
            progress=options.on_load,
            constants=self.constants,
        )
        self._engine_timings(engine.timings)
        if reason:
            tell_of_numpy(engine, reason)
        kv_type = options.cache_dtype if options.cache_dtype != "f16" else model.binding.kv_type
        facts = {
            "kv_type": kv_type,
            "arithmetic": f"numpy {np.dtype(engine.dtype).name}, {kv_type} cache",
            **self._stretched(),
            "graph": False,
            "no_gpu_because": reason,
        }
        return Session(model, "cpu", fused, engine, ends, facts=facts, timings=dict(self.timings))

    def _stretched(self) -> dict[str, str]:
        rope = self.options.rope
        return {} if rope is None else {"rope_scaling": f"{rope.kind} {rope.scale:g}"}

    def _lap(self, name: str, began: float) -> None:
        self.timings[name] = 1e3 * (time.perf_counter() - began)

    def _engine_timings(self, timings: Any) -> None:
        for name in ("load", "modules", "capture"):
            self.timings[f"{name}_ms"] = 1e3 * getattr(timings, f"{name}_s")


def _end_tokens(model: Model) -> tuple[int, ...]:
    from .runtime.tokenizer.end_tokens import end_tokens

    return end_tokens(model.file)
