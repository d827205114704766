"""Norms, rotation, cache append and attention of one layer become one node.

before:
    %q_rotated, %k_cache2, %v_cache2 =
        rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
            {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
    %a_heads = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}
    %a = merge_heads(%a_heads)
after:
    %a, %k_cache2, %v_cache2 =
        rope_attention(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
            {eps=$eps, theta=$theta, scale=$scale, heads=$heads, kv_heads=$kv_heads}
"""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.ops import ROPE_SCALING
from .rewriter import Rewriter
from .rule import Rule, apply_rules

RULE = Rule(
    before="""%q_rotated, %k_cache2, %v_cache2 =
                  rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
                      {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
              %a_heads = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}
              %a = merge_heads(%a_heads)""",
    after="""%a, %k_cache2, %v_cache2 =
                 rope_attention(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
                     {eps=$eps, theta=$theta, scale=$scale, heads=$heads, kv_heads=$kv_heads}""",
    carried=ROPE_SCALING,
)


def fuse_attention(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, RULE)
    return rewriter.finish(), count
