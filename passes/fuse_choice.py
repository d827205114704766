"""The output head picks the token itself: no logits go through memory or to the host.

before:
    %logits = scaled_matvec(%s, %f, %w)
    %token = argmax(%logits)
    %log2 = record(%log, %token, %position)
    %stop2 = stop_on(%token, %end_tokens, %stop)
    %position2 = advance(%position)
between:
    %logits = scaled_matvec(%s, %f, %w)
    %token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)
after:
    %token, %log2, %stop2, %position2 = scaled_matvec_choose(%s, %f, %w, %log, %end_tokens, %stop, %position)

The same for matvec -> matvec_choose. Where the logits are asked for they become one more
result, with the attribute keep_logits. A choice by chance (`use_sampler`) needs all logits at
once, so the head stays a product, and draw takes the place of argmax:

before:
    %token = draw(%logits, %peaks, %sampler, %position)
    %log2 = record(%log, %token, %position)
    %stop2 = stop_on(%token, %end_tokens, %stop)
    %position2 = advance(%position)
after:
    %token, %log2, %stop2, %position2 =
        draw_choose(%logits, %peaks, %sampler, %log, %end_tokens, %stop, %position)
"""

from __future__ import annotations

from ..ir.graph import Graph
from .rewriter import Rewriter
from .rule import Rule, apply_rules

CHOOSE = Rule(
    before="""%log2 = record(%log, %token, %position)
              %stop2 = stop_on(%token, %end_tokens, %stop)
              %position2 = advance(%position)
              %token = argmax(%logits)""",
    after="%token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)",
)

DRAW = Rule(
    before="""%log2 = record(%log, %token, %position)
              %stop2 = stop_on(%token, %end_tokens, %stop)
              %position2 = advance(%position)
              %token = draw(%logits, %peaks, %sampler, %position)""",
    after="""%token, %log2, %stop2, %position2 =
                 draw_choose(%logits, %peaks, %sampler, %log, %end_tokens, %stop, %position)""",
)

HEADS = (
    Rule(
        before="""%logits = matvec(%x, %w)
                  %token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)""",
        after="""%token, %log2, %stop2, %position2 =
                     matvec_choose(%x, %w, %log, %end_tokens, %stop, %position)""",
    ),
    Rule(
        before="""%logits = matvec(%x, %w)
                  %token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)""",
        after="""%logits, %token, %log2, %stop2, %position2 =
                     matvec_choose(%x, %w, %log, %end_tokens, %stop, %position) {keep_logits=true}""",
    ),
    Rule(
        before="""%logits = scaled_matvec(%s, %f, %w)
                  %token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)""",
        after="""%token, %log2, %stop2, %position2 =
                     scaled_matvec_choose(%s, %f, %w, %log, %end_tokens, %stop, %position)""",
    ),
    Rule(
        before="""%logits = scaled_matvec(%s, %f, %w)
                  %token, %log2, %stop2, %position2 = choose(%logits, %log, %end_tokens, %stop, %position)""",
        after="""%logits, %token, %log2, %stop2, %position2 =
                     scaled_matvec_choose(%s, %f, %w, %log, %end_tokens, %stop, %position) {keep_logits=true}""",
    ),
)


def fuse_choice(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of choices (0 or 1 for a whole step)."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, CHOOSE, DRAW)
    apply_rules(rewriter, *HEADS)
    return rewriter.finish(), count
