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

from collections.abc import Mapping

from ..ir.graph import Graph, Value
from ..ir.ops import OPS
from .rewriter import Rewriter
from .rule import Rule, apply_rules


def _for_all_rows(values: Mapping[str, Value]) -> bool:
    """`mul` may also multiply with a value of each row; the weights of a norm are one vector."""
    return len(values["weight"].type.shape) == 1


RULES = (
    Rule(
        before="""%x2 = matvec_add(%a, %w, %x)
                  %s = mul(%x2, %weight)
                  %f = rms_factor(%x2) {eps=$eps}""",
        after="%x2, %s, %f = matvec_add_norm(%a, %w, %x, %weight) {eps=$eps}",
        where=_for_all_rows,
        carried=tuple(OPS["matvec_add"].optional),
    ),
    Rule(
        before="""%x = embed(%table, %tokens)
                  %s = mul(%x, %weight)
                  %f = rms_factor(%x) {eps=$eps}""",
        after="%x, %s, %f = embed_norm(%table, %tokens, %weight) {eps=$eps}",
        where=_for_all_rows,
    ),
)


def norm_in_producer(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, *RULES)
    return rewriter.finish(), count
