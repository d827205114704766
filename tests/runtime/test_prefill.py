"""Prompts by chunks, end to end on the host target: the same numbers as token by token, and state that moves on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy_library import NumpyLibrary

from psigraph.build import build_program, open_model, with_prefill
from psigraph.codegen.lower import PREFILL_ROWS
from psigraph.codegen.target import target_for
from psigraph.ir.errors import OutOfMemoryError, UnsupportedModelError, UsageError
from psigraph.ir.program import PREFILL, LibraryProduct, Program
from psigraph.ir.regime import Regime
from psigraph.options import SessionOptions
from psigraph.passes.pipeline import PIPELINE
from psigraph.passes.use_sampler import SAMPLER
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import CompiledKernel, compile_program
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.engine import FEWEST, Engine, PrefillMaker, PrefillPlan
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import Size, write_synth
from psigraph.runtime.synth.vocab import SMALLEST
from psigraph.session import Session, open_session
from psigraph.text.generation import Decoder, Limits
from psigraph.text.sampler import SamplerSettings

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
MEAN_KL, LARGEST_KL = 2e-4, 1e-3
LENGTHS = (1, 2, 31, 32, 33, 511, 512, 513)
# One program for all tests of the small model: it draws the likeliest token unless told otherwise.
OPTIONS: dict[str, Any] = {"ctx": 768, "outputs": ("logits",), "sampling": True}
TWO_LAYERS = Size(layers=2, hidden=256, feed_forward=256, heads=2, kv_heads=1, untied=False, context=1024)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of every row, in nats."""

    def log_probabilities(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    p, q = log_probabilities(reference), log_probabilities(other)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers: one whose attention and feed-forward a prompt needs, and the last, where it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "small", TWO_LAYERS)
        return write_synth(tmp_path_factory.mktemp("small") / "small.gguf", "small", "q4_k_m", 1, vocab=SMALLEST)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(token) for token in np.random.default_rng(4).integers(0, 250, max(LENGTHS) + 8)]


@pytest.fixture(scope="module")
def by_steps(small: Path, ids: list[int]) -> dict[int, np.ndarray]:
    """Length -> logits behind a prompt of that length, token by token: in numpy, which is faster here than kernels.

    Kernels take steps in the tests of the cache and of sampling below.
    """
    found: dict[int, np.ndarray] = {}
    with open_session(small, SessionOptions("cpu", ctx=768, outputs=("logits",))) as session:

        def keep(index: int) -> None:
            if index + 1 in LENGTHS:
                found[index + 1] = session.engine.logits()

        session.engine.feed(ids[: max(LENGTHS)], keep)
    return found


@pytest.fixture(scope="module")
def chunked(small: Path) -> Iterator[Session]:
    with open_session(small, SessionOptions("host", prefill="own", **OPTIONS)) as session:
        yield session


def test_every_length_gives_what_token_by_token_gives(
    chunked: Session, by_steps: dict[int, np.ndarray], ids: list[int]
) -> None:
    divergences = []
    for length in LENGTHS:
        chunked.reset()
        chunked.feed(ids[:length])
        assert chunked.position == length
        logits, want = chunked.engine.logits(), by_steps[length]
        best = np.sort(want)[-2:]
        if best[1] - best[0] > 0.05:
            assert chunked.engine.chosen() == int(want.argmax()), length
        divergences.append(divergence(want, logits))
    assert np.mean(divergences) <= MEAN_KL
    assert np.max(divergences) <= LARGEST_KL
    assert np.max(divergences) <= 5e-5, "halves are better than the bar by far; more than this is a mistake"
    assert chunked.prefill == f"own kernels, {PREFILL_ROWS} tokens at once"


def test_decoding_goes_on_and_repeats_bit_for_bit(chunked: Session, small: Path, ids: list[int]) -> None:
    runs: list[tuple[Any, ...]] = []
    for session in (chunked, chunked, None):
        opened = session or open_session(small, SessionOptions("host", prefill="own", graph=False, **OPTIONS))
        opened.reset()
        opened.feed(ids[:300])
        tokens = [token for chunk in opened.decode(6) for token in chunk]
        runs.append((tokens, opened.engine.logits().tobytes(), opened.position))
        if session is None:
            opened.close()
    assert runs[0] == runs[1] == runs[2], "replayed twice, then launch after launch"
    assert runs[0][2] == 305


