"""Every pass, over one row, few and many: that it matches, what it changes, and that the numbers stay.

A new pass is tested here as soon as it stands in PIPELINE.
"""

import inspect
import re
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from small_models import OTHER_LINES, ROWS, Small, assert_same_steps, decode, only, random_weights, row_feeds, run_steps

from psigraph.ir.errors import UsageError
from psigraph.ir.ops import OPS
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify
from psigraph.passes.drop_choice import drop_choice
from psigraph.passes.drop_unused import drop_unused
from psigraph.passes.pipeline import PIPELINE, run_pipeline

MODEL = Small(layers=3, context=32, sequences=2)
GIVEN = {"tokens", "positions", "log", "stop"}  # what a prompt's rows have no choice of


@cache
def proof(regime, outputs=("logits",), lines=()):
    """(graph, weights, feeds, the graph's own results)."""
    graph = replace(MODEL, lines=lines).graph(*outputs, rows=ROWS[regime])
    weights, feeds = random_weights(graph), row_feeds(ROWS[regime])
    return graph, weights, feeds, run_steps(graph, weights, feeds)


def assert_same_results(regime, after, outputs=("logits",), lines=()):
    """A pass may drop what a prompt does not ask for, and nothing else."""
    graph, weights, feeds, wanted = proof(regime, outputs, lines)
    left = {name for name, _ in graph.results} - {name for name, _ in after.results}
    assert left <= ({*GIVEN, *outputs} if regime is Regime.MANY else set())
    found = run_steps(after, weights, feeds, exact_activations=True)
    assert_same_steps(only(dict(after.results), wanted), found)


def stages(graph, disable=(), regime=Regime.STEP):
    seen = []
    final, reports = run_pipeline(graph, disable, lambda name, stage: seen.append((name, stage)), regime)
    return final, {report.name: report for report in reports}, seen


def ops(graph):
    return Counter(node.op for node in graph.nodes)


def documented(step):
    """The ops that the text of a pass names."""
    text = inspect.getdoc(sys.modules[step.function.__module__])
    return set(re.findall(r"\w+", text)) & OPS.keys()


def passes_of(regime, optional=False):
    return [step for step in PIPELINE if regime in step.regimes and not (optional and step.lowering)]


PASSES = [(step.name, regime) for regime in Regime for step in passes_of(regime, optional=True)]


MODELS = {"Qwen3": (), **OTHER_LINES}


@pytest.mark.parametrize("outputs", [(), ("logits",)])
@pytest.mark.parametrize("regime", Regime)
@pytest.mark.parametrize("model", MODELS)
def test_each_pass_does_what_its_text_says_and_the_numbers_stay(model, regime, outputs):
    lines = MODELS[model]
    graph = proof(regime, outputs, lines)[0]
    _, reports, seen = stages(graph, regime=regime)
    assert seen[0] == ("input", graph)
    assert [name for name, _ in seen[1:]] == [step.name for step in passes_of(regime)]
    for step, (_, before), (name, after) in zip(passes_of(regime), seen, seen[1:], strict=False):
        report = reports[name]
        assert bool(report.matches) == (after != before), name
        changed = (ops(before) - ops(after)) + (ops(after) - ops(before))
        # What depends on a choice, or serves nothing, may be any op.
        if step.function not in (drop_choice, drop_unused):
            assert changed.keys() <= documented(step), f"the text of passes/{name}.py does not say what it changes"
        assert (report.nodes_before, report.nodes_after) == (len(before.nodes), len(after.nodes))
        if report.matches:
            assert_same_results(regime, after, outputs, lines)


@pytest.mark.parametrize("regime", Regime)
def test_each_pass_finds_something(regime):
    found = set()
    for lines in MODELS.values():
        _, reports, _ = stages(proof(regime, ("logits",), lines)[0], regime=regime)
        found |= {name for name, report in reports.items() if report.matches}
    for step in passes_of(regime):
        assert step.name in found, (
            f"{step.name} finds nothing over {regime}: not its regime, not its place, or a fusion of an op that no "
            "model of tests has (OTHER_LINES in tests/support/small_models.py)"
        )


@pytest.mark.parametrize(("name", "regime"), PASSES)
def test_each_pass_can_be_disabled(name, regime):
    fused, reports, _ = stages(proof(regime)[0], (name,), regime)
    assert reports[name].disabled
    assert reports[name].matches == 0
    assert [report.name for report in reports.values() if report.disabled] == [name]
    assert_same_results(regime, fused)


@pytest.mark.parametrize("regime", Regime)
def test_all_passes_can_be_disabled(regime):
    names = [step.name for step in passes_of(regime, optional=True)]
    fused, reports, _ = stages(proof(regime)[0], names, regime)
    assert {report.name for report in reports.values() if report.matches} <= {
        step.name for step in PIPELINE if step.lowering
    }
    assert_same_results(regime, fused)


