"""Models end to end on the host target: generated kernels, stand-in driver, the engine that a GPU gets."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from psigraph.build import build_program, open_model
from psigraph.codegen.target import target_for
from psigraph.numpy_path import NumpyEngine
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.engine import Engine
from psigraph.runtime.synth import model as synth
from psigraph.runtime.synth.model import Size, write_synth

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
QUANTS = ("q4_k_m", "q8_0")
FUSIONS = tuple(step.name for step in PIPELINE if not step.lowering)
MEAN_KL, LARGEST_KL = 2e-4, 1e-3
CLEAR = 0.05  # where the two best logits are closer, a correct engine may choose the other
IDS = np.load(TINY / "reference_logits.npz")["ids"].tolist()
# The tiny model's shapes and types in two layers instead of eight, for what is not about its reference. That no kernel
# of the tiny model has a statement beyond those held against float64 is test_coverage.py's affair.
TWO_LAYERS = Size(layers=2, hidden=256, feed_forward=768, heads=4, kv_heads=2, untied=False, context=2048)
FED, CHOSEN = 12, 4  # tokens that the two layers take in, and that they choose then


@functools.cache
def reference(quant: str) -> np.ndarray:
    """float64 logits of the recorded text, [64, 4096]."""
    return np.load(TINY / "reference_logits.npz")[f"logits_{quant}"].astype(np.float64)


@functools.cache
def greedy() -> dict:
    return json.loads((TINY / "reference_greedy.json").read_text())


@functools.cache
def driver() -> Driver:
    host.activate(sms=4)
    return Driver(0)


@contextmanager
def engine(
    path: Path, graph: bool = True, sm_count: int = 4, disable: tuple[str, ...] = (), **options: object
) -> Iterator[Engine]:
    """An engine with logits."""
    with open_model(path) as model:
        program = build_program(model, target_for("host", sm_count), ("logits",), disable)
        compiled = compile_program(program, "host", KernelCache(None))
        with Engine(driver(), program, compiled, model, graph=graph, **options) as made:
            yield made


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left():
    """Of any engine, when the last one is closed."""
    driver()
    before = host.live()
    yield
    assert host.live() == before


@pytest.fixture(autouse=True)
def _nothing_forbidden_is_done():
    yield
    assert host.violations() == []


@pytest.fixture(scope="module")
def q4():
    with engine(TINY / "tiny-qwen3-q4_k_m.gguf") as made:
        yield made


@pytest.fixture(scope="module")
def q8():
    with engine(TINY / "tiny-qwen3-q8_0.gguf") as made:
        yield made


@dataclass(frozen=True)
class Short:
    """A model of two layers. ids: FED tokens and what it chooses behind them; logits: float64, one row an id."""

    path: Path
    ids: list[int]
    logits: np.ndarray


def made_short(folder: Path, quant: str) -> Short:
    """The reference is the graph of the spec, with no fusion, in numpy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(synth.SIZES, "short", TWO_LAYERS)
        path = write_synth(folder / f"{quant}.gguf", "short", quant, 1, vocab=4096)
    with open_model(path) as model:
        numpy_engine = NumpyEngine(model.graph(("logits",)), model, cache_dtype="f32")
    ids, logits = IDS[:FED], []
    while len(logits) < FED + CHOSEN:
        numpy_engine.feed([ids[len(logits)]])
        logits.append(numpy_engine.logits())
        if len(ids) == len(logits):
            ids.append(int(logits[-1].argmax()))
    return Short(path, ids[: FED + CHOSEN], np.array(logits))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return made_short(tmp_path_factory.mktemp("short"), "q4_k_m")


@pytest.fixture(scope="module")
def short_engine(short):
    with engine(short.path) as made:
        yield made


def divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each position's distribution from the reference."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(want), log_softmax(got)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def assert_logits(got: np.ndarray, want: np.ndarray) -> None:
    """Logits of a text's first positions: close, and the same choice wherever it is clear."""
    want = want[: len(got)]
    kl = divergence(want, got)
    assert kl.mean() <= MEAN_KL
    assert kl.max() <= LARGEST_KL
    two = np.sort(want, axis=-1)[:, -2:]
    clear = two[:, 1] - two[:, 0] >= CLEAR
    np.testing.assert_array_equal(got.argmax(axis=-1)[clear], want.argmax(axis=-1)[clear])


def forced(made: Engine, ids: list[int]) -> np.ndarray:
    made.reset()
    return made.forced_logits(ids)


