"""A graph as a networkx view: which layers are alike, and what runs one behind the other.

Nothing on the way to a first token imports it: that alone took 0.65 s on the machine of the H100 (docs/layout.md).
"""

from __future__ import annotations

import networkx as nx

from ..ir.graph import Graph, Node, layer_of


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


def longest_chain(graph: Graph) -> tuple[Node, ...]:
    """The nodes of a longest path: at least so many kernels run one behind the other."""
    chain: list[Node] = []
    seen = view(graph)
    for name in nx.dag_longest_path(seen, weight=None):
        node = seen.nodes[name]["node"]
        if node is not None:
            chain.append(node)
    return tuple(chain)


def identical_layers(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """The layers in groups whose nodes do the same with values of the same types, the largest group first."""
    groups: dict[str, list[int]] = {}
    layers: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if (layer := layer_of(node)) is not None:
            layers.setdefault(layer, []).append(node)
    for layer, nodes in layers.items():
        seen = nx.Graph()
        makers = {out.name: index for index, node in enumerate(nodes) for out in node.outs}
        for index, node in enumerate(nodes):
            types = [str(value.type) for value in (*node.outs, *node.ins)]
            seen.add_node(index, label=f"{node.op} {node.attrs} {types}")
            seen.add_edges_from((makers[value.name], index) for value in node.ins if value.name in makers)
        groups.setdefault(nx.weisfeiler_lehman_graph_hash(seen, node_attr="label"), []).append(layer)
    return tuple(sorted((tuple(group) for group in groups.values()), key=lambda group: (-len(group), group)))
