"""use_sampler: what goes and what arrives, and that the pipeline keeps the numbers."""

import pytest
import small_models
from small_models import Small, assert_same_steps, integers, random_weights, run_steps

from psigraph.ir.errors import UsageError
from psigraph.ir.text import parse_graph, print_graph
from psigraph.ir.verify import verify
from psigraph.passes.pipeline import run_pipeline
from psigraph.passes.use_sampler import use_sampler
from psigraph.text.sampler import SamplerSettings

SETTINGS = SamplerSettings(temperature=2.0, repetition_penalty=1.2, frequency_penalty=0.1, penalty_window=5, seed=8)


def decode(graph, weights, settings, steps=6, **options):
    first = {"tokens": integers(5), "sampler": settings.words(48)}
    return run_steps(graph, weights, [first, *[{}] * (steps - 1)], **options)


@pytest.mark.parametrize("outputs", [(), ("logits",)])
def test_argmax_becomes_adjust_and_draw(outputs):
    graph = use_sampler(Small().graph(*outputs))
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    assert [node.op for node in graph.nodes[-5:]] == ["adjust", "draw", "record", "stop_on", "advance"]
    assert graph.param("history").type.shape == graph.param("log").type.shape
    assert [name for name, _ in graph.results][-1 - len(outputs) :] == ["history", *outputs]
    fused, reports = run_pipeline(graph)
    assert [node.op for node in fused.nodes[-3:]] == ["scaled_matvec", "adjust", "draw_choose"]
    assert next(report for report in reports if report.name == "fuse_choice").matches == 1


@pytest.mark.parametrize("disabled", [(), ("fuse_choice",), ("defer_norm",)])
def test_fused_and_unfused_draw_the_same(disabled):
    graph = use_sampler(Small().graph("logits"))
    weights = random_weights(graph)
    fused, _ = run_pipeline(graph, disabled)
    wanted = decode(graph, weights, SETTINGS)
    assert_same_steps(wanted, decode(fused, weights, SETTINGS, exact_activations=True))
    tokens = [int(step["tokens"][0]) for step in wanted]
    assert wanted[-1]["history"][0, :6].tolist() == [5, *tokens[:5]]
    assert wanted[-1]["log"][0, :6].tolist() == tokens


def test_a_temperature_of_zero_is_the_greedy_graph():
    plain = Small().graph("logits")
    weights = random_weights(plain)
    greedy = [int(step["tokens"][0]) for step in small_models.decode(plain, weights, steps=6)]
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-3}):
        found = decode(use_sampler(plain), weights, SamplerSettings(**options))
        assert [int(step["tokens"][0]) for step in found] == greedy


def test_graphs_that_do_not_choose_one_token():
    graph = use_sampler(Small().graph())
    with pytest.raises(UsageError, match="qwen3 cannot sample"):
        use_sampler(graph)
