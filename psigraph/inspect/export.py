"""A graph as DOT (for Graphviz) and as JSON (for other programs)."""

from __future__ import annotations

import json

from ..ir.graph import Graph, Node, Value, layer_of
from ..ir.ops import FUSED_NAMES

SCHEMA = "psigraph.graph.v1"


def shown_nodes(graph: Graph, layer: int | None) -> list[Node]:
    """The nodes of one layer, or all."""
    return [node for node in graph.nodes if layer is None or layer_of(node) == layer]


def to_dot(graph: Graph, layer: int | None = None) -> str:
    """DOT text: nodes in boxes (fused ones filled), values as edges, layers in frames.

    layer: only that layer's nodes; what comes from elsewhere is then an open end.
    """
    nodes = shown_nodes(graph, layer)
    number = {id(node): f"n{index}" for index, node in enumerate(nodes)}
    makers = {out.name: number[id(node)] for node in nodes for out in node.outs}
    lines = [f'digraph "{graph.name}" {{', '  node [shape=box, fontname="monospace"];']
    frames: dict[int | None, list[Node]] = {}
    for node in nodes:
        frames.setdefault(layer_of(node), []).append(node)
    for frame, members in frames.items():
        boxes = [f"{number[id(node)]} [{_box(node)}];" for node in members]
        if frame is None:
            lines += [f"  {box}" for box in boxes]
        else:
            lines += [f"  subgraph cluster_{frame} {{", f'    label="layer {frame}";']
            lines += [f"    {box}" for box in boxes] + ["  }"]
    outside: dict[str, Value] = {}
    weights = {param.name for param in graph.params if param.kind == "weight"}
    for node in nodes:
        for value in node.ins:
            if value.name in weights:
                continue
            if value.name not in makers:
                outside[value.name] = value
            start = makers.get(value.name, f'"{value.name}"')
            lines.append(f'  {start} -> {number[id(node)]} [label="%{value.name}"];')
    lines += [f'  "{name}" [shape=ellipse, label="%{value.name}\\n{value.type}"];' for name, value in outside.items()]
    for name, value in graph.results:
        if value.name in makers:
            lines.append(f'  "={name}" [shape=ellipse, style=dashed, label="{name}"];')
            lines.append(f'  {makers[value.name]} -> "={name}" [style=dashed, label="%{value.name}"];')
    return "\n".join([*lines, "}"]) + "\n"


def _box(node: Node) -> str:
    outs = "\\l".join(f"%{out.name}: {out.type}" for out in node.outs)
    style = ', style=filled, fillcolor="lightgrey"' if node.op in FUSED_NAMES else ""
    return f'label="{node.op}\\n{outs}\\l"{style}'


def to_json(graph: Graph, layer: int | None = None) -> str:
    """JSON text of the schema psigraph.graph.v1: params, nodes and results, as in the text form."""
    record = {
        "schema": SCHEMA,
        "name": graph.name,
        "params": [{"kind": param.kind, **_value(param.value)} for param in graph.params],
        "nodes": [
            {
                "op": node.op,
                "layer": layer_of(node),
                "outs": [_value(out) for out in node.outs],
                "ins": [value.name for value in node.ins],
                "attrs": node.attributes,
                "origin": [str(origin) for origin in node.origin],
            }
            for node in shown_nodes(graph, layer)
        ],
        "results": {name: value.name for name, value in graph.results},
    }
    return json.dumps(record, indent=1) + "\n"


def _value(value: Value) -> dict[str, object]:
    return {"name": value.name, "dtype": value.type.dtype, "shape": list(value.type.shape)}
