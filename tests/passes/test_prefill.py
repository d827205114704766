"""The schedule of a prompt: what a step becomes over a sequence, and that it leaves what token by token leaves."""

import numpy as np
import pytest
from small_models import Small, random_weights

from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.interpret import Interpreter
from psigraph.ir.text import parse_graph, print_graph
from psigraph.ir.verify import verify
from psigraph.passes.drop_unused import drop_unused
from psigraph.passes.halve_activations import halve_activations
from psigraph.passes.over_sequence import over_sequence
from psigraph.passes.prefill import prefill_graph
from psigraph.passes.use_sampler import use_sampler
from psigraph.text.sampler import SamplerSettings

IDS = [5, 9, 2, 41, 7, 7, 30]
FIRST, ROWS = 3, 6  # tokens before the chunk; its rows, of which four count


def by_steps(graph, weights, ids, interpreter):
    """The states after a step for each id; the ids are given, not chosen."""
    states = interpreter.initial_state(graph)
    if any(param.name == "sampler" for param in graph.params):
        states["sampler"] = SamplerSettings(temperature=0.0).words(48)
    for token in ids:
        states["token"] = np.array([token], np.int32)
        results = interpreter.results(graph, interpreter.run(graph, {**weights, **states}))
        states |= {name: array for name, array in results.items() if name in states}
    return states


def by_chunk(step, chunk, weights, interpreter):
    """The first tokens by steps, the others in a chunk with two rows that do not count."""
    before = by_steps(step, weights, IDS[:FIRST], interpreter)
    wanted = {param.name for param in chunk.params if param.kind == "state"}
    states = {name: array for name, array in before.items() if name in wanted}
    rest = IDS[FIRST:]
    states["tokens"] = np.array([[*rest, 1, 1][row] for row in range(ROWS)], np.int32)[:, None]
    states["span"] = np.array([FIRST, len(rest)], np.int32)
    used = {param.name: weights[param.name] for param in chunk.params if param.kind == "weight"}
    return interpreter.results(chunk, interpreter.run(chunk, {**used, **states}))


@pytest.mark.parametrize("sampling", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_chunk_leaves_what_steps_leave(sampling, fused):
    step = Small(layers=2, hidden=64, ffn=96, head_dim=16, dtype="f32").graph()
    step = use_sampler(step) if sampling else step
    chunk = prefill_graph(step, ROWS) if fused else drop_unused(over_sequence(step, ROWS))[0]
    assert parse_graph(print_graph(chunk)) == chunk
    weights = random_weights(step)
    interpreter = Interpreter(cache_dtype="f32", exact_activations=True)
    wanted = by_steps(step, weights, IDS, interpreter)
    got = by_chunk(step, chunk, weights, interpreter)
    assert set(got) == {name for name in wanted if "cache" in name} | {"position"} | (
        {"history"} if sampling else set()
    )
    for name, array in got.items():
        np.testing.assert_allclose(array, wanted[name], rtol=0, atol=1e-10, err_msg=name)
    assert got["position"].tolist() == [len(IDS)]


def test_halves_round_what_products_read():
    step = Small(layers=2, hidden=64, ffn=96, head_dim=16, dtype="f32").graph()
    chunk, weights = prefill_graph(step, ROWS), random_weights(step)
    exact = by_chunk(step, chunk, weights, Interpreter(cache_dtype="f32", exact_activations=True))
    rounded = by_chunk(step, chunk, weights, Interpreter(cache_dtype="f32"))
    error = np.abs(rounded["v_cache.1"] - exact["v_cache.1"]).max()
    assert 1e-5 < error < 1e-2


def test_a_layer_is_eight_nodes_and_the_last_one_three():
    chunk = prefill_graph(Small(layers=3).graph("logits"), 32)
    layer = ["rms_norm", "matvec", "rope_append", "attention", "merge_heads", "matvec_add", "rms_norm",
             "matvec_swiglu", "matvec_add"]  # fmt: skip
    ops = [node.op for node in chunk.nodes]
    assert ops == ["embed", *layer, *layer, *layer[:3], "advance"], "merge_heads is a view"
    assert {param.name for param in chunk.params if param.kind == "state"} >= {"tokens", "span", "position"}
    assert not {"token", "log", "stop", "end_tokens", "output_norm.weight"} & {param.name for param in chunk.params}
    kinds = {out.name: str(out.type) for node in chunk.nodes for out in node.outs}
    assert kinds["x"] == "f32[32,256]"
    assert (kinds["L0.h"], kinds["L0.act"]) == ("f16[32,256]", "f16[32,512]")
    assert kinds["L0.q_turned"] == kinds["L0.a_heads"] == "f16[32,4,128]"
    assert chunk.nodes[1].origin, "nodes say where in the spec they come from"


def test_steps_that_no_sequence_can_stand_for():
    with pytest.raises(UnsupportedModelError, match="no token and position"):
        over_sequence(parse_graph("graph g(state %x: f32[4]) { %y: f32[4] = add(%x, %x) return x=%y }"), 4)
    odd = parse_graph("""graph g(weight %t: f32[8,4], state %token: i32[1], state %position: i32[1]) {
        %x: f32[4] = embed(%t, %token)
        %f: f32[1] = rms_factor(%x) {eps=1e-6}
        return f=%f }""")
    with pytest.raises(UnsupportedModelError, match="rms_factor has no form over a sequence: x is f32"):
        over_sequence(odd, 4)


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
    graph = parse_graph("""graph g(weight %w: f32[4,4], weight %v: f32[4,4], state %x: f32[4]) {
        %a: f32[4] = matvec(%x, %w)
        %b: f32[4] = matvec(%x, %v)
        %c: f32[4] = add(%b, %b)
        return x=%a }""")
    kept, gone = drop_unused(graph)
    verify(kept)
    assert (gone, [node.op for node in kept.nodes], [param.name for param in kept.params]) == (
        2,
        ["matvec"],
        ["w", "x"],
    )