def test_a_pass_says_why_it_stands_where_it_stands():
    for step in PIPELINE:
        assert step.reason, step.name
        assert step.regimes, f"{step.name} serves no number of rows"
    assert len({step.name for step in PIPELINE}) == len(PIPELINE)


# What a layer of Qwen3 becomes, behind what stands before it and in front of what stands after the last.
LAYER = ["scaled_matvec", "rope_attention", "matvec_add_norm", "scaled_swiglu", "matvec_add_norm"]
LAYER_OF_ROWS = ["rms_norm", "matvec", "rope_append", "attention", "merge_heads", "matvec_add",
                 "rms_norm", "matvec_swiglu", "matvec_add"]  # fmt: skip
QWEN3 = {
    Regime.STEP: ["embed_norm", *LAYER * 3, "scaled_matvec_choose"],
    Regime.FEW: ["embed", *LAYER_OF_ROWS * 3, "rms_norm", "matvec_choose"],
    # Of the last layer only the caches are asked for. merge_heads is a view.
    Regime.MANY: ["embed", *LAYER_OF_ROWS * 2, *LAYER_OF_ROWS[:3]],
}


@pytest.mark.parametrize("regime", Regime)
def test_what_qwen3_becomes(regime):
    fused, _ = run_pipeline(proof(regime)[0], regime=regime)
    assert [node.op for node in fused.nodes] == QWEN3[regime]
    assert all(node.origin for node in fused.nodes), "nodes say where in the spec they come from"
    types = {out.name: str(out.type) for node in fused.nodes for out in node.outs}
    special = {
        name: type_ for name, type_ in types.items() if type_.startswith(("i8x2", "f16")) and "cache" not in name
    }
    if regime is Regime.STEP:
        layers = [f"L{layer}.{name}" for layer in range(3) for name in ("h.s", "a", "h.2.s", "act")]
        assert list(special) == [*layers, "h.s"]
        assert special["h.s"] == "i8x2[1,256]"
    else:
        rows = ROWS[regime]
        of_layer = [f"L0.{name}" for name in ("h", "q_rotated", "a_heads", "a", "h.2", "act")]
        assert [name for name in special if name.startswith("L0")] == of_layer
        assert (types["x"], special["L0.h"], special["L0.act"]) == tuple(
            f"{dtype}[{rows},{columns}]" for dtype, columns in (("f32", 256), ("f16", 256), ("f16", 512))
        )
        assert special["L0.q_rotated"] == special["L0.a_heads"] == f"f16[{rows},4,128]"


def test_origins_of_a_fused_node_are_those_of_its_parts():
    graph = Small().graph()
    lines = {origin.line for node in graph.nodes for origin in node.origin}
    fused, _ = run_pipeline(graph)
    assert {origin.line for node in fused.nodes for origin in node.origin} == lines
    for node in fused.nodes:
        assert list(node.origin) == sorted(set(node.origin))


def test_float_weights_keep_f32_activations():
    graph, reports = run_pipeline(Small(dtype="bf16").graph())
    assert reports[-2].matches == reports[-1].matches == 0
    assert not any(out.type.dtype == "i8x2" for node in graph.nodes for out in node.outs)


def test_mixed_families_are_not_merged():
    mixed = Small(dtypes=(("attn_v", "f16"), ("ffn_up", "f32"), ("ffn_down", "q8_0")))
    graph = mixed.graph("logits")
    fused, reports, _ = stages(graph)
    assert reports["fuse_swiglu"].matches == 0
    assert [len(node.outs) for node in fused.nodes if node.op == "scaled_matvec"] == [2, 1, 1, 1]
    # A vector that both families read stays f32, beside a quantized copy.
    assert ops(fused)["quantize"] == 2
    weights = random_weights(graph)
    assert_same_steps(decode(graph, weights), decode(fused, weights, exact_activations=True))


def test_rounding_of_activations_is_small():
    graph = Small(layers=2).graph("logits")
    weights = random_weights(graph)
    fused, _ = run_pipeline(graph)
    exact, rounded = decode(graph, weights, steps=2), decode(fused, weights, steps=2)
    assert any((a["logits"] != b["logits"]).any() for a, b in zip(exact, rounded, strict=True))
    # i8x2 is off by 1.6e-5 of the group's largest value, in nine products one behind the other.
    assert_same_steps(exact, rounded, atol=5e-3)


def test_unknown_and_needed_passes():
    graph = Small().graph()
    with pytest.raises(UsageError, match=r"merge does not exist; these can be disabled: merge_qkv, fuse_swiglu, "):
        run_pipeline(graph, ("merge",))
    with pytest.raises(UsageError, match="quantize_activations is a lowering"):
        run_pipeline(graph, ("quantize_activations",))


HEAD = """graph g(weight %w: f16[32,32], weight %u: f16[32,32], weight %n: f32[32], state %x: f32[1,32]) {
"""


