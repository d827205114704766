"""A vector that only products with integer weights read is written quantized at once.

before:
    %x, %s, %f = matvec_add_norm(%a, %w, %x0, %weight)          s: f32
    %s.q = quantize(%s)
after:
    %x, %s, %f = matvec_add_norm(%a, %w, %x0, %weight)          s: i8x2

For every op whose row in the table says `may_quantize` of that result.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node
from ..ir.ops import OPS
from .rewriter import Rewriter


def quantize_in_producer(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of quantize nodes that are gone."""
    rewriter = Rewriter(graph)
    count = 0
    for node in [node for node in rewriter.nodes if node.op == "quantize"]:
        source = node.ins[0]
        producer = rewriter.producers.get(source.name)
        if producer is None or rewriter.is_returned(source) or rewriter.is_returned(node.out):
            continue
        if len(rewriter.uses(source)) > 1 or not _may_quantize(producer, source.name):
            continue
        rewriter.absorb(node, replace(source, type=node.out.type))
        count += 1
    return rewriter.finish(), count


def _may_quantize(producer: Node, name: str) -> bool:
    indices = OPS[producer.op].quantizable(len(producer.ins), producer.attributes)
    return any(producer.outs[index].name == name for index in indices)
