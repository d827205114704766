"""Measures decoding and makes the report: what `psigraph bench` does, for other code to call too.

One run: `depth` ids that nobody times, the prompt without its last id, then the timed part: n steps that give n
tokens, the first of them the prompt's last. So the rate divides n tokens by n whole steps, and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from ..build import Model
from ..gpu_start import GPU_BACKENDS, GpuStart
from ..ir.errors import UnsupportedModelError, UsageError
from ..ir.program import PREFILL
from ..medpsy.artifact import admit_file, artifact_record, check_model_size
from ..medpsy.policy import Admission
from ..options import Filling, Progress, SessionOptions
from ..runtime.gguf.file import GgufFile
from ..session import Session, check_ids, open_session, vocabulary_of
from ..text.sampler import SamplerSettings
from .environment import GpuSnapshot, machine_record, peak_memory_bytes, seconds_since_start
from .profile import POSITIONS, Profile, measure_profile
from .report import build_report

WARM_UP_TOKENS_ON_CPU = 8  # caches are warm after these, and a whole run would only make people wait
STEPS_FOR_QUANTILES = 256
QUANTILES = (10, 50, 90, 99)
BENCH_FILLING = Filling(advice="shorten the prompt, or lower --max-new-tokens or --depth")


@dataclass(frozen=True)
class Work:
    """What is measured. mode: one of `report.DECODE_ROWS`; depth: positions filled before, untimed; sampler: how
    tokens are drawn in the mode "text", None: the likeliest are taken."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    repeats: int = 3
    mode: str = "chained"
    depth: int = 0
    sampler: SamplerSettings | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("--prompt-token-ids: the prompt is empty; give at least one token id")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens {self.max_new_tokens}: at least 1 is needed")
        if self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats}: at least 1 is needed")
        if self.depth < 0:
            raise UsageError(f"--depth {self.depth}: give 0 or more")
        if self.sampler is not None and self.mode != "text":
            raise UsageError(f"--mode {self.mode} takes the likeliest token; drawn ones are measured by --mode text")

    @property
    def positions(self) -> int:
        """Positions that a run fills."""
        return self.depth + len(self.prompt) + self.max_new_tokens - 1

    @property
    def mean_position(self) -> float:
        """Of the timed steps, counted from 0."""
        return self.depth + len(self.prompt) - 1 + (self.max_new_tokens - 1) / 2


@dataclass(frozen=True)
class Run:
    """One timed run: the ids, milliseconds from the prompt's first id on and of the timed steps alone."""

    tokens: tuple[int, ...]
    total_ms: float
    decode_ms: float
    first_token_ms: float

    def record(self) -> dict[str, Any]:
        # End tokens never stop a benchmark, here as in the peers' tools.
        return {
            "generated_tokens": list(self.tokens),
            "total_ms": self.total_ms,
            "decode_ms": self.decode_ms,
            "stopped_on_eos": False,
        }

    @property
    def rate(self) -> float:
        """Tokens per second of generation alone."""
        return 1e3 * len(self.tokens) / self.decode_ms


@dataclass(frozen=True)
class Bench:
    """An open session for benchmarks, with what the policy said of its file and what the GPU did before."""

    session: Session
    admission: Admission
    model_size: str
    snapshot: GpuSnapshot | None


