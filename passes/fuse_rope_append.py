"""Everything between the qkv product and attention becomes one node.

before:
    %q_heads = split_heads(%q) {heads=$heads}
    %k_heads = split_heads(%k) {heads=$kv_heads}
    %v_heads = split_heads(%v) {heads=$kv_heads}
    %q_normed = rms_norm(%q_heads, %q_norm) {eps=$eps}
    %k_normed = rms_norm(%k_heads, %k_norm) {eps=$eps}
    %q_turned = rope(%q_normed, %position) {theta=$theta}
    %k_turned = rope(%k_normed, %position) {theta=$theta}
    %k_cache2 = cache_append(%k_cache, %k_turned, %position)
    %v_cache2 = cache_append(%v_cache, %v_heads, %position)
    %a = attention(%q_turned, %k_cache2, %v_cache2, %position) {scale=$scale}
after:
    %q_turned, %k_cache2, %v_cache2 =
        rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %position)
            {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
    %a = attention(%q_turned, %k_cache2, %v_cache2, %position) {scale=$scale}

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
              %q_turned = rope(%q_normed, %position) {theta=$theta}
              %k_turned = rope(%k_normed, %position) {theta=$theta}
              %k_cache2 = cache_append(%k_cache, %k_turned, %position)
              %v_cache2 = cache_append(%v_cache, %v_heads, %position)
              %a = attention(%q_turned, %k_cache2, %v_cache2, %position) {scale=$scale}""",
    after="""%q_turned, %k_cache2, %v_cache2 =
                 rope_append(%q, %k, %v, %q_norm, %k_norm, %k_cache, %v_cache, %position)
                     {eps=$eps, theta=$theta, heads=$heads, kv_heads=$kv_heads}
             %a = attention(%q_turned, %k_cache2, %v_cache2, %position) {scale=$scale}""",
    carried=ROPE_SCALING,
)


def fuse_rope_append(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of matches."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, RULE)
    return rewriter.finish(), count
