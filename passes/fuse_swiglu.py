"""Gate and up products and their SwiGLU become one: neither vector goes through memory.

before:
    %gate = matvec(%h, %w_gate)
    %up = matvec(%h, %w_up)
    %act = swiglu(%gate, %up)
after:
    %act = matvec_swiglu(%h, %w_gate, %w_up)
"""

from __future__ import annotations

from collections.abc import Mapping

from ..ir.graph import Graph, Value
from ..ir.types import family
from .rewriter import Rewriter
from .rule import Rule, apply_rules


def one_family(values: Mapping[str, Value]) -> bool:
    """Both weights want the same kind of activation."""
    return family(values["w_gate"].type.dtype) == family(values["w_up"].type.dtype)


RULE = Rule(
    before="""%gate = matvec(%h, %w_gate)
              %up = matvec(%h, %w_up)
              %act = swiglu(%gate, %up)""",
    after="%act = matvec_swiglu(%h, %w_gate, %w_up)",
    where=one_family,
)


def fuse_swiglu(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, RULE)
    return rewriter.finish(), count
