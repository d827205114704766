"""DOT, JSON and the networkx view."""

import json

from small_models import Small

from psigraph.inspect.export import to_dot, to_json
from psigraph.inspect.picture import longest_chain, view
from psigraph.ir.analysis import dependents, last_uses, needed
from psigraph.ir.graph import layer_of
from psigraph.ir.text import parse_graph
from psigraph.passes.pipeline import run_pipeline

FUSED, _ = run_pipeline(Small(layers=2).graph("logits"))


def test_dot():
    text = to_dot(FUSED)
    assert text.count("{") == text.count("}")
    assert text.count('label="scaled_swiglu') == 2
    assert "subgraph cluster_1" in text
    assert ".weight" not in text
    # Every edge ends at a box that is declared.
    boxes = {line.split()[0] for line in text.split("\n") if "[label=" in line and "->" not in line}
    ends = {part for line in text.split("\n") if "->" in line for part in (line.split()[0], line.split()[2])}
    assert {end for end in ends if end.startswith("n")} <= boxes


def test_dot_of_one_layer():
    text = to_dot(FUSED, layer=1)
    assert "cluster_0" not in text
    assert '"k_cache.1"' in text
    assert '"k_cache.0"' not in text


def test_json():
    record = json.loads(to_json(FUSED))
    assert record["schema"] == "psigraph.graph.v1"
    assert [node["op"] for node in record["nodes"]].count("rope_attention") == 2
    assert record["results"]["tokens"] == "tokens.2"
    one = json.loads(to_json(FUSED, layer=0))
    assert [node["layer"] for node in one["nodes"]] == [0] * 5
    assert one["nodes"][0]["origin"][0].startswith("qwen3.yaml:")


def test_reachability():
    reading = [FUSED.nodes[index] for index in dependents(FUSED.nodes, {"k_cache.1"})]
    assert "logits" in {out.name for node in reading for out in node.outs}
    assert all(layer_of(node) != 0 for node in reading)
    assert dependents(FUSED.nodes, {"nothing"}) == set()
    assert view(FUSED).nodes["L0.a"]["node"].op == "rope_attention"


def test_the_fused_step_is_one_chain():
    assert len(longest_chain(FUSED)) == len(FUSED.nodes) == 12
    assert needed(FUSED) == FUSED.nodes


GRAPH = """graph g(state %x: i32[1]) {
  %a: i32[1] = advance(%x)
  %b: i32[1] = advance(%a)
  return x=%a
}"""


def test_nodes_that_a_result_needs():
    graph = parse_graph(GRAPH)
    assert needed(graph) == graph.nodes[:1]


def test_the_last_use_of_a_value_counts_what_views_show_of_it():
    graph = parse_graph(GRAPH)
    assert last_uses(graph, lambda node: False) == {"x": 0, "a": 2}
    assert last_uses(graph, lambda node: node.out.name == "a") == {"x": 2}


def test_layers_of_nodes():
    assert [layer_of(node) for node in FUSED.nodes] == [None, *[0] * 5, *[1] * 5, None]
