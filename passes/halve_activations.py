"""Lowering for several rows: what only products and attention read lies in memory as float16. Always runs.

before:
    %h = rms_norm(%x, %weight)               h: f32[T,n]
    %q, %k, %v = matvec(%h, %wq, %wk, %wv)
after:
    %h = rms_norm(%x, %weight)               h: f16[T,n]
    %q, %k, %v = matvec(%h, %wq, %wk, %wv)

The tensor core multiplies halves and adds in float32; an activation of 11 bits moves the model by a mean KL divergence
of 5e-7. Heads that are merged keep the type of the heads: that is a view.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, TensorType, Value
from ..ir.ops import OPS

MAKERS = ("rms_norm", "matvec_swiglu", "swiglu", "rope_append", "rope", "attention", "merge_heads")
"""Ops whose kernels over many rows can write halves."""


def halve_activations(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of values that became halves."""
    readers = graph.uses()
    returned = {value.name for _, value in graph.results}
    halves: dict[str, Value] = {}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):  # a view is settled before what it shows
        outs = []
        for out in node.outs:
            alone = out.type.dtype == "f32" and out.name not in returned
            if alone and node.op in MAKERS and all(_takes(reader, out, halves) for reader in readers.get(out.name, [])):
                halves[out.name] = replace(out, type=TensorType("f16", out.type.shape))
            outs.append(halves.get(out.name, out))
        nodes.append(replace(node, outs=tuple(outs)))
    placed = tuple(
        replace(node, ins=tuple(halves.get(value.name, value) for value in node.ins)) for node in reversed(nodes)
    )
    return replace(graph, nodes=placed), len(halves)


def _takes(reader: Node, value: Value, halves: dict[str, Value]) -> bool:
    """Whether a node can read this operand as halves."""
    if [other.name for other in reader.ins].count(value.name) > 1 or reader.ins[0].name != value.name:
        return False
    if reader.op == "merge_heads":
        return reader.out.name in halves
    return reader.op == "attention" or (OPS[reader.op].product and reader.op.startswith("matvec"))
