"""Greedy choice -> choice by chance. It changes what a step means, so it is no part of the pipeline.

before:
    %tokens = argmax(%logits)
after:
    %adjusted, %peaks, %history2 = adjust(%logits, %tokens_in, %history, %sampler, %positions, %sequences)
    %tokens = draw(%adjusted, %peaks, %sampler, %positions)

`history` is a new state: the tokens that went in, at their positions (the log holds what came
out, which a prompt overrides). `sampler` is a new constant, the settings' words
(`ir.sampling`): the host may write it anew between steps.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.errors import UsageError
from ..ir.graph import Graph, Node, Param, TensorType, Value
from ..ir.ops import OPS
from ..ir.sampling import SAMPLER_WORDS
from .rewriter import Rewriter

HISTORY, SAMPLER = "history", "sampler"
NEEDED = {"tokens", "positions", "sequences", "log"}


def use_sampler(graph: Graph) -> Graph:
    """The graph with its argmax replaced; UsageError unless it has one of them, and the states NEEDED."""
    rewriter = Rewriter(graph)
    greedy = [node for node in graph.nodes if node.op == "argmax"]
    known = {param.name: param.value for param in graph.params}
    if len(greedy) != 1 or not known.keys() >= NEEDED or {HISTORY, SAMPLER} & known.keys():
        raise UsageError(f"the step of {graph.name} cannot sample: it does not end in a greedy choice of one token")
    (argmax,) = greedy
    history = Value(HISTORY, TensorType("i32", known["log"].type.shape))
    sampler = Value(SAMPLER, TensorType("i32", (SAMPLER_WORDS,)))
    rewriter.taken |= {HISTORY, SAMPLER}
    ins = (argmax.ins[0], known["tokens"], history, sampler, known["positions"], known["sequences"])
    types = OPS["adjust"].infer([value.type for value in ins], {})
    outs = tuple(
        Value(rewriter.fresh(name), type_) for name, type_ in zip(("adjusted", "peaks", HISTORY), types, strict=True)
    )
    adjust = Node(outs, "adjust", ins, (), argmax.origin)
    draw = Node(argmax.outs, "draw", (*outs[:2], sampler, known["positions"]), (), argmax.origin)
    rewriter.replace([argmax], [adjust, draw])
    params = (*graph.params, Param("state", history), Param("constant", sampler))
    states = {param.name for param in params if param.kind == "state"}
    place = sum(name in states for name, _ in graph.results)
    results = (*graph.results[:place], (HISTORY, outs[2]), *graph.results[place:])
    return replace(rewriter.finish(), params=params, results=results)
