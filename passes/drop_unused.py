"""Nodes whose results nobody asks for, and parameters that nobody reads, go. Always runs.

before:
    %a = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences)      nothing reads %a
after:
    (gone)

Of a prompt only the caches are asked for: the last layer's attention and feed-forward make nothing of them.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.analysis import needed
from ..ir.graph import Graph


def drop_unused(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of nodes that are gone."""
    kept = needed(graph)
    wanted = {value.name for node in kept for value in node.ins} | {name for name, _ in graph.results}
    params = tuple(param for param in graph.params if param.name in wanted)
    return replace(graph, params=params, nodes=kept), len(graph.nodes) - len(kept)
