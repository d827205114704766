"""Nodes whose results nobody asks for, and parameters that nobody reads, go.

before:
    %a = attention(%q_turned, %k_cache2, %v_cache2, %span)      nothing reads %a
after:
    (gone)

Of a prompt only the caches are asked for: the last layer's attention and feed-forward make nothing of them.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node


def drop_unused(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of nodes that are gone."""
    wanted = {value.name for _, value in graph.results}
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(out.name in wanted for out in node.outs):
            kept.append(node)
            wanted |= {value.name for value in node.ins}
    returned = {name for name, _ in graph.results}
    params = tuple(param for param in graph.params if param.name in wanted | returned)
    return replace(graph, params=params, nodes=tuple(reversed(kept))), len(graph.nodes) - len(kept)
