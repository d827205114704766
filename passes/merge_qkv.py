"""Products of one vector become one product with several weights: x is read once.

before:
    %q = matvec(%h, %wq)
    %k = matvec(%h, %wk)
    %v = matvec(%h, %wv)
after:
    %q, %k, %v = matvec(%h, %wq, %wk, %wv)

Only weights of one family (integer or float) come together, because they want different
activations. Products that feed a SwiGLU stay apart: fuse_swiglu takes them.
"""

from __future__ import annotations

from ..ir.graph import Graph, Node
from ..ir.types import family
from .rewriter import Rewriter

MOST = 3
"""Weights that one product takes."""


def merge_qkv(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of merged products."""
    rewriter = Rewriter(graph)
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in rewriter.nodes:
        if node.op == "matvec" and len(node.ins) == 2 and not _feeds_swiglu(rewriter, node):
            groups.setdefault((node.ins[0].name, family(node.ins[1].type.dtype)), []).append(node)
    count = 0
    for group in groups.values():
        for start in range(0, len(group), MOST):
            nodes = group[start : start + MOST]
            if len(nodes) > 1:
                outs = tuple(node.out for node in nodes)
                weights = tuple(node.ins[1] for node in nodes)
                count += rewriter.replace(nodes, [Node(outs, "matvec", (nodes[0].ins[0], *weights))])
    return rewriter.finish(), count


def _feeds_swiglu(rewriter: Rewriter, node: Node) -> bool:
    return any(user.op == "swiglu" for user in rewriter.uses(node.out))
