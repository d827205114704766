"""Which place on a multiprocessor each product of a step takes: what `Target.place_bytes` has sizes for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..ir.graph import Node
from .target import Place


def product_places(kernels: Sequence[Node], products: Collection[str], attention: Collection[str]) -> dict[str, Place]:
    """The place of every product, by the name of its node's first result.

    kernels: the step's nodes that become kernels, in order; products, attention: the ops of each kind.
    """
    places: dict[str, Place] = {}
    place: Place = "deep"
    for index, node in enumerate(kernels):
        if node.op not in products:
            continue
        following = kernels[index + 1].op if index + 1 < len(kernels) else ""
        if not following:
            place = "last"
        elif following in attention:
            place = "before attention"
        elif index and kernels[index - 1].op in attention:
            place = "after attention"
        else:
            place = "wide" if place != "wide" else "deep"
        places[node.outs[0].name] = place
    return places
