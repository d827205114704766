"""Kernels over many rows compile for every architecture without spills, whatever the types, the heads and the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machine_code import assert_gates
from prefill_graphs import heads_graph, prefill_product_graph
from shipped import prefill_of

from psigraph.codegen.cache_types import CACHE_TYPES
from psigraph.codegen.lower import lower
from psigraph.codegen.target import GPU_ARCHES, TARGETS
from psigraph.ir.graph import Graph
from psigraph.ir.program import PREFILL, LibraryProduct, Program
from psigraph.ir.regime import Regime


def lower_prefill(graph: Graph, arch: str, library: bool = False) -> Program:
    return lower(graph, TARGETS[arch], regime=Regime.MANY, name=PREFILL, library=library)


def only(program: Program, *names: str) -> Program:
    """The program with these kernels alone: those beside them differ in numbers."""
    kernels = tuple(kernel for kernel in program.kernels if kernel.name in names)
    assert len(kernels) == len(names)
    return replace(program, kernels=kernels)


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_default_size(arch):
    """A layer of 1.7B in Q4_K_M with its widest mix of types."""
    program = lower_prefill(prefill_of("1.7b", "q4_k_m", 2), arch)
    assert_gates(only(program, "prefill_matvec", "prefill_attention"), arch)


@pytest.mark.parametrize("dtype", ["q5_k", "q6_k", "q8_0", "bf16", "f32"])
def test_every_type(dtype):
    """f16 is what bf16 is, without a conversion."""
    program = lower_prefill(prefill_product_graph((dtype,), 256, 2048, 512), "sm_90a")
    assert_gates(only(program, "prefill_matvec_swiglu"), "sm_90a")


@pytest.mark.parametrize("kind", CACHE_TYPES)
@pytest.mark.parametrize(("head_dim", "group", "kv_heads", "arch"), [(64, 3, 2, "sm_89"), (256, 2, 1, "sm_90a")])
def test_heads(head_dim, group, kv_heads, arch, kind):
    assert_gates(lower_prefill(heads_graph(head_dim, group, kv_heads, kind), arch), arch)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_q8_cache_of_the_default_size(arch):
    program = lower_prefill(prefill_of("1.7b", "q4_k_m", 2, kv_type="q8"), arch)
    assert_gates(only(program, "prefill_rope_append", "prefill_attention"), arch)


def test_for_a_library():
    program = lower_prefill(prefill_of("1.7b", "q4_k_m", 2), "sm_90a", library=True)
    assert_gates(program, "sm_90a")


def test_launches_of_a_chunk():
    """One for the embedding, eight a layer; of the last layer the three that the caches need."""
    own = lower_prefill(prefill_of("1.7b", "q4_k_m"), "sm_90a")
    assert len(own.step(PREFILL).launches) == 1 + 8 * 27 + 3
    library = lower_prefill(prefill_of("1.7b", "q4_k_m"), "sm_90a", library=True)
    assert sum(isinstance(launch, LibraryProduct) for launch in library.step(PREFILL).launches) == 4 * 27 + 1
    for program, most in ((own, 40 << 20), (library, 140 << 20)):
        scratch = sum(buffer.nbytes for buffer in program.buffers if buffer.kind == "scratch")
        assert scratch <= most, "what a chunk needs beside weights and caches"
