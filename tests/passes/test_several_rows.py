"""What is for several rows: that they leave what a step for each of them leaves, and the passes of a prompt."""

from functools import cache

import numpy as np
import pytest
from small_models import ROWS, Small, integers, random_weights, row_feeds, run_steps

from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify
from psigraph.passes.drop_choice import drop_choice
from psigraph.passes.drop_unused import drop_unused
from psigraph.passes.halve_activations import halve_activations
from psigraph.passes.pipeline import run_pipeline
from psigraph.passes.use_sampler import use_sampler
from psigraph.text.sampler import SamplerSettings

SMALL = Small(layers=2, hidden=64, ffn=96, head_dim=16, dtype="f32", context=32, sequences=2)
SETTINGS = SamplerSettings(temperature=2.0, repetition_penalty=1.2, penalty_window=5, seed=8).words(48)
STATES = ("log", "stop", "history", "k_cache.0", "k_cache.1", "v_cache.0", "v_cache.1")


@cache
def built(rows, sampling, regime=None):
    """(graph, fused for the regime if there is one; its weights)."""
    graph = SMALL.graph(rows=rows)
    weights = random_weights(graph)
    graph = use_sampler(graph) if sampling else graph
    graph = graph if regime is None else run_pipeline(graph, regime=regime)[0]
    return graph, {param.name: weights[param.name] for param in graph.params if param.kind == "weight"}


def run(case, feeds, **options):
    """States after the last of the steps, by name."""
    graph, weights = case
    given = {param.name for param in graph.params}
    settings = {"sampler": SETTINGS} if "sampler" in given else {}
    feeds = [{name: array for name, array in {**feed, **settings}.items() if name in given} for feed in feeds]
    last = run_steps(graph, weights, feeds, cache_dtype="f32", **options)[-1]
    return {name: last[name] for name in STATES if name in last}


def row_by_row(feeds):
    """The same rows, each in a step of its own."""
    for feed in feeds:
        for row in range(len(feed["tokens"])):
            yield {name: array[row : row + 1] for name, array in feed.items()}


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("regime", [None, Regime.FEW, Regime.MANY])
def test_rows_leave_what_steps_leave(regime, sampling):
    """Two sequences side by side, and absent rows: unfused and fused, against one fused row at a time."""
    rows = ROWS[regime or Regime.FEW]
    feeds = row_feeds(rows)
    wanted = run(built(1, sampling, Regime.STEP), row_by_row(feeds), exact_activations=True)
    got = run(built(rows, sampling, regime), feeds, exact_activations=True)
    chosen = set() if regime is Regime.MANY else {"log", "stop"}
    asked = {name for name in STATES if "cache" in name} | chosen | ({"history"} if sampling else set())
    assert got.keys() == asked
    for name, array in got.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("regime", [None, Regime.FEW])
def test_a_batch_is_each_sequence_alone(regime):
    """A row for each of the sequences, which feed themselves: tokens are those of a decode step of one sequence."""
    starts, steps = [5, 9], 4
    graph, weights = built(2, False, regime)
    first = {"tokens": integers(*starts), "positions": integers(0, 0), "sequences": integers(0, 1)}
    batch = run_steps(graph, weights, [first, *[{}] * (steps - 1)], exact_activations=True)
    graph, weights = built(1, False)
    for sequence, start in enumerate(starts):
        alone = run_steps(graph, weights, [{"tokens": integers(start)}, *[{}] * (steps - 1)])
        assert [step["tokens"][0] for step in alone] == [step["tokens"][sequence] for step in batch]
        np.testing.assert_array_equal(batch[-1]["log"][sequence], alone[-1]["log"][0])
        assert batch[-1]["positions"][sequence] == steps


@pytest.mark.parametrize("regime", [Regime.FEW, Regime.MANY])
def test_halves_round_what_products_read(regime):
    case, feeds = built(ROWS[regime], False, regime), row_feeds(ROWS[regime])
    exact, rounded = run(case, feeds, exact_activations=True), run(case, feeds)
    error = np.abs(rounded["v_cache.1"] - exact["v_cache.1"]).max()
    assert 1e-5 < error < 1e-2


def test_of_choices_a_prompt_keeps_only_the_history():
    graph = use_sampler(SMALL.graph("logits", rows=4))
    kept, choices = drop_choice(graph)
    verify(kept)
    assert choices == 1
    assert {name for name, _ in kept.results} == {name for name in STATES if "cache" in name} | {"history"}
    (record,) = (node for node in kept.nodes if node.op == "record")
    assert [value.name for value in record.ins] == ["history", "tokens", "positions", "sequences"]
    assert record.origin, "it says where in the spec the choice comes from"
    assert not {"adjust", "draw", "stop_on"} & {node.op for node in kept.nodes}


def test_only_what_products_and_attention_read_becomes_halves():
    graph = parse_graph("""graph g(weight %w: f32[4,4], weight %n: f32[4], state %x: f32[3,4]) {
        %a: f32[3,4] = rms_norm(%x, %n) {eps=1e-6}
        %b: f32[3,4] = matvec(%a, %w)
        %c: f32[3,4] = rms_norm(%b, %n) {eps=1e-6}
        %d: f32[3,4] = matvec(%c, %w)
        %e: f32[3,4] = add(%c, %d)
        %g: f32[3,4] = rms_norm(%e, %n) {eps=1e-6}
        return g=%g }""")
    halved, count = halve_activations(graph)
    verify(halved)
    assert count == 1, "c is added too, g is a result"
    assert {out.name for node in halved.nodes for out in node.outs if out.type.dtype == "f16"} == {"a"}


def test_unused_nodes_and_parameters_go():
    graph = parse_graph("""graph g(weight %w: f32[4,4], weight %v: f32[4,4], state %x: f32[1,4]) {
        %a: f32[1,4] = matvec(%x, %w)
        %b: f32[1,4] = matvec(%x, %v)
        %c: f32[1,4] = add(%b, %b)
        return x=%a }""")
    kept, gone = drop_unused(graph)
    verify(kept)
    assert gone == 2
    assert [node.op for node in kept.nodes] == ["matvec"]
    assert [param.name for param in kept.params] == ["w", "x"]
