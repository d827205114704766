"""A product that is added to the residual adds it while it writes.

before:
    %o = matvec(%a, %w)
    %x2 = add(%x, %o)
after:
    %x2 = matvec_add(%a, %w, %x)
"""

from __future__ import annotations

from ..ir.graph import Graph
from .rewriter import Rewriter
from .rule import Rule, apply_rules

RULES = (
    Rule(
        before="""%o = matvec(%a, %w)
                  %x2 = add(%x, %o)""",
        after="%x2 = matvec_add(%a, %w, %x)",
    ),
    Rule(
        before="""%o = matvec(%a, %w)
                  %x2 = add(%o, %x)""",
        after="%x2 = matvec_add(%a, %w, %x)",
    ),
)


def fuse_residual(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, *RULES)
    return rewriter.finish(), count
