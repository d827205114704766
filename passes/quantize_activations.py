"""Lowering: integer weights meet quantized activations. Always runs.

before:
    %y = matvec(%x, %w)                 w: q4_k, q5_k, q6_k or q8_0
after:
    %x.q = quantize(%x)
    %y = matvec(%x.q, %w)

A vector that several products read is quantized once. Float weights keep f32 activations.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, TensorType, Value
from ..ir.types import family
from ..ir.verify import product_weights
from .rewriter import Rewriter, merged_origins


def quantize_activations(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of vectors that are quantized."""
    rewriter = Rewriter(graph)
    readers: dict[str, list[Node]] = {}
    for node in rewriter.nodes:
        families = {family(weight.type.dtype) for weight in product_weights(node)}
        if "integer" in families and node.ins[0].type.dtype == "f32":
            readers.setdefault(node.ins[0].name, []).append(node)
    for name, nodes in readers.items():
        x = nodes[0].ins[0]
        quantized = Value(rewriter.fresh(f"{name}.q"), TensorType("i8x2", x.type.shape))
        made = Node((quantized,), "quantize", (x,), (), merged_origins(nodes))
        # Each reader is replaced where it stands: others may lie between two of them.
        for index, node in enumerate(nodes):
            changed = replace(node, ins=(quantized, *node.ins[1:]))
            rewriter.replace([node], [changed] if index else [made, changed])
    return rewriter.finish(), len(readers)