def test_the_cache_is_filled_exactly_where_decoding_continues(chunked: Session, ids: list[int]) -> None:
    engine = chunked.engine
    assert isinstance(engine, Engine)
    chunked.reset()
    for layer in range(2):
        for name in ("k_cache", "v_cache"):
            engine.clear(f"{name}.{layer}")
    chunked.feed(ids[:40])

    def cache(name: str) -> np.ndarray:
        return engine.read(name).view(np.float16).reshape(768, 128)

    taken = {f"{name}.{layer}": cache(f"{name}.{layer}") for layer in range(2) for name in ("k_cache", "v_cache")}
    for name, rows in taken.items():
        assert rows[:40].any(axis=1).all(), name
        assert not rows[40:].any(), name
    chunked.reset()
    for token in ids[:40]:
        chunked.feed([token])
    for name, rows in taken.items():
        np.testing.assert_allclose(rows.astype(np.float64), cache(name).astype(np.float64), rtol=5e-3, atol=5e-3)


def test_a_prefix_is_not_taken_in_again(chunked: Session, ids: list[int]) -> None:
    decoder = Decoder(chunked)
    first = list(decoder.run(ids[:60], Limits(max_new_tokens=4, ignore_end=True)))
    run = decoder.run([*ids[:60], *first, *ids[60:100]], Limits(max_new_tokens=4, ignore_end=True))
    second = list(run)
    assert run.reused_tokens >= 60
    decoder.forget()
    assert list(decoder.run([*ids[:60], *first, *ids[60:100]], Limits(max_new_tokens=4, ignore_end=True))) == second


def test_the_context_can_be_filled_to_the_brim(chunked: Session) -> None:
    chunked.reset()
    with pytest.raises(UsageError, match="exceed the context of 768"):
        chunked.feed([1] * 769)
    chunked.feed([1] * 768)
    assert chunked.position == 768
    with pytest.raises(UsageError, match="exceed the context"):
        chunked.feed([1])


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
def test_the_tiny_model_meets_its_reference(quant: str) -> None:
    with np.load(TINY / "reference_logits.npz") as stored:
        ids, want = stored["ids"].tolist(), stored[f"logits_{quant}"].astype(np.float64)
    options = SessionOptions("host", outputs=("logits",), prefill="own")
    with open_session(TINY / f"tiny-qwen3-{quant}.gguf", options) as session:
        divergences = []
        for length in (17, 40, 64):
            session.reset()
            session.feed(ids[:length])
            divergences.append(divergence(want[length - 1], session.engine.logits()))
    assert np.mean(divergences) <= MEAN_KL
    assert np.max(divergences) <= LARGEST_KL


def test_sampling_sees_the_prompt(chunked: Session, small: Path, ids: list[int]) -> None:
    """Penalties are about tokens of the prompt too: the history holds them, chunk or not."""
    found = []
    settings = SamplerSettings(temperature=0.8, repetition_penalty=1.3, frequency_penalty=0.2, seed=5)
    with open_session(small, SessionOptions("host", prefill="off", **OPTIONS)) as by_step:
        for session in (chunked, by_step):
            session.reset()
            session.set_sampler(settings)
            session.feed(ids[:30])
            tokens = [token for chunk in session.decode(5) for token in chunk]
            assert isinstance(session.engine, Engine)
            found.append((tokens, session.engine.read("history").view(np.int32)[:34].tolist()))
            session.set_sampler(SamplerSettings(temperature=0.0))
    assert found[0] == found[1]
    assert found[0][1][:30] == ids[:30]


def engine_with(path: Path, prefill: PrefillMaker | None, driver: Driver, graph: bool = False) -> Engine:
    with open_model(path, 768) as model:
        program = build_program(model, target_for("host"), ("logits",), sampling=True)
        compiled = compile_program(program, "host", KernelCache(None))
        constants = {SAMPLER: SamplerSettings(temperature=0.0).words()}
        return Engine(driver, program, compiled, model, graph=graph, prefill=prefill, constants=constants)


