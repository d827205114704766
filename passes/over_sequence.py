"""One decode step -> the same block over a sequence of tokens. It changes what a step means, so it is no part of the
pipeline: it makes the graph that takes a prompt in.

before:                                             after:
    graph g(state %token: i32[1], ...)                  graph g(state %tokens: i32[T,1], state %span: i32[2], ...)
    %x = embed(%table, %token)           f32[n]         %x = embed(%table, %tokens)            f32[T,n]
    %k_cache2 = cache_append(.., %position)             %k_cache2 = cache_append(.., %span)
    %token2 = argmax(%logits)                           (gone)
    %position2 = advance(%position)                     %position2 = advance(%span)

Whatever belongs to a token gets a row for each (`ir.sequence`); `span` says where the rows begin and how many of them
count. The next token of a prompt is given, so that choices go, and with them all that depends on one: what is left are
the caches, the position, and for a step that samples the history, which takes the tokens that go in.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Graph, Node, Param, TensorType, Value
from ..ir.op import TypeMismatch
from ..ir.ops import OPS
from ..ir.sequence import SPAN

TOKENS, SPAN_NAME = "tokens", "span"
SPAN_VALUE = Value(SPAN_NAME, SPAN)
CHOICES = ("argmax", "draw")


def over_sequence(graph: Graph, tokens: int) -> Graph:
    """The graph of an unfused step over `tokens` rows; UnsupportedModelError if the step has an op without such a form,
    or does not go from a token and a position to the next."""
    known = {param.name: param.value for param in graph.params}
    if known.get("token", SPAN_VALUE).type.shape != (1,) or "position" not in known:
        raise UnsupportedModelError(f"the step of {graph.name} has no token and position to put a sequence in place of")
    given = Value(TOKENS, TensorType("i32", (tokens, 1)))
    placed = {"token": given, "position": SPAN_VALUE}
    chosen: set[str] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        if node.op == "adjust":  # of what it does only this is asked for: the history takes the tokens
            history = Value(node.outs[2].name, node.outs[2].type)
            ins = (placed.get(node.ins[2].name, node.ins[2]), given, SPAN_VALUE)
            nodes.append(Node((history,), "record", ins, (), node.origin))
            placed[history.name] = history
            chosen |= {out.name for out in node.outs[:2]}
        elif node.op in CHOICES or any(value.name in chosen for value in node.ins):
            chosen |= {out.name for out in node.outs}
        else:
            nodes.append(_over(node, tuple(placed.get(value.name, value) for value in node.ins)))
            placed.update({out.name: out for out in nodes[-1].outs})
    states = {param.name for param in graph.params if param.kind == "state"}
    results = tuple(
        (name, placed[value.name]) for name, value in graph.results if name in states and value.name not in chosen
    )
    params = []
    for param in graph.params:
        if param.name == "token":
            params += [Param("state", given), Param("state", SPAN_VALUE)]
        else:
            params.append(param)
    return replace(graph, params=tuple(params), nodes=tuple(nodes), results=results)


def _over(node: Node, ins: tuple[Value, ...]) -> Node:
    try:
        types = OPS[node.op].infer([value.type for value in ins], node.attributes)
    except TypeMismatch as problem:
        raise UnsupportedModelError(f"{node.op} has no form over a sequence: {problem}") from None
    outs = tuple(replace(out, type=type_) for out, type_ in zip(node.outs, types, strict=True))
    return replace(node, ins=ins, outs=outs)
