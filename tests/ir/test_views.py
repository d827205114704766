"""DOT, JSON and the networkx view."""

import json

import pytest
from small_models import Small

from psigraph.ir.analysis import affected_by, longest_chain, needed_for, unused, view
from psigraph.ir.export import to_dot, to_json
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
    assert record["results"]["token"] == "token.2"
    one = json.loads(to_json(FUSED, layer=0))
    assert [node["layer"] for node in one["nodes"]] == [0] * 5
    assert one["nodes"][0]["origin"][0].startswith("qwen3.yaml:")


def test_reachability():
    assert "L0.k" in needed_for(FUSED, "L0.a")
    assert "L0.act" not in needed_for(FUSED, "L0.a")
    assert "logits" in affected_by(FUSED, "k_cache.1")
    assert "L0.a" not in affected_by(FUSED, "k_cache.1")
    with pytest.raises(KeyError, match="no value %nothing"):
        needed_for(FUSED, "nothing")
    assert view(FUSED).nodes["L0.a"]["node"].op == "rope_attention"


def test_the_fused_step_is_one_chain():
    assert len(longest_chain(FUSED)) == len(FUSED.nodes) == 12
    assert unused(FUSED) == ()


def test_unused_nodes():
    graph = parse_graph("""graph g(state %x: i32[1]) {
      %a: i32[1] = advance(%x)
      %b: i32[1] = advance(%a)
      return x=%a
    }""")
    assert unused(graph) == (graph.nodes[1],)


def test_layers_of_nodes():
    assert [layer_of(node) for node in FUSED.nodes] == [None, *[0] * 5, *[1] * 5, None]