@contextmanager
def prepared(
    path: str | os.PathLike[str],
    work: Work,
    options: SessionOptions,
    *,
    model_size: str | None = None,
    allow_blocked: bool = False,
    expect_sha256: str | None = None,
    extra_positions: int = 0,
    on_hash: Progress | None = None,
    on_admission: Callable[[Admission], None] | None = None,
    on_size: Callable[[str], None] | None = None,
    prompt_tokens: int = 0,
    filling: Filling = BENCH_FILLING,
) -> Iterator[Bench]:
    """A session in which `work` can be measured.

    The GPU's state is asked for before this process is on it, and the policy before an admitted file's weights are
    read. options: outputs, sampling, positions, admit and check are those of the work; start: best with a snapshot.
    on_hash: see `admit_file`. prompt_tokens: of the prompt that `prompt_record` is to measure, 0 for none.
    extra_positions: that a profile needs besides. on_size: gets the model's size before a weight is read; may raise.
    filling: words for errors.
    """
    start = options.start
    if start is None and options.backend in GPU_BACKENDS:
        start = GpuStart(options.device, with_snapshot=True)
    admissions: list[Admission] = []
    sizes: list[str] = []

    def admit(file: GgufFile) -> None:
        admission = admit_file(file, allow_blocked=allow_blocked, expect_sha256=expect_sha256, on_hash=on_hash)
        admissions.append(admission)

    def check(model: Model) -> None:
        if on_admission:
            on_admission(admissions[0])  # only now: the file is one that runs
        check_ids(work.prompt, vocabulary_of(model), "--prompt-token-ids")
        sizes.append(check_model_size(model, model_size))
        if on_size:
            on_size(sizes[0])

    options = replace(
        options,
        outputs=("logits",) if work.mode == "forced" else (),
        sampling=work.sampler is not None,
        positions=max(work.positions + extra_positions, prompt_tokens),
        filling=filling,
        admit=admit,
        check=check,
        start=start,
    )
    try:
        session = open_session(path, options)
    except BaseException:
        if start is not None:
            start.close()
        raise
    with session:
        yield Bench(session, admissions[0], sizes[0], start.snapshot() if start is not None else None)


def run_bench(
    path: str | os.PathLike[str],
    work: Work,
    options: SessionOptions,
    *,
    profile: bool = False,
    prompt_tokens: int = 0,
    on_run: Progress | None = None,
    on_prompt: Progress | None = None,
    **preparing: Any,
) -> dict[str, Any]:
    """The report of a benchmark, as `report.build_report` makes it; nothing is written.

    preparing: options of `prepared`. profile: time every kernel of the step too. prompt_tokens: measure how fast a
    prompt of so many tokens goes in too, 0 for no; with `profile` the kernels of its first chunk as well.
    on_run(runs done, runs in all); on_prompt: see `prompt_record`.
    """
    preparing |= {"extra_positions": POSITIONS if profile else 0, "prompt_tokens": prompt_tokens}
    with prepared(path, work, options, **preparing) as bench:
        return measure(
            *(bench.session, work, bench.admission, bench.model_size, bench.snapshot, on_run),
            profile=profile,
            prompt_tokens=prompt_tokens,
            on_prompt=on_prompt,
        )


def run_sweep(
    path: str | os.PathLike[str],
    work: Work,
    options: SessionOptions,
    *,
    depths: Sequence[int],
    on_run: Progress | None = None,
    **preparing: Any,
) -> list[dict[str, Any]]:
    """One report of the work a depth, all from one session. preparing: options of `prepared`."""
    works = [replace(work, depth=depth) for depth in depths]
    if not works:
        raise UsageError("--sweep: give at least one depth, such as depth=0,1024")
    if len({work.depth for work in works}) < len(works):
        raise UsageError("--sweep: a depth stands there twice; give each once")
    deepest = max(works, key=lambda work: work.depth)
    with prepared(path, deepest, options, **preparing) as bench:
        reports = []
        for index, work in enumerate(works):
            known = (bench.admission, bench.model_size, bench.snapshot)
            reports.append(measure(bench.session, work, *known, again=index > 0))
            if on_run:
                on_run(index + 1, len(works))
        return reports