def maker(path: Path, context: int = 768, library: Callable[[], NumpyLibrary] | None = None) -> PrefillMaker:
    """What makes the prompt's step of a model with such a context."""

    def make(program: Program, compiled: Mapping[str, CompiledKernel]) -> PrefillPlan:
        with open_model(path, context) as model:
            graph = model.graph((), sampling=True, rows=PREFILL_ROWS)
        both = with_prefill(program, graph, target_for("host"), library=library is not None)
        known = compile_program(both, "host", KernelCache(None), known=compiled)
        return PrefillPlan(both, known, library() if library else None)

    return make


def test_a_library_gives_the_same(small: Path, by_steps: dict[int, np.ndarray], ids: list[int], driver: Driver) -> None:
    before = host.live()
    library = NumpyLibrary(driver)
    with engine_with(small, maker(small, library=lambda: library), driver) as engine:
        engine.feed(ids[:8])  # the first chunk comes, and is made ready, in the middle
        engine.feed(ids[8:33])
        assert divergence(by_steps[33], engine.logits()) <= 5e-5
        assert engine.prefill_way == f"numpy, {PREFILL_ROWS} tokens at once"
        products = [launch for launch in engine.program.step(PREFILL).launches if isinstance(launch, LibraryProduct)]
        assert {(one.rows, one.tokens, one.columns) for one in products} == library.prepared
        engine.reset()
        engine.feed(ids[:513])
        assert divergence(by_steps[513], engine.logits()) <= 5e-5
    assert library.closed
    assert host.live() == before


@pytest.mark.parametrize("error", [UnsupportedModelError("no kernel"), OutOfMemoryError("no room")])
def test_where_no_chunk_can_be_made_prompts_take_steps(
    error: Exception, small: Path, by_steps: dict[int, np.ndarray], ids: list[int], driver: Driver
) -> None:
    def make(*_: object) -> PrefillPlan:
        raise error

    with engine_with(small, make, driver) as engine:
        engine.feed(ids[:FEWEST])
        assert engine.prefill_way.startswith("by chunks"), "nothing was asked for yet"
        engine.reset()
        engine.feed(ids[:33])
        assert engine.prefill_way == f"token by token: {error}"
        assert divergence(by_steps[33], engine.logits()) <= 5e-5


def test_an_explicit_way_that_cannot_be_made_is_an_error_every_time(
    small: Path, ids: list[int], driver: Driver
) -> None:
    def make(*_: object) -> PrefillPlan:
        raise UnsupportedModelError("no kernel")

    with engine_with(small, make, driver) as engine:
        engine.must_prefill = "prefill own"
        for _ in range(2):
            with pytest.raises(UnsupportedModelError, match=r"^prefill own: no kernel; auto or off takes"):
                engine.feed(ids[:33])
            assert engine.position == 0


def test_a_step_of_another_context_is_refused(small: Path, ids: list[int], driver: Driver) -> None:
    with engine_with(small, maker(small, context=512), driver) as engine:
        engine.must_prefill = "prefill own"
        with pytest.raises(UnsupportedModelError, match=r"^prefill own: the steps .* keep k_cache\.0 differently"):
            engine.feed(ids[:33])


def test_another_program_makes_its_prompts_step_anew(
    small: Path, by_steps: dict[int, np.ndarray], ids: list[int], driver: Driver
) -> None:
    """Adopted without a step for prompts, as while launch shapes are tuned."""
    before = host.live()
    libraries: list[NumpyLibrary] = []

    def library() -> NumpyLibrary:
        libraries.append(NumpyLibrary(driver))
        return libraries[-1]

    # Kernel by kernel: numpy multiplies while a step is queued, which nothing can capture.
    with engine_with(small, maker(small, library=library), driver) as engine:
        plain, kernels = engine.program, engine.compiled
        engine.feed(ids[:33])
        both, logits = engine.program, engine.logits()
        assert [step.name for step in both.steps] == ["decode", PREFILL]
        engine.adopt(plain, kernels)
        assert engine.prefill_way == "by chunks, from the first prompt on"
        assert [one.closed for one in libraries] == [True]
        engine.reset()
        engine.feed(ids[:33])
        assert engine.logits().tobytes() == logits.tobytes()
        assert engine.program == both
        assert [one.closed for one in libraries] == [True, False]
    assert host.live() == before


