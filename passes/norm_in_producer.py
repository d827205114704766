"""What makes the residual also makes the two halves of the deferred norm.

before:
    %x2 = matvec_add(%a, %w, %x)
    %s = mul(%x2, %weight)
    %f = rms_factor(%x2) {eps=$eps}
after:
    %x2, %s, %f = matvec_add_norm(%a, %w, %x, %weight) {eps=$eps}

The same for embed -> embed_norm.
"""

from __future__ import annotations

from ..ir.graph import Graph
from .rewriter import Rewriter
from .rule import Rule, apply_rules

RULES = (
    Rule(
        before="""%x2 = matvec_add(%a, %w, %x)
                  %s = mul(%x2, %weight)
                  %f = rms_factor(%x2) {eps=$eps}""",
        after="%x2, %s, %f = matvec_add_norm(%a, %w, %x, %weight) {eps=$eps}",
    ),
    Rule(
        before="""%x = embed(%table, %token)
                  %s = mul(%x, %weight)
                  %f = rms_factor(%x) {eps=$eps}""",
        after="%x, %s, %f = embed_norm(%table, %token, %weight) {eps=$eps}",
    ),
)


def norm_in_producer(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, *RULES)
    return rewriter.finish(), count
