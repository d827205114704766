"""The tiny model end to end on the host target: generated kernels, stand-in driver, the engine that a GPU gets."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from psigraph.build import build_program, open_model
from psigraph.codegen.target import target_for
from psigraph.passes.pipeline import PIPELINE
from psigraph.runtime import host
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.driver import Driver
from psigraph.runtime.cuda.kernel_cache import KernelCache
from psigraph.runtime.engine import Engine

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
QUANTS = ("q4_k_m", "q8_0")
FUSIONS = tuple(step.name for step in PIPELINE if not step.lowering)
MEAN_KL, LARGEST_KL = 2e-4, 1e-3
CLEAR = 0.05  # where the two best logits are closer, a correct engine may choose the other
IDS = np.load(TINY / "reference_logits.npz")["ids"].tolist()


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
    quant: str, graph: bool = True, sm_count: int = 4, disable: tuple[str, ...] = (), **options: object
) -> Iterator[Engine]:
    """An engine with logits; afterwards nothing that it took is left, and nothing forbidden was done."""
    gpu = driver()
    before = host.live()
    with open_model(TINY / f"tiny-qwen3-{quant}.gguf") as model:
        program = build_program(model, target_for("host", sm_count), ("logits",), disable)
        compiled = compile_program(program, "host", KernelCache(None))
        with Engine(gpu, program, compiled, model, graph=graph, **options) as made:
            yield made
    assert host.live() == before
    assert host.violations() == []


def divergence(want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each position's distribution from the reference."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(want), log_softmax(got)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=-1))


def assert_logits(got: np.ndarray, quant: str) -> None:
    """Logits of the recorded text's first positions: close, and the same choice wherever it is clear."""
    want = reference(quant)[: len(got)]
    kl = divergence(want, got)
    assert kl.mean() <= MEAN_KL
    assert kl.max() <= LARGEST_KL
    two = np.sort(want, axis=-1)[:, -2:]
    clear = two[:, 1] - two[:, 0] >= CLEAR
    np.testing.assert_array_equal(got.argmax(axis=-1)[clear], want.argmax(axis=-1)[clear])


def continued(made: Engine, ids: list[int], count: int) -> list[int]:
    made.reset()
    made.feed(ids)
    return [token for chunk in made.decode(count) for token in chunk]


@pytest.mark.parametrize("quant", QUANTS)
def test_replayed_and_eager_steps_are_close_to_float64(quant):
    with engine(quant) as made:
        got = made.forced_logits(IDS)
        assert_logits(got, quant)
        made.reset()
        np.testing.assert_array_equal(made.forced_logits(IDS), got, err_msg="a second run gives other bits")
    with engine(quant, graph=False) as made:
        np.testing.assert_array_equal(made.forced_logits(IDS[:24]), got[:24], err_msg="eager gives other bits")


def test_greedy_tokens_of_q4_k_m_equal_the_reference():
    with engine("q4_k_m") as made:
        for name in ("speech", "chat"):
            want = greedy()["greedy"]["q4_k_m"][name]["ids"]
            prompt = greedy()["prompts"][name]["ids"]
            assert continued(made, prompt, 64) == want
            assert continued(made, prompt, 64) == want, "a second run gives other tokens"


@pytest.mark.parametrize(
    ("quant", "name"), [("q8_0", "speech"), ("q8_0", "chat"), ("q8_0", "one_token"), ("q4_k_m", "one_token")]
)
def test_forced_choices_equal_the_reference_where_they_are_clear(quant, name):
    record = greedy()["greedy"][quant][name]
    prompt = greedy()["prompts"][name]["ids"]
    with engine(quant) as made:
        logits = made.forced_logits(prompt + record["ids"][:-1])[len(prompt) - 1 :]
        chosen = logits.argmax(axis=-1)
        clear = np.array(record["top2_gap"]) >= CLEAR
        np.testing.assert_array_equal(chosen[clear], np.array(record["ids"])[clear])
        assert made.chosen() == chosen[-1]


@pytest.mark.parametrize("sm_count", [3, 132])
def test_other_numbers_of_multiprocessors(sm_count):
    """Other grids, other orders of addition: close to float64 all the same, and the same greedy tokens."""
    with engine("q4_k_m", sm_count=sm_count) as made:
        assert_logits(made.forced_logits(IDS[:32]), "q4_k_m")
        want = greedy()["greedy"]["q4_k_m"]["chat"]["ids"]
        assert continued(made, greedy()["prompts"]["chat"]["ids"], 16) == want[:16]


@pytest.mark.parametrize("order", ["reverse", "shuffle"])
def test_the_order_of_threads_does_not_show(order):
    with engine("q4_k_m") as made:
        want = made.forced_logits(IDS[:4])
        made.reset()
        host.set_order(order)
        try:
            np.testing.assert_array_equal(made.forced_logits(IDS[:4]), want)
        finally:
            host.set_order("forward")


@pytest.mark.parametrize("disable", [*[(name,) for name in FUSIONS], FUSIONS], ids=lambda names: "+".join(names)[:40])
def test_any_fusion_may_be_disabled(disable):
    """The graph computes the same with other kernels; unfused ones are held to the same bars."""
    with engine("q4_k_m", disable=disable) as made:
        assert_logits(made.forced_logits(IDS[:12]), "q4_k_m")
        made.reset()
        want = greedy()["greedy"]["q4_k_m"]["speech"]["ids"]
        assert continued(made, greedy()["prompts"]["speech"]["ids"], 4) == want[:4]


def test_all_fusions_disabled_on_q8_0():
    with engine("q8_0", graph=False, disable=FUSIONS) as made:
        assert_logits(made.forced_logits(IDS[:12]), "q8_0")