def test_a_program_that_is_refused_changes_nothing(small: Path, ids: list[int], driver: Driver) -> None:
    with open_model(small, 512) as model:
        other = build_program(model, target_for("host"), ("logits",), sampling=True)
    with engine_with(small, maker(small), driver, graph=True) as engine:
        engine.feed(ids[:33])
        program, logits = engine.program, engine.logits()
        with pytest.raises(UsageError, match=r"the other program keeps \S+ differently; open a new engine"):
            engine.adopt(other, engine.compiled)
        assert engine.program == program
        engine.reset()
        host.inject(0, 0)  # empties the log of calls
        engine.feed(ids[:33])
        assert host.calls().count("cuGraphLaunch") == 2, "a chunk and a step, both replayed"
        assert engine.logits().tobytes() == logits.tobytes()


def test_an_adopted_program_keeps_its_prompts_step(small: Path, ids: list[int], driver: Driver) -> None:
    made: list[Program] = []

    def make(program: Program, compiled: Mapping[str, CompiledKernel]) -> PrefillPlan:
        made.append(program)
        return maker(small)(program, compiled)

    with engine_with(small, make, driver, graph=True) as engine:
        engine.feed(ids[:33])
        logits = engine.logits()
        engine.adopt(engine.program, engine.compiled)
        engine.reset()
        engine.feed(ids[:33])
        assert engine.logits().tobytes() == logits.tobytes()
        assert len(made) == 1


def test_a_chunk_is_timed_and_leaves_the_engine_usable(
    small: Path, by_steps: dict[int, np.ndarray], ids: list[int], driver: Driver
) -> None:
    with engine_with(small, maker(small), driver, graph=True) as engine:
        for position in (0, 768 - 40):
            assert (engine.chunk_times(ids[:40], 3, position) > 0).tolist() == [True] * 3
        with pytest.raises(UsageError, match="40 tokens from position 729 exceed the context of 768"):
            engine.chunk_times(ids[:40], 1, 729)
        assert engine.position == 0
        with pytest.raises(UsageError, match=r"513 tokens do not go in by one chunk: own kernels, 512 tokens at once"):
            engine.chunk_times(ids[:513], 1)
        engine.feed(ids[:33])
        assert divergence(by_steps[33], engine.logits()) <= 5e-5
    with (
        engine_with(small, None, driver) as engine,
        pytest.raises(UsageError, match="40 tokens do not go in by one chunk: token by token: switched off"),
    ):
        engine.chunk_times(ids[:40], 1)


OF_PROMPTS = tuple(step.name for step in PIPELINE if Regime.MANY in step.regimes and not step.lowering)


@pytest.mark.parametrize("disable", [*[(name,) for name in OF_PROMPTS], OF_PROMPTS], ids="+".join)
def test_a_pass_that_is_disabled_is_off_in_prompts_too(
    disable: tuple[str, ...], small: Path, by_steps: dict[int, np.ndarray], ids: list[int], chunked: Session
) -> None:
    """By other kernels, and still by chunks."""
    fused = chunked.engine
    with open_session(small, SessionOptions("host", prefill="own", disable=disable, **OPTIONS)) as session:
        session.feed(ids[:33])
        assert session.prefill == f"own kernels, {PREFILL_ROWS} tokens at once"
        assert divergence(by_steps[33], session.engine.logits()) <= 5e-5
        assert isinstance(session.engine, Engine)
        assert isinstance(fused, Engine)
        fused.prepare_prefill()
        launches = [len(engine.program.step(PREFILL).launches) for engine in (session.engine, fused)]
        assert launches[0] > launches[1]


def test_ways_that_do_not_exist(small: Path) -> None:
    with pytest.raises(UsageError, match="choose one of auto, own, library, off"):
        open_session(small, SessionOptions("host", prefill="fast"))
    with pytest.raises(UsageError, match="the backend host has no library"):
        open_session(small, SessionOptions("host", prefill="library"))
    for prefill in ("own", "library"):
        with pytest.raises(
            UsageError, match=f"^prefill {prefill}: numpy takes prompts in token by token; take auto or"
        ):
            open_session(small, SessionOptions("cpu", prefill=prefill))
