"""What the rewriter refuses: an order in which a node would read memory that another has taken over."""

from __future__ import annotations

from dataclasses import replace

from psigraph.ir.graph import Graph, Node
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify
from psigraph.passes.rewriter import Rewriter

# Attention stands between the two nodes that are replaced, and reads what the first of them makes.
GRAPH = """graph step(state %x: f32[1,2,128], state %cache: f16[1,2,16,128], state %log: i32[1,16],
        state %positions: i32[1], state %sequences: i32[1]) {{
    %row: f32[1,2,128] = rope(%x, %positions) {{theta=10000.0}}
    %y: f32[1,2,128] = attention(%row, {read}, {read}, %positions, %sequences) {{scale=0.5}}
    %next: f16[1,2,16,128] = cache_append(%cache, %row, %positions, %sequences)
    %p: i32[1] = advance(%positions)
    return x=%y, cache=%next, positions=%p
}}"""


def replaced(graph: Graph) -> tuple[bool, Graph]:
    """The first and the third node put in one place, as a fusion of both would be."""
    rewriter = Rewriter(graph)
    old = [rewriter.nodes[0], rewriter.nodes[2]]
    new: list[Node] = [replace(node, origin=()) for node in old]
    return rewriter.replace(old, new), rewriter.finish()


def test_a_reader_does_not_move_behind_what_takes_its_memory_over():
    graph = parse_graph(GRAPH.format(read="%cache"))
    verify(graph)
    done, after = replaced(graph)
    assert not done
    assert after == graph


def test_a_reader_of_other_memory_moves():
    text = GRAPH.format(read="%other").replace("state %log", "state %other: f16[1,2,16,128], state %log")
    graph = parse_graph(text)
    done, after = replaced(graph)
    assert done
    verify(after)
    assert [node.op for node in after.nodes] == ["rope", "cache_append", "attention", "advance"]


def test_what_feeds_a_replaced_node_again_cannot_be_ordered():
    """The middle node reads the first and feeds the third: no place is behind the one and before the other."""
    text = GRAPH.format(read="%cache").replace("cache_append(%cache, %row", "cache_append(%cache, %y")
    done, after = replaced(parse_graph(text))
    assert not done
    assert after == parse_graph(text)
