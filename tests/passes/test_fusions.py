"""Every pass: what goes and what arrives, that the numbers stay, and how often it matches."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from small_models import Small, assert_same_steps, decode, random_weights

from psigraph.ir.errors import UsageError
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify
from psigraph.passes.gallery import gallery
from psigraph.passes.pipeline import PIPELINE, run_pipeline

LAYERS = 3

# name: (matches, ops that are gone, ops that arrived), for LAYERS layers of Qwen3.
EXPECTED = {
    "merge_qkv": (LAYERS, {"matvec": 2 * LAYERS}, {}),
    "fuse_swiglu": (LAYERS, {"matvec": 2 * LAYERS, "swiglu": LAYERS}, {"matvec_swiglu": LAYERS}),
    "defer_norm": (
        2 * LAYERS + 1,
        {"rms_norm": 2 * LAYERS + 1, "matvec": LAYERS + 1, "matvec_swiglu": LAYERS},
        {"mul": 2 * LAYERS + 1, "rms_factor": 2 * LAYERS + 1, "scaled_matvec": LAYERS + 1, "scaled_swiglu": LAYERS},
    ),
    "fuse_residual": (2 * LAYERS, {"matvec": 2 * LAYERS, "add": 2 * LAYERS}, {"matvec_add": 2 * LAYERS}),
    "fuse_rope_append": (
        LAYERS,
        {"split_heads": 3 * LAYERS, "rms_norm": 2 * LAYERS, "rope": 2 * LAYERS, "cache_append": 2 * LAYERS},
        {"rope_append": LAYERS},
    ),
    "fuse_attention": (
        LAYERS,
        {"rope_append": LAYERS, "attention": LAYERS, "merge_heads": LAYERS},
        {"rope_attention": LAYERS},
    ),
    "fuse_choice": (
        1,
        {"argmax": 1, "record": 1, "stop_on": 1, "advance": 1, "scaled_matvec": 1},
        {"scaled_matvec_choose": 1},
    ),
    "norm_in_producer": (
        2 * LAYERS + 1,
        {"mul": 2 * LAYERS + 1, "rms_factor": 2 * LAYERS + 1, "matvec_add": 2 * LAYERS, "embed": 1},
        {"matvec_add_norm": 2 * LAYERS, "embed_norm": 1},
    ),
    "quantize_activations": (4 * LAYERS + 1, {}, {"quantize": 4 * LAYERS + 1}),
    "quantize_in_producer": (4 * LAYERS + 1, {"quantize": 4 * LAYERS + 1}, {}),
}


def stages(graph, disable=()):
    seen = []
    final, reports = run_pipeline(graph, disable, lambda name, stage: seen.append((name, stage)))
    return final, {report.name: report for report in reports}, seen


def ops(graph):
    return Counter(node.op for node in graph.nodes)


def test_expectations_cover_the_pipeline():
    assert list(EXPECTED) == [step.name for step in PIPELINE]


@pytest.mark.parametrize("outputs", [(), ("logits",)])
def test_three_proofs(outputs):
    graph = Small(layers=LAYERS).graph(*outputs)
    weights = random_weights(graph)
    _, reports, seen = stages(graph)
    wanted = decode(graph, weights)
    assert seen[0] == ("input", graph)
    for (_, before), (name, after) in pairwise(seen):
        matches, gone, arrived = EXPECTED[name]
        assert reports[name].matches == matches, name
        assert ops(before) - ops(after) == Counter(gone), name
        assert ops(after) - ops(before) == Counter(arrived), name
        assert (reports[name].nodes_before, reports[name].nodes_after) == (len(before.nodes), len(after.nodes))
        assert_same_steps(wanted, decode(after, weights, exact_activations=True))


def test_a_layer_of_qwen3_is_five_nodes():
    graph, _ = run_pipeline(Small(layers=2).graph())
    layer = ["scaled_matvec", "rope_attention", "matvec_add_norm", "scaled_swiglu", "matvec_add_norm"]
    assert [node.op for node in graph.nodes] == ["embed_norm", *layer, *layer, "scaled_matvec_choose"]
    quantized = [out.name for node in graph.nodes for out in node.outs if out.type.dtype == "i8x2"]
    assert quantized == ["L0.h.s", "L0.a", "L0.h.2.s", "L0.act", "L1.h.s", "L1.a", "L1.h.2.s", "L1.act", "h.s"]


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


@pytest.mark.parametrize("name", [step.name for step in PIPELINE if not step.lowering])
def test_each_pass_can_be_disabled(name):
    graph = Small(layers=2).graph("logits")
    weights = random_weights(graph)
    fused, reports, _ = stages(graph, (name,))
    assert reports[name].disabled
    assert reports[name].matches == 0
    assert [report.name for report in reports.values() if report.disabled] == [name]
    assert_same_steps(decode(graph, weights), decode(fused, weights, exact_activations=True))


def test_unknown_and_needed_passes():
    graph = Small().graph()
    with pytest.raises(UsageError, match=r"merge does not exist; these can be disabled: merge_qkv, fuse_swiglu, "):
        run_pipeline(graph, ("merge",))
    with pytest.raises(UsageError, match="quantize_activations is a lowering"):
        run_pipeline(graph, ("quantize_activations",))


HEAD = """graph g(weight %w: f16[32,32], weight %u: f16[32,32], weight %n: f32[32], state %x: f32[32]) {
"""


@pytest.mark.parametrize(
    ("name", "body"),
    [
        # The gate's product has another reader; the up product is a result.
        ("fuse_swiglu", """%g: f32[32] = matvec(%x, %w)
                           %v: f32[32] = matvec(%x, %u)
                           %s: f32[32] = swiglu(%g, %v)
                           %z: f32[32] = add(%s, %g)
                           return x=%z"""),
        ("fuse_swiglu", """%g: f32[32] = matvec(%x, %w)
                           %v: f32[32] = matvec(%x, %u)
                           %s: f32[32] = swiglu(%g, %v)
                           return x=%s, v=%v"""),
        # Products of different vectors.
        ("fuse_swiglu", """%y: f32[32] = mul(%x, %n)
                           %g: f32[32] = matvec(%x, %w)
                           %v: f32[32] = matvec(%y, %u)
                           %s: f32[32] = swiglu(%g, %v)
                           return x=%s"""),
        ("merge_qkv", """%a: f32[32] = matvec(%x, %w)
                         %b: f32[32] = matvec(%a, %u)
                         return x=%b"""),
        # The second product of %x needs the first one.
        ("defer_norm", """%h: f32[32] = rms_norm(%x, %n) {eps=1e-06}
                          %a: f32[32] = matvec(%h, %w)
                          %z: f32[32] = add(%a, %h)
                          return x=%z"""),
        ("defer_norm", """%h: f32[32] = rms_norm(%x, %n) {eps=1e-06}
                          %a: f32[32] = matvec(%h, %w)
                          return x=%a, h=%h"""),
        ("fuse_residual", """%a: f32[32] = matvec(%x, %w)
                             %z: f32[32] = add(%x, %a)
                             return x=%z, a=%a"""),
        # The residual would be the product itself.
        ("fuse_residual", """%a: f32[32] = matvec(%x, %w)
                             %z: f32[32] = add(%a, %a)
                             return x=%z"""),
        ("norm_in_producer", """%a: f32[32] = matvec_add(%x, %w, %x)
                                %b: f32[32] = matvec_add(%x, %u, %x)
                                %s: f32[32] = mul(%a, %n)
                                %f: f32[1] = rms_factor(%b) {eps=1e-06}
                                return x=%s, f=%f"""),
    ],
)  # fmt: skip
def test_what_must_stay(name, body):
    graph = parse_graph(HEAD + body + "\n}")
    verify(graph)
    _, reports, _ = stages(graph)
    assert reports[name].matches == 0


def test_a_match_that_cannot_be_ordered_is_refused():
    # %s reads what norm_in_producer would replace, and the weights of the norm come from %f.
    graph = parse_graph(
        HEAD
        + """%a: f32[32] = matvec_add(%x, %w, %x)
             %f: f32[1] = rms_factor(%a) {eps=1e-06}
             %m: f32[32] = scaled_matvec(%a, %f, %u)
             %s: f32[32] = mul(%a, %m)
             return x=%s
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["norm_in_producer"].matches == 0
    assert fused.nodes == graph.nodes


def test_readers_in_between_move_behind_the_fused_node():
    graph = parse_graph(
        HEAD
        + """%a: f32[32] = matvec_add(%x, %w, %x)
             %z: f32[32] = swiglu(%a, %a)
             %s: f32[32] = mul(%a, %n)
             %f: f32[1] = rms_factor(%a) {eps=1e-06}
             %y: f32[32] = scaled_matvec(%s, %f, %u)
             %r: f32[32] = add(%y, %z)
             return x=%r
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["norm_in_producer"].matches == 1
    assert [node.op for node in fused.nodes] == ["matvec_add_norm", "swiglu", "scaled_matvec", "add"]


def test_merging_takes_at_most_three_weights():
    lines = "\n".join(f"%y{index}: f32[32] = matvec(%x, %w)" for index in range(4))
    fused, _, _ = stages(parse_graph(f"{HEAD}{lines}\nreturn x=%y0, a=%y1, b=%y2, c=%y3\n}}"))
    assert [len(node.outs) for node in fused.nodes] == [3, 1]


def test_quantizing_keeps_what_others_read():
    graph = parse_graph(
        HEAD.replace("f16", "q8_0")
        + """%s: f32[32] = mul(%x, %n)
             %y: f32[32] = matvec(%s, %w)
             %z: f32[32] = matvec_add(%s, %u, %y)
             %r: f32[32] = add(%z, %s)
             return x=%r
           }"""
    )
    fused, reports, _ = stages(graph)
    assert reports["quantize_activations"].matches == 1
    assert reports["quantize_in_producer"].matches == 0
    assert ops(fused) == {"mul": 1, "quantize": 1, "matvec": 1, "matvec_add": 1, "add": 1}


def test_the_documentation_carries_the_gallery():
    text = (Path(__file__).parents[2] / "docs" / "passes.md").read_text(encoding="utf-8")
    assert gallery() in text