def continued(made: Engine, ids: list[int], count: int) -> list[int]:
    made.reset()
    made.feed(ids)
    return [token for chunk in made.decode(count) for token in chunk]


@pytest.mark.parametrize("quant", QUANTS)
def test_steps_are_close_to_float64(quant, request):
    made = request.getfixturevalue(quant[:2])
    got = forced(made, IDS)
    assert_logits(got, reference(quant))
    np.testing.assert_array_equal(forced(made, IDS[:24]), got[:24], err_msg="a second run gives other bits")


def test_greedy_tokens_of_q4_k_m_equal_the_reference(q4):
    for name in ("speech", "chat"):
        want = greedy()["greedy"]["q4_k_m"][name]["ids"]
        prompt = greedy()["prompts"][name]["ids"]
        assert continued(q4, prompt, 64) == want
    assert continued(q4, prompt, 64) == want, "a second run gives other tokens"


@pytest.mark.parametrize(
    ("quant", "name"), [("q8_0", "speech"), ("q8_0", "chat"), ("q8_0", "one_token"), ("q4_k_m", "one_token")]
)
def test_forced_choices_equal_the_reference_where_they_are_clear(quant, name, request):
    made = request.getfixturevalue(quant[:2])
    record = greedy()["greedy"][quant][name]
    prompt = greedy()["prompts"][name]["ids"]
    chosen = forced(made, prompt + record["ids"][:-1])[len(prompt) - 1 :].argmax(axis=-1)
    clear = np.array(record["top2_gap"]) >= CLEAR
    np.testing.assert_array_equal(chosen[clear], np.array(record["ids"])[clear])
    assert made.chosen() == chosen[-1]


def assert_short(made: Engine, short: Short) -> None:
    """Close to float64, and the same greedy tokens, which are clear."""
    assert_logits(forced(made, short.ids), short.logits)
    assert continued(made, short.ids[:FED], CHOSEN) == short.ids[FED:]


def test_a_long_process_keeps_no_more_for_its_chunks(short, short_engine):
    """Also where somebody stops reading in the middle."""

    def held() -> tuple[int, int]:
        return len(short_engine.stream._pinned), len(short_engine.stream._events)

    short_engine.reset()
    continued(short_engine, short.ids[:4], 8)
    before = held()
    for count in (8, 8, 40):
        short_engine.reset()
        short_engine.feed(short.ids[:4])
        tokens = short_engine.decode(count, chunk=4)
        next(tokens)
        tokens.close()
    first = held()
    short_engine.reset()
    continued(short_engine, short.ids[:4], 8)
    short_engine.reset()
    short_engine.feed(short.ids[:4])
    list(short_engine.decode(20, chunk=4))
    assert held() == first
    assert first[0] - before[0] <= 3


def test_eager_steps_give_the_bits_of_replayed_ones(short, short_engine):
    with engine(short.path, graph=False) as made:
        np.testing.assert_array_equal(forced(made, IDS[:24]), forced(short_engine, IDS[:24]))


def test_logits_are_kept_and_a_view_of_them_is_not(short_engine):
    want = forced(short_engine, IDS[:2])
    short_engine.reset()
    short_engine.feed(IDS[:1])
    kept, view = short_engine.logits(), short_engine.logits_view()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0
    short_engine.feed(IDS[1:2])
    np.testing.assert_array_equal(short_engine.logits_view(), want[1])
    np.testing.assert_array_equal(kept, want[0])
    np.testing.assert_array_equal(view, want[1])


@pytest.mark.parametrize("sm_count", [3, 132])
def test_other_numbers_of_multiprocessors(sm_count, short):
    """Other grids, other orders of addition: close to float64 all the same, and the same greedy tokens."""
    with engine(short.path, sm_count=sm_count) as made:
        assert_short(made, short)


@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_the_order_of_threads_does_not_show(order, short_engine):
    want = forced(short_engine, IDS[:4])
    host.set_order(order)
    try:
        np.testing.assert_array_equal(forced(short_engine, IDS[:4]), want)
    finally:
        host.set_order("forward")


@pytest.mark.parametrize("disable", [*[(name,) for name in FUSIONS], FUSIONS], ids=lambda names: "+".join(names)[:40])
def test_any_fusion_may_be_disabled(disable, short):
    """The graph computes the same with other kernels; unfused ones are held to the same bars."""
    with engine(short.path, disable=disable) as made:
        assert_short(made, short)


def test_all_fusions_disabled_on_q8_0(tmp_path):
    short = made_short(tmp_path, "q8_0")
    with engine(short.path, graph=False, disable=FUSIONS) as made:
        assert_short(made, short)
