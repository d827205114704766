"""Printing and parsing are inverse; unreadable text is shown with its line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import Small

from psigraph.ir.errors import SpecError
from psigraph.ir.graph import Graph, Node, Origin, Param, TensorType, Value
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph, print_graph, print_node
from psigraph.passes.pipeline import run_pipeline

TEXT = """graph tail(
  weight %w.1: q4_k[256,256],
  state %x: f32[1,256]
) {
  %y: f32[1,256] = matvec(%x, %w.1)   # q.yaml:3
  %z: f32[1,256] = add(%y, %x)   # q.yaml:4, q.yaml:5
  return x=%z
}
"""


def origins(graph):
    return [node.origin for node in graph.nodes]


def test_text_form():
    graph = parse_graph(TEXT)
    assert print_graph(graph) == TEXT
    assert graph.nodes[1].origin == (Origin("q.yaml", 4), Origin("q.yaml", 5))
    assert graph.results == (("x", graph.nodes[1].out),)


@pytest.mark.parametrize(("regime", "rows"), [(Regime.STEP, 1), (Regime.FEW, 3), (Regime.MANY, 20)])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_of_a_model_at_every_stage(tied, regime, rows):
    seen = []
    graph = Small(layers=2, tied=tied, sequences=2).graph("logits", rows=rows)
    run_pipeline(graph, observe=lambda name, stage: seen.append(stage), regime=regime)
    for graph in seen:
        again = parse_graph(print_graph(graph))
        assert again == graph
        assert origins(again) == origins(graph)
        assert print_graph(again) == print_graph(graph)


LITERALS = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=12),
    st.tuples() | st.tuples(st.integers(-9, 9)) | st.tuples(st.integers(), st.integers()),
)


@given(st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_.]{0,8}", fullmatch=True), LITERALS, max_size=4))
@settings(max_examples=80, deadline=None)
def test_round_trip_of_literals(attrs):
    x = Value("x", TensorType("f32", (4,)))
    node = Node((Value("y", x.type),), "any", (x,), tuple(attrs.items()))
    graph = Graph("g", (Param("state", x),), (node,), (("x", node.out),))
    again = parse_graph(print_graph(graph))
    assert again == graph
    # 1 == True == 1.0 in Python: the kinds must survive too.
    assert [type(value) for _, value in again.nodes[0].attrs] == [type(value) for _, value in node.attrs]


def test_one_layer_shows_its_nodes_and_what_they_read():
    graph, _ = run_pipeline(Small(layers=3).graph())
    text = print_graph(graph, layer=1)
    assert "blk.1.attn_q.weight" in text
    assert "blk.0.attn_q" not in text
    assert text.count(" = ") == 5


def test_node_without_origin():
    node = parse_graph(TEXT).nodes[0]
    assert print_node(node, origin=False) == "%y: f32[1,256] = matvec(%x, %w.1)"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("add(%y, %x)", "add(%y, %q)", "%q is not defined here"),
        ("add(%y, %x)", "add(%y, %x", "expected )"),
        ("%y: f32[1,256] =", "%y =", "%y needs a type"),
        ("return x=%z", "return x=%q", "%q is not defined here"),
        ("f32[1,256] = add", "f32[1,2.5] = add", "whole number"),
        ("add(%y, %x)", "add(%y, %x) {eps=$eps}", "is no literal"),
        ("add(%y, %x)", "add(%y, %x) {a=1, a=2}", "stands twice"),
        ("add(%y, %x)", "add(%y; %x)", "cannot read ';'"),
        ("return x=%z\n}", "", "end of the text"),
    ],
)
def test_unreadable_text(old, new, message):
    with pytest.raises(SpecError, match=r"graph\.ir:\d+: ") as caught:
        parse_graph(TEXT.replace(old, new))
    assert message in str(caught.value)


def test_the_offender_is_underlined():
    with pytest.raises(SpecError) as caught:
        parse_graph(TEXT.replace("add(%y, %x)", "add(%y, %q)"))
    _, line, marks = str(caught.value).split("\n")
    assert line[marks.index("^") : marks.rindex("^") + 1] == "%q"
