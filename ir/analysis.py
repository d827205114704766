"""A graph as a networkx view: who depends on what, and how long the chain of kernels is."""

from __future__ import annotations

import networkx as nx

from .graph import Graph, Node


def view(graph: Graph) -> nx.DiGraph:
    """Values as vertices (by name), an edge from every operand to every result of its node.

    A vertex carries its `type`, and its `node`, or None for a parameter. The view is a copy:
    changing it changes no graph.
    """
    seen = nx.DiGraph()
    for param in graph.params:
        seen.add_node(param.name, type=param.type, node=None)
    for node in graph.nodes:
        for out in node.outs:
            seen.add_node(out.name, type=out.type, node=node)
            seen.add_edges_from((value.name, out.name) for value in node.ins)
    return seen


def needed_for(graph: Graph, name: str) -> set[str]:
    """Names of all values that the value is computed from; KeyError if there is no such value."""
    return _reached(graph, name, nx.ancestors)


def affected_by(graph: Graph, name: str) -> set[str]:
    """Names of all values that would change with this one; KeyError if there is no such value."""
    return _reached(graph, name, nx.descendants)


def _reached(graph: Graph, name: str, walk: nx.DiGraph) -> set[str]:
    seen = view(graph)
    if name not in seen:
        raise KeyError(f"graph {graph.name} has no value %{name}")
    return set(walk(seen, name))


def unused(graph: Graph) -> tuple[Node, ...]:
    """Nodes without any effect on the results."""
    seen = view(graph)
    needed = {value.name for _, value in graph.results}
    for name in tuple(needed):
        needed |= nx.ancestors(seen, name)
    return tuple(node for node in graph.nodes if not any(out.name in needed for out in node.outs))


def longest_chain(graph: Graph) -> tuple[Node, ...]:
    """The nodes of a longest path: at least so many kernels run one behind the other."""
    chain: list[Node] = []
    seen = view(graph)
    for name in nx.dag_longest_path(seen, weight=None):
        node = seen.nodes[name]["node"]
        if node is not None:
            chain.append(node)
    return tuple(chain)
