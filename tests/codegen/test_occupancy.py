"""The slots that a step's kernels take on a multiprocessor: one block of each product, and registers for no other."""

from __future__ import annotations

import re
from itertools import combinations, pairwise, product
from typing import get_args

import pytest
from attention_graphs import attention_graph
from machine_code import machine_code
from shipped import graph_of

from psigraph.bench import stamps
from psigraph.bench.tune import launchable
from psigraph.codegen import activation_block
from psigraph.codegen.cache_types import CACHE_TYPES
from psigraph.codegen.device import device_headers
from psigraph.codegen.lower import is_view, lower
from psigraph.codegen.occupancy import StepSlots, product_slots, step_slots
from psigraph.codegen.target import (
    LEAST_WARPS,
    RESERVED_BYTES,
    SCHEDULER_WARPS,
    STATIC_BYTES,
    TARGETS,
    WARP_REGISTERS,
    Slot,
    Target,
)
from psigraph.ir.graph import Node, TensorType, Value
from psigraph.ir.ops import OPS
from psigraph.ir.program import Launch, Program
from psigraph.runtime.synth import model as synth

SLOTS = get_args(Slot)
WITH_SLOTS = [target for target in TARGETS.values() if target.slots]


@pytest.mark.parametrize("size", synth.SIZES)
@pytest.mark.parametrize("target", WITH_SLOTS, ids=lambda target: target.arch)
def test_what_has_to_stand_beside_each_other_fits(target, size):
    total, attention = target.shared_bytes + RESERVED_BYTES, slots_of(size, target).attention_bytes
    before, after, wide, deep, last = (
        target.slot_bytes(slot, attention) + RESERVED_BYTES + STATIC_BYTES for slot in SLOTS
    )
    assert all(size % 128 == 0 for size in (before, after, wide, deep, last))
    # What stands beside each other while one works and the other fetches:
    assert deep + before + attention <= total
    assert after + wide + attention <= total
    assert before + attention + after <= total
    assert wide + deep <= total
    assert deep + last <= total


@pytest.mark.parametrize("target", WITH_SLOTS, ids=lambda target: target.arch)
def test_a_second_block_of_a_product_has_no_registers(target):
    """Whichever two of the four schedulers get the third warps of a block of ten; and what shall fit always does."""

    def registers(*slots: Slot) -> int:
        return sum(SCHEDULER_WARPS * target.slot_registers(slot) for slot in slots)

    def fullest(*slots: Slot) -> int:
        """The registers of the fullest scheduler, where warps are dealt so that it has fewest."""
        deals = [tuple(2 + (number in more) for number in range(4)) for more in combinations(range(4), 2)]
        assert sum(deals[0]) == LEAST_WARPS
        counts = [target.slot_registers(slot) for slot in slots]
        return min(
            max(sum(count * deal[number] for count, deal in zip(counts, dealt, strict=True)) for number in range(4))
            for dealt in product(deals, repeat=len(slots))
        )

    for first, second in (*pairwise(SLOTS[:4]), ("deep", "before attention"), ("deep", "last")):
        assert registers(first, second) <= WARP_REGISTERS
        assert fullest(first, second, second) > WARP_REGISTERS
    attention = target.attention_registers
    assert registers("before attention", "after attention") + attention <= WARP_REGISTERS
    assert registers("after attention", "wide") + attention <= WARP_REGISTERS


