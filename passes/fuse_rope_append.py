"""Everything between the qkv product and attention becomes one node.

before:
    %q_heads = split_heads(%q) {heads=$heads}
    %k_heads = split_heads(%k) {heads=$kv_heads}
    %v_heads = split_heads(%v) {heads=$kv_heads}
    %q_normed = rms_norm(%q_heads, %q_norm) {eps=$eps}
    %k_normed = rms_norm(%k_heads, %k_norm) {eps=$eps}
    %q_rotated = rope(%q_normed, %positions) {theta=$theta}
    %k_rotated = rope(%k_normed, %positions) {theta=$theta}
    %k_cache2 = cache_append(%k_cache, %k_rotated, %positions, %sequences)
    %v_cache2 = cache_append(%v_cache, %v_heads, %positions, %sequences)
    %a = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}
after:
    %q_rotated, %k_cache2, %v_cache2 =
        rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
            {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
    %a = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}

Attention stands in the rule because it alone ties q to its own k and v. A model without
norms on q and k keeps the single ops.
"""

from __future__ import annotations

from ..ir.graph import Graph
from ..ir.ops import ROPE_SCALING
from .rewriter import Rewriter
from .rule import Rule, apply_rules

RULE = Rule(
    before="""%q_heads = split_heads(%q) {heads=$heads}
              %k_heads = split_heads(%k) {heads=$kv_heads}
              %v_heads = split_heads(%v) {heads=$kv_heads}
              %q_normed = rms_norm(%q_heads, %q_norm) {eps=$eps}
              %k_normed = rms_norm(%k_heads, %k_norm) {eps=$eps}
              %q_rotated = rope(%q_normed, %positions) {theta=$theta}
              %k_rotated = rope(%k_normed, %positions) {theta=$theta}
              %k_cache2 = cache_append(%k_cache, %k_rotated, %positions, %sequences)
              %v_cache2 = cache_append(%v_cache, %v_heads, %positions, %sequences)
              %a = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}""",
    after="""%q_rotated, %k_cache2, %v_cache2 =
                 rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %positions, %sequences)
                     {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
             %a = attention(%q_rotated, %k_cache2, %v_cache2, %positions, %sequences) {scale=$scale}""",
    carried=ROPE_SCALING,
)


def fuse_rope_append(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, RULE)
    return rewriter.finish(), count
