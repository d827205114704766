"""Nothing is left out: every line of every kernel that a model needs has been run (`catalogue`)."""

from __future__ import annotations

import functools

import pytest
from attention_graphs import CASES, attention_graph, positions_of
from attention_graphs import target_of as attention_target
from catalogue import EVERY_FORM, MIXED, MIXED_SHAPES, PRODUCTS, SHAPE_CLASSES, product_cases, statements
from product_graphs import overridden, product_graph, target_of
from shipped import FUSIONS, graph_of, one_layer_of_each, tiny_graph

from psigraph.codegen.lower import lower
from psigraph.codegen.occupancy import ATTENTIONS
from psigraph.codegen.target import TARGETS, target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.program import Program
from psigraph.runtime.synth import model as synth


def test_every_weight_type_has_every_shape_class():
    cases = set(product_cases())
    for dtype in WEIGHT_TYPES:
        for shape in SHAPE_CLASSES:
            assert ((dtype, shape) in cases) == shape.suits(dtype)
    assert {dtype for dtype, _ in cases} == set(WEIGHT_TYPES)


def needed(program: Program) -> dict[str, frozenset[str]]:
    """Op -> statements of its kernels in the step."""
    step = program.step()
    ops = {out.name: node.op for node in step.graph.nodes for out in node.outs}
    found: dict[str, frozenset[str]] = {}
    for op, kernel in dict.fromkeys((ops[launch.nodes[0]], launch.kernel) for launch in step.kernels):
        found[op] = found.get(op, frozenset()) | statements(program.kernel(kernel).text)
    return found


@functools.cache
def statements_tested() -> dict[str, frozenset[str]]:
    """Op -> statements of the kernels that tests hold against float64."""
    found: dict[str, frozenset[str]] = {}
    cases = [((dtype,), shape) for dtype, shape in product_cases()]
    cases += [(dtypes, shape) for dtypes in MIXED for shape in MIXED_SHAPES]
    programs = []
    for dtypes, shape in cases:
        graph = product_graph(dtypes, shape.rows, shape.columns, every_form=shape.name in EVERY_FORM)
        programs.append(lower(graph, target_of(shape), overridden(graph, shape)))
    for kind, head_dim, group, kv_heads, sm_count, cluster in CASES:
        context, _ = positions_of(sm_count, kv_heads, cluster)
        graph = attention_graph(head_dim, group, kv_heads, context, kind)
        programs.append(lower(graph, attention_target(sm_count, cluster)))
    for program in programs:
        for op, lines in needed(program).items():
            found[op] = found.get(op, frozenset()) | lines
    return found


def assert_nothing_missing(program: Program, what: str) -> None:
    """No statement that no test runs; small kernels are templates without branches, so each is tested as it is."""
    missing = [
        f"{op}: {line}"
        for op, lines in needed(program).items()
        if op in PRODUCTS or op in ATTENTIONS
        for line in sorted(lines - statements_tested().get(op, frozenset()))
    ]
    assert not missing, "\n".join([what, *missing])


# What has no kernels: float32 activations and a superblock of float16 for each warp exceed a block's shared memory.
TOO_WIDE = {("sm_86", "f16"): ("8b",), ("sm_89", "f16"): ("8b",), ("sm_120", "f16"): ("8b",)}


@pytest.mark.parametrize("arch", list(TARGETS))
@pytest.mark.parametrize("quant", ["q4_k_m", "q5_k_m", "q8_0", "f16"])
def test_models_need_no_other_kernels(quant, arch):
    for size in synth.SIZES:
        graph = one_layer_of_each(size, quant)
        if size not in TOO_WIDE.get((arch, quant), ()):
            assert_nothing_missing(lower(graph, TARGETS[arch]), size)
        else:
            with pytest.raises(
                UnsupportedModelError, match=rf"over \d+ columns needs more shared memory than {arch} has"
            ):
                lower(graph, TARGETS[arch])


@pytest.mark.parametrize(("size", "quant", "arch"), [("1.7b", "q4_k_m", "sm_90a"), ("8b", "q5_k_m", "host")])
def test_a_layer_of_each_mix_has_the_kernels_of_the_whole_model(size, quant, arch):
    whole, short = lower(graph_of(size, quant), TARGETS[arch]), lower(one_layer_of_each(size, quant), TARGETS[arch])
    assert len(short.step().launches) < len(whole.step().launches) / 4
    assert needed(short) == needed(whole)


@pytest.mark.parametrize("arch", list(TARGETS))
def test_models_with_a_q8_cache_need_no_other_kernels(arch):
    for size in synth.SIZES:
        for disabled in ((), ("fuse_attention",)):
            program = lower(graph_of(size, "q8_0", 1, kv_type="q8", disable=disabled), TARGETS[arch])
            assert_nothing_missing(program, size)


@pytest.mark.parametrize("disabled", [(), *[(name,) for name in FUSIONS]])
@pytest.mark.parametrize("quant", ["q4_k_m", "q8_0"])
def test_the_tiny_model_needs_no_other_kernels(quant, disabled):
    for sm_count in (3, 4, 132):
        program = lower(tiny_graph(quant, disabled), target_for("host", sm_count))
        assert_nothing_missing(program, f"tiny for {sm_count} multiprocessors")