def measure(
    session: Session,
    work: Work,
    admission: Admission,
    model_size: str,
    snapshot: GpuSnapshot | None = None,
    on_run: Progress | None = None,
    *,
    again: bool = False,
    profile: bool = False,
    prompt_tokens: int = 0,
    on_prompt: Progress | None = None,
) -> dict[str, Any]:
    """The report of a session's benchmark: warm-up, runs, step times, a prompt, then the memory's bandwidth.

    again: something was measured in this process before, so that its start says nothing about the first token; nor
    does it where a depth is filled first.
    """
    timings: dict[str, Any] = dict(session.timings)
    warm_up = run_once(session, _warm_up_of(session, work))
    # Of this process: interpreter, imports and the question who uses the GPU included.
    until_loaded, first = seconds_since_start(), warm_up.first_token_ms
    if until_loaded is not None and not again and not work.depth:
        timings["start_to_first_token_ms"] = 1e3 * until_loaded - warm_up.total_ms + first
    timings["first_token_ms"] = first
    timings["warm_up_ms"] = warm_up.total_ms
    timings["warm_up_tokens"] = len(warm_up.tokens)
    runs = []
    for index in range(work.repeats):
        runs.append(run_once(session, work))
        if on_run:
            on_run(index + 1, work.repeats)
    timings["warm_first_token_ms"] = median(run.first_token_ms for run in runs)
    timings["step_us"] = step_quantiles(session, work)
    if prompt_tokens:
        timings["prompt"] = prompt_record(session, prompt_tokens, work.repeats, on_prompt)
    artifact = artifact_record(session.model)
    artifact["bytes_per_token"] = bytes_per_token(session, work)
    bandwidth = roofline(session, work)
    kernels: list[dict[str, Any]] = []
    if profile:
        found = kernel_times(session, work, bandwidth)
        kernels, timings["profile"] = found.kernels(), found.summary()
        chunk = chunk_kernel_times(session, prompt_tokens, bandwidth)
        if chunk is not None:
            kernels += chunk.kernels()
            timings["prompt"]["profile"] = chunk.summary()
    return build_report(
        model_path=str(session.model.file.path),
        model_size=model_size,
        backend=session.backend,
        prompt_ids=work.prompt,
        max_new_tokens=work.max_new_tokens,
        runs=[run.record() for run in runs],
        sha256=admission.sha256 or session.sha256(),
        policy=admission.record(),
        environment=environment(session, snapshot),
        artifact=artifact,
        timings=timings,
        roofline=bandwidth,
        kernels=kernels,
        decode_row=work.mode,
        depth=work.depth,
        kv_type=session.kv_type,
        sampler=work.sampler.record() if work.sampler is not None else None,
    )


def prompt_record(session: Session, tokens: int, repeats: int, on_prompt: Progress | None = None) -> dict[str, Any]:
    """How fast a prompt goes in: {tokens, way, first_token_ms of every run, and of their median the rate}.

    Timed from the first id until the host knows the token behind the last one, after one run that nobody times. In
    numpy that run is of a few ids, and there is one timed run: a prompt takes as many seconds as elsewhere
    milliseconds. The rate is the prompt's tokens by that time, so it has the choice of a token in it, which
    `llama-bench`'s pp has not. on_prompt(ids fed, ids in all), over all runs.
    """
    session.expect_prompt(tokens)
    in_numpy = session.backend == "cpu"
    ids, found = filler_ids(tokens, session.vocabulary), []
    warm_up = ids[:WARM_UP_TOKENS_ON_CPU] if in_numpy else ids
    runs = [warm_up, *[ids] * (1 if in_numpy else repeats)]
    total, before = sum(map(len, runs)), 0

    def on_step(index: int) -> None:
        if on_prompt:
            on_prompt(before + index + 1, total)

    for run in runs:
        session.reset()
        session.engine.synchronize()
        began = time.perf_counter()
        if in_numpy:
            session.engine.feed(run, on_step)
        else:  # at once: a look at every id would be a step for every id
            session.feed(run)
        session.engine.chosen()
        found.append(1e3 * (time.perf_counter() - began))
        on_step(len(run) - 1)
        before += len(run)
    middle = median(found[1:])
    return {
        "tokens": tokens,
        "way": session.prefill_of(tokens),
        "first_token_ms": found[1:],
        "median_first_token_ms": middle,
        "prompt_tokens_per_second": 1e3 * tokens / middle,
    }


