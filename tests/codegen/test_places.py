"""The places that a step's kernels take on a multiprocessor: one block of each kernel, and room for nothing else."""

from __future__ import annotations

import pytest
from shipped import graph_of

from psigraph.codegen.cache_types import CACHE_TYPES
from psigraph.codegen.emit_product import PRODUCTS
from psigraph.codegen.lower import lower
from psigraph.codegen.target import ATTENTION_BYTES, RESERVED_BYTES, STATIC_BYTES, TARGETS
from psigraph.ir.program import Launch, Program
from psigraph.runtime import nvrtc, synth

WITH_PLACES = [target for target in TARGETS.values() if target.places]


@pytest.mark.parametrize("target", WITH_PLACES, ids=lambda target: target.arch)
def test_a_second_block_of_a_kernel_fits_nowhere(target):
    total = target.shared_bytes + RESERVED_BYTES
    even, odd = (target.place_bytes(number) + RESERVED_BYTES for number in (0, 1))
    left = total - even - odd - 2 * STATIC_BYTES
    assert left >= ATTENTION_BYTES
    assert left < 2 * ATTENTION_BYTES * 0.8  # attention of the usual models takes nine tenths of its share
    assert 2 * even + odd > total  # a second even one, launched where an odd one is resident
    assert even + 2 * odd > total
    assert (target.place_bytes(2), target.place_bytes(3)) == (target.place_bytes(0), target.place_bytes(1))


@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
@pytest.mark.parametrize("size", ["0.6b", "1.7b", "4b", "8b"])
def test_products_of_a_model_fill_their_places(size, quant):
    target = TARGETS["sm_90a"]
    program = lower(graph_of(size, quant), target)
    products = products_of(program)
    assert len(products) > 100
    for number, launch in enumerate(products[:-1]):
        assert launch.grid == target.sm_count, launch.kernel
        assert launch.shared_bytes == target.place_bytes(number), launch.kernel
        assert launch.block <= 384, launch.kernel
    head = products[-1]
    assert head.shared_bytes == target.place_bytes(len(products) - 1) + ATTENTION_BYTES  # no attention after it


@pytest.mark.parametrize("kv_type", CACHE_TYPES)
@pytest.mark.parametrize("size", synth.SIZES)
def test_attention_fits_beside_the_products(size, kv_type):
    target = TARGETS["sm_90a"]
    program = lower(graph_of(size, "q4_k_m", 1, kv_type=kv_type), target)
    (launch,) = (launch for launch in program.launches if launch.kernel == "rope_attention")
    _, resources = nvrtc.compile_kernel(program.source(launch.kernel), launch.kernel, target.arch)
    assert launch.shared_bytes + resources.shared_bytes + RESERVED_BYTES <= ATTENTION_BYTES
    assert resources.registers <= target.registers
    assert resources.spill_bytes == 0


def test_without_places_kernels_take_what_they_need():
    target = TARGETS["sm_90a"].plain()
    assert target.place_bytes(0) == target.registers == 0
    program = lower(graph_of("1.7b", "q4_k_m"), target)
    assert len({launch.shared_bytes for launch in products_of(program)}) > 2
    assert not any(launch.programmatic or launch.cluster > 1 for launch in program.launches)


def products_of(program: Program) -> list[Launch]:
    ops = {out.name: node.op for node in program.graph.nodes for out in node.outs}
    return [launch for launch in program.launches if ops[launch.nodes[0]] in PRODUCTS]