@pytest.mark.parametrize("size", ["0.6b", "1.7b", "8b"])
def test_products_have_the_registers_of_their_places(size):
    """Not fewer, so that a second block finds none; a kernel that does not get along with them has more."""
    target = TARGETS["sm_90a"]
    program = lower(graph_of(size, "q4_k_m", 1), target)
    products = products_of(program)
    for launch, slot in zip(products, SLOTS, strict=True):
        resources = machine_code(program, target.arch, launch.kernel)[launch.kernel].resources
        taken = -(-resources.registers // 8) * 8  # registers come by eights
        assert taken == target.slot_registers(slot), launch.kernel
        assert launch.block >= 32 * LEAST_WARPS


def test_attention_has_more_stages_where_products_leave_room():
    target = TARGETS["sm_90a"]
    stages = {size: slots_of(size, target).attention_stages for size in synth.SIZES}
    assert stages == {"0.6b": 5, "1.7b": 5, "4b": 2, "8b": 2}
    assert slots_of("1.7b", target, "q8_0").attention_stages == 4
    assert slots_of("1.7b", target, "q4_k_m", "q8").attention_stages == 6
    assert slots_of("1.7b", TARGETS["sm_89"]).attention_stages == 3


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
@pytest.mark.parametrize("size", ["0.6b", "1.7b", "4b", "8b"])
def test_products_of_a_model_fill_their_places(size, quant):
    target = TARGETS["sm_90a"]
    program = lower(graph_of(size, quant), target)
    products = products_of(program)
    attention = slots_of(size, target, quant).attention_bytes
    assert len(products) > 100
    layer = ("before attention", "after attention", "wide", "deep")
    for number, launch in enumerate(products[:-1]):
        assert launch.grid == target.sm_count, launch.kernel
        assert launch.shared_bytes == target.slot_bytes(layer[number % 4], attention), launch.kernel
        assert launch.block <= 384, launch.kernel
    assert products[-1].shared_bytes == target.slot_bytes("last", attention)


def test_an_attention_larger_than_what_is_left_leaves_products_a_place():
    target = TARGETS["sm_90a"]
    graph = attention_graph(256, 16, 1, 64)
    slots = step_slots([node for node in graph.nodes if not is_view(node)], target)
    assert slots.attention_stages == 2
    assert all(target.slot_bytes(slot, slots.attention_bytes) >= 16 * 1024 for slot in SLOTS)


def test_places_follow_attention_where_fusions_are_off():
    def place_of(*ops: str) -> list[str]:
        nodes = [Node(op=op, outs=(Value(f"v{i}", TensorType("f32", (16,))),), ins=()) for i, op in enumerate(ops)]
        return list(product_slots(nodes).values())

    p, a = "matvec", "rope_attention"
    assert place_of("embed", p, p, p, a, p, p, p, "swiglu", p, p, a, p) == [
        "wide", "deep", "before attention", "after attention", "wide", "deep", "wide", "before attention", "last",
    ]  # fmt: skip
    assert place_of(p) == ["last"]


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
@pytest.mark.parametrize("size", synth.SIZES)
def test_attention_fits_beside_the_products(size, kv_type):
    target = TARGETS["sm_90a"]
    program = lower(graph_of(size, "q4_k_m", 1, kv_type=kv_type), target)
    (launch,) = (launch for launch in program.step().kernels if launch.kernel == "rope_attention")
    resources = machine_code(program, target.arch, launch.kernel)[launch.kernel].resources
    assert (
        launch.shared_bytes + resources.shared_bytes + RESERVED_BYTES
        <= slots_of(size, target, "q4_k_m", kv_type).attention_bytes
    )
    assert resources.registers <= target.attention_registers
    assert resources.spill_bytes == 0


def test_a_shape_whose_block_has_no_registers_is_passed_over_by_tuning():
    """24 warps of down and two helpers: cuGraphInstantiate failed on an H100, and took the engine with it."""
    target, name = TARGETS["sm_90a"], "matvec_add_norm q6_k[2048,6144]"
    fits = {}
    for tile_warps in (1, 4):
        program = lower(graph_of("1.7b", "q4_k_m", 1), target, {name: {"column_warps": 6, "tile_warps": tile_warps}})
        fits[tile_warps] = launchable(program, machine_code(program, target.arch))
    assert fits == {1: True, 4: False}


def test_constants_of_the_device_header_are_those_of_the_emitters():
    header = "\n".join(device_headers().values())
    for name, value in {
        "STAMP_PLACES": stamps.PLACES,
        "ACTIVATION_BLOCK": activation_block.BLOCK_BYTES,
        "ACTIVATION_STRIDE": activation_block.BLOCK_BYTES // 16,
        "ACTIVATION_COPIES": activation_block.COPIES,
    }.items():
        assert re.search(rf"^#define {name} {value}\b", header, re.MULTILINE), name


def test_without_places_kernels_take_what_they_need():
    target = TARGETS["sm_90a"].plain()
    assert target.slot_bytes("wide", 0) == target.slot_registers("wide") == target.attention_registers == 0
    program = lower(graph_of("1.7b", "q4_k_m"), target)
    assert len({launch.shared_bytes for launch in products_of(program)}) > 2
    assert not any(launch.programmatic or launch.cluster > 1 for launch in program.step().kernels)


def slots_of(size: str, target: Target, quant: str = "q4_k_m", kv_type: str = "f16") -> StepSlots:
    kernels = [node for node in graph_of(size, quant, 1, kv_type=kv_type).nodes if not is_view(node)]
    return step_slots(kernels, target)


def products_of(program: Program) -> list[Launch]:
    step = program.step()
    ops = {out.name: OPS[node.op] for node in step.graph.nodes for out in node.outs}
    return [launch for launch in step.kernels if ops[launch.nodes[0]].product]