def run_once(session: Session, work: Work) -> Run:
    """Resets the session and does the work once."""
    session.reset()
    if work.mode == "text":
        return _as_text(session, work)
    if work.depth:
        session.feed(filler_ids(work.depth, session.vocabulary))
        session.engine.synchronize()
    began = time.perf_counter()
    if work.prompt[1:]:
        session.feed(work.prompt[:-1])
        session.engine.synchronize()
    generating = time.perf_counter()
    if work.mode == "forced":
        tokens, decode_s, first_s = _forced(session, work)
    else:
        tokens, first_s = [], 0.0
        session.feed(work.prompt[-1:])
        for chunk in session.decode(work.max_new_tokens):
            first_s = first_s or time.perf_counter() - generating
            tokens += chunk
        decode_s = time.perf_counter() - generating
    total_s = generating - began + decode_s
    return Run(tuple(tokens), 1e3 * total_s, 1e3 * decode_s, 1e3 * (generating - began + first_s))


def _as_text(session: Session, work: Work) -> Run:
    """A run of what `generate` and `chat` do; the depth goes in first, untimed, and then the prompt but its last id."""
    # The other modes have no text, and need not wait for what makes it to be imported.
    from ..runtime.tokenizer.bpe import Tokenizer
    from ..text.generation import GREEDY, Decoder, Limits, TextRun

    ids = [*filler_ids(work.depth, session.vocabulary), *work.prompt]
    decoder = Decoder(session)
    try:
        tokenizer = Tokenizer(session.model.file)
    except UnsupportedModelError:  # ids work without one
        tokenizer = None

    def fed(count: int) -> float:
        """Seconds until the first `count` ids are in."""
        began = time.perf_counter()
        if count:
            list(decoder.run(ids[:count], Limits(max_new_tokens=1, ignore_end=True)))
            session.engine.synchronize()
        return time.perf_counter() - began

    fed(work.depth)
    prompt_ms = 1e3 * fed(len(ids) - 1) if work.prompt[1:] else 0.0
    began = time.perf_counter()
    run = decoder.run(ids, Limits(work.max_new_tokens, work.sampler or GREEDY, ignore_end=True))
    with open(os.devnull, "w", encoding="utf-8") as nobody:
        for piece in TextRun(run, tokenizer) if tokenizer is not None else map(str, run):
            nobody.write(piece)
    decode_ms = 1e3 * (time.perf_counter() - began)
    return Run(tuple(run.ids), prompt_ms + decode_ms, decode_ms, prompt_ms + run.timings()["first_token_ms"])


def _forced(session: Session, work: Work) -> tuple[list[int], float, float]:
    """(the device's choices, seconds, seconds to the first): given ids, all logits on the host for every token.

    What numpy needs to name the best logit is left out, as it is no part of the work that is compared.
    """
    engine = session.engine
    ids = [work.prompt[-1], *filler_ids(work.max_new_tokens - 1, session.vocabulary)]
    tokens, seconds, first = [], 0.0, 0.0
    for token in ids:
        began = time.perf_counter()
        engine.feed((token,))
        logits = engine.logits_view()
        seconds += time.perf_counter() - began
        first = first or seconds
        tokens.append(int(np.argmax(logits)))
    return tokens, seconds, first


def filler_ids(count: int, vocabulary: int) -> list[int]:
    """The same varied ids every time, int[count]: what is read does not change what a step costs."""
    ids: list[int] = np.random.default_rng(0).integers(0, vocabulary, count).tolist()
    return ids


def step_quantiles(session: Session, work: Work) -> dict[str, float]:
    """Microseconds of single steps over the positions of a run, an event between each: p10, p50, p90, p99, max."""
    count = min(STEPS_FOR_QUANTILES, work.max_new_tokens - 1)
    if session.backend != "cuda":
        count = min(count, 16)
    if count < 1:
        return {}
    session.reset()
    if work.depth:
        session.feed(filler_ids(work.depth, session.vocabulary))
    session.feed(work.prompt)
    times = session.engine.step_times(count)
    found = {f"p{quantile}": float(np.percentile(times, quantile)) for quantile in QUANTILES}
    return {**found, "max": float(times.max()), "steps": count}


