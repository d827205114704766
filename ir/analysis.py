"""What the order of a graph's nodes says: who depends on what, how long values live, what nobody needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .graph import Graph, Node


def dependents(nodes: Sequence[Node], values: Collection[str]) -> set[int]:
    """Indices of the nodes, which stand in order, that read any of the values or what is made of them."""
    changed, found = set(values), set()
    for index, node in enumerate(nodes):
        if any(value.name in changed for value in node.ins):
            found.add(index)
            changed |= {out.name for out in node.outs}
    return found


def last_uses(graph: Graph, is_view: Callable[[Node], bool]) -> dict[str, int]:
    """Name of a value -> index of the last node that reads it or what a view shows of it; the number of nodes for what
    is among the results. Values that nobody reads, and views, have no entry.

    is_view: whether a node only renames memory.
    """
    seen_of: dict[str, str] = {}  # a view -> the value that it shows
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        if is_view(node):
            seen_of[node.out.name] = seen_of.get(node.ins[0].name, node.ins[0].name)
        last |= {seen_of.get(value.name, value.name): index for value in node.ins}
    return last | {seen_of.get(value.name, value.name): len(graph.nodes) for _, value in graph.results}


def needed(graph: Graph) -> tuple[Node, ...]:
    """The nodes on which a result depends, in order."""
    wanted = {value.name for _, value in graph.results}
    found: list[Node] = []
    for node in reversed(graph.nodes):
        if any(out.name in wanted for out in node.outs):
            found.append(node)
            wanted |= {value.name for value in node.ins}
    return tuple(reversed(found))
