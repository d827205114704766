"""Greedy choice -> choice by chance. It changes what a step means, so it is no part of the pipeline.

before:
    %token = argmax(%logits)
after:
    %adjusted, %peaks, %history2 = adjust(%logits, %token_in, %history, %sampler, %position)
    %token = draw(%adjusted, %peaks, %sampler, %position)

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


def use_sampler(graph: Graph) -> Graph:
    """The graph with its argmax replaced; UsageError unless it has one of them and token, position and log."""
    rewriter = Rewriter(graph)
    greedy = [node for node in graph.nodes if node.op == "argmax"]
    known = {param.name: param.value for param in graph.params}
    if len(greedy) != 1 or not {"token", "position", "log"} <= known.keys() or {HISTORY, SAMPLER} & known.keys():
        raise UsageError(f"the step of {graph.name} cannot sample: it does not end in a greedy choice of one token")
    (argmax,) = greedy
    history = Value(HISTORY, TensorType("i32", known["log"].type.shape))
    sampler = Value(SAMPLER, TensorType("i32", (SAMPLER_WORDS,)))
    rewriter.taken |= {HISTORY, SAMPLER}
    ins = (argmax.ins[0], known["token"], history, sampler, known["position"])
    types = OPS["adjust"].infer([value.type for value in ins], {})
    outs = tuple(
        Value(rewriter.fresh(name), type_) for name, type_ in zip(("adjusted", "peaks", HISTORY), types, strict=True)
    )
    adjust = Node(outs, "adjust", ins, (), argmax.origin)
    draw = Node(argmax.outs, "draw", (*outs[:2], sampler, known["position"]), (), argmax.origin)
    rewriter.replace([argmax], [adjust, draw])
    params = (*graph.params, Param("state", history), Param("constant", sampler))
    states = {param.name for param in params if param.kind == "state"}
    place = sum(name in states for name, _ in graph.results)
    results = (*graph.results[:place], (HISTORY, outs[2]), *graph.results[place:])
    return replace(rewriter.finish(), params=params, results=results)