def bytes_per_token(session: Session, work: Work) -> float:
    """Bytes that a step must read: weights, activations, and the cache at the runs' mean position."""
    program = session.program
    if program is None:  # numpy: the dequantized weights, whatever the cache adds
        size = np.dtype(getattr(session.engine, "dtype", np.float64)).itemsize
        matrices = sum(p.type.size for p in session.graph.params if p.kind == "weight" and len(p.type.shape) == 2)
        return float(matrices * size)
    cache = sum(launch.cache_bytes_per_position for launch in program.step().kernels)
    return program.weight_bytes_per_token + cache * work.mean_position


def roofline(session: Session, work: Work) -> dict[str, float] | None:
    """The read bandwidth of this GPU, measured now, and the bytes of a token; None where there is no GPU."""
    if session.backend != "cuda":
        return None
    from ..runtime.engine import Engine

    assert isinstance(session.engine, Engine)
    return {
        "read_bandwidth_gb_s": session.engine.read_bandwidth() / 1e9,
        "bytes_per_token": bytes_per_token(session, work),
    }


def kernel_times(session: Session, work: Work, bandwidth: dict[str, float] | None) -> Profile:
    """Every kernel of the step at the runs' mean position (`profile`); UsageError where no kernels run."""
    from ..runtime.engine import Engine

    engine = session.engine
    if not isinstance(engine, Engine):
        raise UsageError("--profile: the backend cpu runs no kernels; take cuda, or host to try it out")
    ids = filler_ids(min(int(work.mean_position) or 1, engine.context - POSITIONS), session.vocabulary)
    return measure_profile(engine, str(engine.program.notes["arch"]), ids, _read_bandwidth(bandwidth))


def chunk_kernel_times(session: Session, tokens: int, bandwidth: dict[str, float] | None) -> Profile | None:
    """Every kernel of a prompt's first chunk; None for a prompt that does not go in by chunks."""
    from ..runtime.engine import FEWEST, Engine

    engine = session.engine
    if tokens <= FEWEST or not isinstance(engine, Engine) or not engine.prepare_prefill():
        return None
    chunk = min(tokens, engine.program.step(PREFILL).rows)
    ids = filler_ids(chunk, session.vocabulary)
    arch = str(engine.program.notes["arch"])
    return measure_profile(engine, arch, ids, _read_bandwidth(bandwidth), chunk=chunk)


def _read_bandwidth(bandwidth: dict[str, float] | None) -> float | None:
    """Bytes a second of a roofline."""
    return 1e9 * bandwidth["read_bandwidth_gb_s"] if bandwidth else None


def environment(session: Session, snapshot: GpuSnapshot | None) -> dict[str, Any]:
    """The `environment` of a report. No `gpu` where none was used."""
    found = {**machine_record(), **session.facts, "prefill": session.prefill, "peak_host_bytes": peak_memory_bytes()}
    facts, driver = session.device_facts, session.driver
    if session.backend == "cuda" and facts is not None and driver is not None:
        parts = [driver.attribute(name) for name in ("PCI_DOMAIN_ID", "PCI_BUS_ID", "PCI_DEVICE_ID")]
        address = "{:04x}:{:02x}:{:02x}.0".format(*parts)
        found |= {"cuda": facts.driver_version, "gpu_memory_bytes": facts.total_memory, "l2_bytes": facts.l2_bytes}
        found |= (snapshot or GpuSnapshot()).of(address)
    return found


def _warm_up_of(session: Session, work: Work) -> Work:
    if session.backend == "cuda":
        return work
    count = min(work.max_new_tokens, WARM_UP_TOKENS_ON_CPU)
    return replace(work, max_new_tokens=count, repeats=1, depth=min(work.depth, WARM_UP_TOKENS_ON_CPU))