@pytest.mark.parametrize(
    ("name", "body"),
    [
        # The gate's product has another reader; the up product is a result.
        ("fuse_swiglu", """%g: f32[1,32] = matvec(%x, %w)
                           %v: f32[1,32] = matvec(%x, %u)
                           %s: f32[1,32] = swiglu(%g, %v)
                           %z: f32[1,32] = add(%s, %g)
                           return x=%z"""),
        ("fuse_swiglu", """%g: f32[1,32] = matvec(%x, %w)
                           %v: f32[1,32] = matvec(%x, %u)
                           %s: f32[1,32] = swiglu(%g, %v)
                           return x=%s, v=%v"""),
        # Products of different vectors.
        ("fuse_swiglu", """%y: f32[1,32] = mul(%x, %n)
                           %g: f32[1,32] = matvec(%x, %w)
                           %v: f32[1,32] = matvec(%y, %u)
                           %s: f32[1,32] = swiglu(%g, %v)
                           return x=%s"""),
        ("merge_qkv", """%a: f32[1,32] = matvec(%x, %w)
                         %b: f32[1,32] = matvec(%a, %u)
                         return x=%b"""),
        # The second product of %x needs the first one.
        ("defer_norm", """%h: f32[1,32] = rms_norm(%x, %n) {eps=1e-06}
                          %a: f32[1,32] = matvec(%h, %w)
                          %z: f32[1,32] = add(%a, %h)
                          return x=%z"""),
        ("defer_norm", """%h: f32[1,32] = rms_norm(%x, %n) {eps=1e-06}
                          %a: f32[1,32] = matvec(%h, %w)
                          return x=%a, h=%h"""),
        ("fuse_residual", """%a: f32[1,32] = matvec(%x, %w)
                             %z: f32[1,32] = add(%x, %a)
                             return x=%z, a=%a"""),
        # The residual would be the product itself.
        ("fuse_residual", """%a: f32[1,32] = matvec(%x, %w)
                             %z: f32[1,32] = add(%a, %a)
                             return x=%z"""),
        ("norm_in_producer", """%a: f32[1,32] = matvec_add(%x, %w, %x)
                                %b: f32[1,32] = matvec_add(%x, %u, %x)
                                %s: f32[1,32] = mul(%a, %n)
                                %f: f32[1,1] = rms_factor(%b) {eps=1e-06}
                                return x=%s, f=%f"""),
        # Multiplied with a value of each row, not with the weights of a norm.
        ("norm_in_producer", """%a: f32[1,32] = matvec_add(%x, %w, %x)
                                %s: f32[1,32] = mul(%a, %x)
                                %f: f32[1,1] = rms_factor(%a) {eps=1e-06}
                                return x=%s, f=%f"""),
    ],
)  # fmt: skip
def test_what_must_stay(name, body):
    graph = parse_graph(HEAD + body + "\n}")
    verify(graph)
    _, reports, _ = stages(graph)
    assert reports[name].matches == 0


def test_a_match_that_cannot_be_ordered_is_refused():
    # Both are products of %x, but the second one multiplies with what comes of the first one.
    graph = parse_graph(
        """graph g(weight %w: f32[32,32], state %x: f32[32,32]) {
             %a: f32[32,32] = matvec(%x, %w)
             %m: f32[32,32] = mul(%a, %x)
             %b: f32[32,32] = matvec(%x, %m)
             return x=%b
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["merge_qkv"].matches == 0
    assert fused.nodes == graph.nodes


def test_readers_in_between_move_behind_the_fused_node():
    graph = parse_graph(
        HEAD
        + """%a: f32[1,32] = matvec_add(%x, %w, %x)
             %z: f32[1,32] = swiglu(%a, %a)
             %s: f32[1,32] = mul(%a, %n)
             %f: f32[1,1] = rms_factor(%a) {eps=1e-06}
             %y: f32[1,32] = scaled_matvec(%s, %f, %u)
             %r: f32[1,32] = add(%y, %z)
             return x=%r
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["norm_in_producer"].matches == 1
    assert [node.op for node in fused.nodes] == ["matvec_add_norm", "swiglu", "scaled_matvec", "add"]


def test_merging_takes_at_most_three_weights():
    lines = "\n".join(f"%y{index}: f32[1,32] = matvec(%x, %w)" for index in range(4))
    fused, _, _ = stages(parse_graph(f"{HEAD}{lines}\nreturn x=%y0, a=%y1, b=%y2, c=%y3\n}}"))
    assert [len(node.outs) for node in fused.nodes] == [3, 1]


def test_quantizing_keeps_what_others_read():
    graph = parse_graph(
        HEAD.replace("f16", "q8_0")
        + """%s: f32[1,32] = mul(%x, %n)
             %y: f32[1,32] = matvec(%s, %w)
             %z: f32[1,32] = matvec_add(%s, %u, %y)
             %r: f32[1,32] = add(%z, %s)
             return x=%r
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["quantize_activations"].matches == 1
    assert reports["quantize_in_producer"].matches == 0
    assert ops(fused) == {"mul": 1, "quantize": 1, "matvec": 1, "matvec_add": 1, "add": 1}
