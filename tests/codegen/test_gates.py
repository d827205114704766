"""What every kernel must be before it may ship: machine code for every architecture, with nothing spilled."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from machine_code import assert_gates
from shipped import FUSIONS, graph_of, tiny_graph, unfused

from psigraph.build import fuse
from psigraph.codegen.device import device_headers
from psigraph.codegen.lower import lower
from psigraph.codegen.target import GPU_ARCHES, TARGETS
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.text import parse_graph, print_graph
from psigraph.runtime.cuda.compiler import compile_program
from psigraph.runtime.cuda.kernel_cache import KernelCache

INCLUDE = re.compile(r"^\s*#\s*include\b[^\n]*", re.M)


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_tiny_model(arch):
    assert_gates(lower(tiny_graph("q4_k_m"), TARGETS[arch]), arch)


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_default_size(arch):
    assert_gates(lower(graph_of("1.7b", "q4_k_m"), TARGETS[arch]), arch)


# An architecture each, so that every size and every mix of types meets the assembler; 8b has a head of its own.
@pytest.mark.parametrize(
    ("size", "quant", "arch"),
    [
        ("0.6b", "q4_k_m", "sm_80"),
        ("0.6b", "f16", "sm_90a"),
        ("1.7b", "f16", "sm_90a"),
        ("1.7b", "q8_0", "sm_90a"),
        ("1.7b", "q5_k_m", "sm_89"),
        ("4b", "q4_k_m", "sm_90a"),
        ("8b", "q8_0", "sm_90a"),
    ],
)
def test_other_sizes(size, quant, arch):
    assert_gates(lower(graph_of(size, quant), TARGETS[arch]), arch)


@pytest.mark.parametrize("arch", GPU_ARCHES)
def test_a_q8_cache(arch):
    """Fused and not; the text for 0.6b to 8b differs in numbers, and for groups of more than four in a second set."""
    for size, disable in (("1.7b", ()), ("4b", ("fuse_attention", "fuse_rope_append"))):
        program = lower(graph_of(size, "q4_k_m", 1, kv_type="q8", disable=disable), TARGETS[arch])
        names = [kernel.name for kernel in program.kernels if re.match("rope|attention|cache", kernel.name)]
        assert names
        kernels = tuple(kernel for kernel in program.kernels if kernel.name in names)
        assert_gates(replace(program, kernels=kernels), arch)


def test_largest_size():
    """Its widest product has slices of three superblocks, and its head a matrix of its own."""
    assert_gates(lower(graph_of("8b", "q4_k_m"), TARGETS["sm_90a"]), "sm_90a")


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_small_kernels_and_every_type(dtype):
    """The unfused step: what runs when all fusions are disabled, for every type a file may have."""
    text = print_graph(unfused("q8_0"))
    unlowered = parse_graph(re.sub(r"\bq8_0(?=\[\d+,\d+\])", dtype, text))
    assert_gates(lower(fuse(unlowered, FUSIONS)[0], TARGETS["sm_90a"]), "sm_90a")


def test_texts_include_the_device_headers_and_nothing_else():
    """The NVRTC wheel carries no header: a kernel that includes one compiles only where a toolkit happens to be."""
    texts = list(device_headers().values())
    for quant in ("q4_k_m", "q8_0"):
        texts += [kernel.text for kernel in lower(tiny_graph(quant), TARGETS["sm_90a"]).kernels]
    for text in texts:
        for line in INCLUDE.findall(text):
            included = re.fullmatch(r'#include "(\w+\.cuh)"', line.strip())
            assert included, line
            assert included[1] in device_headers(), line


def test_a_step_of_1_7b_compiles_in_20_s_and_loads_from_the_cache_in_half_a_second(tmp_path, capsys):
    program = lower(graph_of("1.7b", "q4_k_m", logits=False), TARGETS["sm_90a"])
    cache = KernelCache(tmp_path / "kernels")
    started = time.perf_counter()
    first = compile_program(program, "sm_90a", cache)
    cold = time.perf_counter() - started
    started = time.perf_counter()
    second = compile_program(program, "sm_90a", cache)
    warm = time.perf_counter() - started
    with capsys.disabled():
        print(f"\n1.7B Q4_K_M, {len(first)} kernels: compiled in {cold:.1f} s, from the cache in {warm * 1e3:.0f} ms")
    assert not any(kernel.cached for kernel in first.values())
    assert all(kernel.cached for kernel in second.values())
    assert {name: kernel.image for name, kernel in first.items()} == {n: k.image for n, k in second.items()}
    assert cold <= 20
    assert warm <= 0.5
