"""The output head picks the token itself: no logits go through memory or to the host.

before:
    %logits = scaled_matvec(%s, %f, %w)
    %tokens = argmax(%logits)
    %log2 = record(%log, %tokens, %positions, %sequences)
    %stop2 = stop_on(%tokens, %end_tokens, %stop, %positions, %sequences)
    %positions2 = advance(%positions)
between:
    %logits = scaled_matvec(%s, %f, %w)
    %tokens, %log2, %stop2, %positions2 = choose(%logits, %log, %end_tokens, %stop, %positions, %sequences)
after:
    %tokens, %log2, %stop2, %positions2 =
        scaled_matvec_choose(%s, %f, %w, %log, %end_tokens, %stop, %positions, %sequences)

The same for matvec -> matvec_choose. Where the logits are asked for they become one more
result, with the attribute keep_logits. A choice by chance (`use_sampler`) needs all logits at
once, so the head stays a product, and draw takes the place of argmax:

before:
    %tokens = draw(%logits, %peaks, %sampler, %positions)
    %log2 = record(%log, %tokens, %positions, %sequences)
    %stop2 = stop_on(%tokens, %end_tokens, %stop, %positions, %sequences)
    %positions2 = advance(%positions)
after:
    %tokens, %log2, %stop2, %positions2 =
        draw_choose(%logits, %peaks, %sampler, %log, %end_tokens, %stop, %positions, %sequences)
"""

from __future__ import annotations

from ..ir.graph import Graph
from .rewriter import Rewriter
from .rule import Rule, apply_rules

STATE = "%log, %end_tokens, %stop, %positions, %sequences"
MADE = "%tokens, %log2, %stop2, %positions2"
MOVED_ON = """%log2 = record(%log, %tokens, %positions, %sequences)
              %stop2 = stop_on(%tokens, %end_tokens, %stop, %positions, %sequences)
              %positions2 = advance(%positions)"""

CHOOSE = Rule(
    before=f"""{MOVED_ON}
               %tokens = argmax(%logits)""",
    after=f"{MADE} = choose(%logits, {STATE})",
)

DRAW = Rule(
    before=f"""{MOVED_ON}
               %tokens = draw(%logits, %peaks, %sampler, %positions)""",
    after=f"{MADE} = draw_choose(%logits, %peaks, %sampler, {STATE})",
)


def _heads(product: str, operands: str) -> tuple[Rule, Rule]:
    """Without the logits, and with them where somebody asks for them."""
    before = f"""%logits = {product}({operands})
                 {MADE} = choose(%logits, {STATE})"""
    return (
        Rule(before=before, after=f"{MADE} = {product}_choose({operands}, {STATE})"),
        Rule(before=before, after=f"%logits, {MADE} = {product}_choose({operands}, {STATE}) {{keep_logits=true}}"),
    )


HEADS = (*_heads("matvec", "%x, %w"), *_heads("scaled_matvec", "%s, %f, %w"))


def fuse_choice(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of choices (0 or 1 for a whole step)."""
    rewriter = Rewriter(graph)
    count = apply_rules(rewriter, CHOOSE, DRAW)
    apply_rules(rewriter, *HEADS)
    return rewriter.finish(), count
