"""How the kernels of a step share a multiprocessor: which slot each product takes, and what attention leaves of it.

While one kernel works, the next ones are resident and fetch. `Target.slot_bytes` has the sizes of slots; here is
decided how large attention's block is: its ring may have more stages where the products around it keep their whole
slices of the weights beside it, and no more than two where they do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..ir.graph import Node
from ..ir.ops import OPS
from ..ir.verify import product_weights
from .emit.attention_shape import LEAST_STAGES, MOST_STAGES, USUAL_STAGES, attention_shape
from .target import DEEP_BYTES, RESERVED_BYTES, STATIC_BYTES, WIDE_BYTES, Slot, Target
from .weight_types import TILE_ROWS, WEIGHT_TYPES, superblocks, tiles

ATTENTIONS = ("rope_attention", "attention")
BESIDE_PRODUCTS = ("rope_append", *ATTENTIONS)
LEAST_PLACE_BYTES = 20 * 1024  # of a product beside an attention that is larger than what is left for it


@dataclass(frozen=True)
class StepSlots:
    """Places of a step's products, by the name of the node's first result; stages of attention's ring, and the shared
    memory that its block takes in all (a block that takes more does not start beside two products)."""

    of: dict[str, Slot]
    attention_stages: int
    attention_bytes: int


def step_slots(kernels: Sequence[Node], target: Target) -> StepSlots:
    """kernels: the step's nodes that become kernels, in order."""
    of = product_slots(kernels)
    readers = [node for node in kernels if node.op in ATTENTIONS]
    if not readers:
        return StepSlots(of, USUAL_STAGES, 0)
    shape = attention_shape(readers[0], target)
    total = left = target.shared_bytes + RESERVED_BYTES
    if not target.slots:
        return StepSlots(of, USUAL_STAGES if shape.block_bytes(USUAL_STAGES) <= total else LEAST_STAGES, 0)
    for slot, beside in (("before attention", DEEP_BYTES), ("after attention", WIDE_BYTES)):
        slices = [_slice_bytes(node, target) for node in kernels if of.get(node.outs[0].name) == slot]
        left = min(left, total - beside - max(slices, default=0))
    stages = MOST_STAGES
    while stages > LEAST_STAGES and shape.block_bytes(stages) > left:
        stages -= 1
    most = total - max(WIDE_BYTES, DEEP_BYTES) - LEAST_PLACE_BYTES
    return StepSlots(of, stages, min(shape.block_bytes(stages), most))


def product_slots(kernels: Sequence[Node]) -> dict[str, Slot]:
    """The slot of every product, by the name of its node's first result."""
    slots: dict[str, Slot] = {}
    slot: Slot = "deep"
    for index, node in enumerate(kernels):
        if not OPS[node.op].product:
            continue
        following = kernels[index + 1].op if index + 1 < len(kernels) else ""
        if not following:
            slot = "last"
        elif following in BESIDE_PRODUCTS:
            slot = "before attention"
        elif index and kernels[index - 1].op in BESIDE_PRODUCTS:
            slot = "after attention"
        else:
            slot = "wide" if slot != "wide" else "deep"
        slots[node.outs[0].name] = slot
    return slots


def _slice_bytes(node: Node, target: Target) -> int:
    """Shared memory of a block that holds its whole slice of a product's weights, about: with sums, barriers, what its
    epilogue fetches."""
    weights = [weight.type for weight in product_weights(node)]
    per_block = -(-sum(tiles(weight.shape[0]) for weight in weights) // target.sm_count)
    widest = max(WEIGHT_TYPES[weight.dtype].superblock_bytes for weight in weights)
    sums = per_block * TILE_ROWS * 4 * (target.most_warps + 2)
    return per_block * superblocks(weights[0].shape[1]) * widest + sums + 512 + STATIC_BYTES + RESERVED_BYTES
