"""The factor of an RMS norm moves behind the products that read it.

before:
    %h = rms_norm(%x, %weight) {eps=$eps}
    %q, %k, %v = matvec(%h, %wq, %wk, %wv)
after:
    %h.s = mul(%x, %weight)
    %h.f = rms_factor(%x) {eps=$eps}
    %q, %k, %v = scaled_matvec(%h.s, %h.f, %wq, %wk, %wv)

w @ (f * s) = f * (w @ s): the product can start before the sum of squares is known, and
both `s` and `f` can be made where x is. Only for norms of whole rows whose readers are all
products: matvec, and matvec_swiglu, which becomes scaled_swiglu.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.graph import Graph, Node, TensorType, Value
from .rewriter import Rewriter

SCALED = {"matvec": "scaled_matvec", "matvec_swiglu": "scaled_swiglu"}


def defer_norm(graph: Graph) -> tuple[Graph, int]:
    """The changed graph and the number of norms that were deferred."""
    rewriter = Rewriter(graph)
    count = 0
    for norm in [node for node in rewriter.nodes if node.op == "rms_norm"]:
        users = rewriter.uses(norm.out)
        if _can_defer(rewriter, norm, users):
            count += rewriter.replace([norm, *users], _deferred(rewriter, norm, users))
    return rewriter.finish(), count


def _can_defer(rewriter: Rewriter, norm: Node, users: list[Node]) -> bool:
    h = norm.out
    if len(h.type.shape) != 2 or rewriter.is_returned(h) or not users:
        return False
    return all(user.op in SCALED and user.ins[0] == h and h not in user.ins[1:] for user in users)


def _deferred(rewriter: Rewriter, norm: Node, users: list[Node]) -> list[Node]:
    h = norm.out
    s = Value(rewriter.fresh(f"{h.name}.s"), h.type)
    f = Value(rewriter.fresh(f"{h.name}.f"), TensorType("f32", (h.type.shape[0], 1)))
    made = [
        Node((s,), "mul", norm.ins, (), norm.origin),
        Node((f,), "rms_factor", norm.ins[:1], norm.attrs, norm.origin),
    ]
    # The factor is applied by the products, so they stem from the norm's line too.
    return made + [
        replace(user, op=SCALED[user.op], ins=(s, f, *user.ins[1:]), origin=(*norm.origin, *user.origin))
        for user in users
    ]
