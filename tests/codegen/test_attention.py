"""Attention, rope and cache kernels: head sizes x groups x positions x splits, against float64."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import q8_memory
from attention_graphs import CASES, EPS, THETA, attention_graph, check_rows, held, positions_of, row_bound, target_of
from bars import SUM_UNITS, UNIT, assert_close
from run_node import Step, same_bits

from psigraph.codegen.lower import lower
from psigraph.codegen.target import target_for
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.graph import Graph
from psigraph.ir.ops.attention import attend, rotate
from psigraph.ir.ops.vector import normalise
from psigraph.ir.text import parse_graph
from psigraph.ir.types import quantize_q8, round_q8


@pytest.mark.parametrize(("kind", "head_dim", "group", "kv_heads", "sm_count", "cluster"), CASES)
def test_attention(kind, head_dim, group, kv_heads, sm_count, cluster):
    context, positions = positions_of(sm_count, kv_heads, cluster)
    graph = attention_graph(head_dim, group, kv_heads, context, kind)
    generator = np.random.default_rng(head_dim + group)
    norms = {name: (1 + generator.standard_normal(head_dim) / 4).astype(np.float32) for name in ("q_norm", "k_norm")}
    with Step(graph, target_of(sm_count, cluster), norms) as step:
        for position in positions:
            states = {
                "q": generator.standard_normal(group * kv_heads * head_dim).astype(np.float32) * 3,
                "k": generator.standard_normal(kv_heads * head_dim).astype(np.float32),
                "v": generator.standard_normal(kv_heads * head_dim).astype(np.float32),
                "positions": np.array([position], np.int32),
            }
            for name in ("k_cache", "v_cache"):
                rows = generator.standard_normal((kv_heads, context, head_dim))
                # Nobody may look at what lies behind the position.
                states[name] = held(kind, rows, position)
            got = step.run(states)
            check(graph, norms, states, got, f"position {position}")
            if position in (0, positions[-1]):
                for order in ("reverse", "shuffle"):
                    again = step.run(states, order)
                    assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


def test_what_lies_in_shared_memory_before_decides_nothing():
    """Columns of heads that a set lacks, and places behind a head's columns: no number there may change a bit.

    The host target fills shared memory with NaN, which loses every comparison; here it holds numbers.
    """
    head_dim, group, context, position = 48, 2, 300, 290  # several tiles a warp, so that a maximum is compared
    graph, target = attention_graph(head_dim, group, 1, context), target_of(1, 1)
    program = lower(graph, target)
    declared = re.compile(r"\bu16 queries\[([\w: *]+)\]\[([\w:]+)\];")
    numbers = r"for (int i = threadIdx.x; i < (\1) * (\2); i += 128) queries[i / (\2)][i % (\2)] = 0x6000;"
    filled = rf"\g<0> {numbers} __syncthreads();"
    kernels = tuple(replace(kernel, text=declared.sub(filled, kernel.text)) for kernel in program.kernels)
    headers = {name: declared.sub(filled, text) for name, text in program.headers.items()}
    changed = replace(program, kernels=kernels, headers=headers)
    assert changed != program
    generator = np.random.default_rng(1)
    norms = {name: (1 + generator.standard_normal(head_dim) / 4).astype(np.float32) for name in ("q_norm", "k_norm")}
    states = {
        "q": generator.standard_normal(group * head_dim).astype(np.float32) * 3,
        "k": generator.standard_normal(head_dim).astype(np.float32),
        "v": generator.standard_normal(head_dim).astype(np.float32),
        "positions": np.array([position], np.int32),
    }
    for name in ("k_cache", "v_cache"):
        states[name] = held("f16", generator.standard_normal((1, context, head_dim)), position)
    found = []
    for each in (program, changed):
        with Step(graph, target, norms, program=each) as step:
            found.append(step.run(states))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


def test_a_head_too_wide_for_the_shared_memory_is_refused():
    graph = attention_graph(256, 16, 1, 64)
    with pytest.raises(UnsupportedModelError, match="head_dim 256 with 16 query heads a key/value head needs more"):
        lower(graph, target_for("sm_120"))
    lower(attention_graph(256, 4, 1, 64), target_for("sm_120"))


def check(graph: Graph, norms: dict, states: dict, got: dict, what: str) -> None:
    kind, shape = graph.param("k_cache").type.dtype, graph.param("k_cache").type.shape[1:]
    kv_heads, _, head_dim = shape
    position = int(states["positions"][0])
    here, sequence = np.array([position]), np.zeros(1, np.int32)
    wide = {name: array.astype(np.float64) for name, array in {**norms, **states}.items()}

    def turned(name: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        heads = wide[name].reshape(1, -1, head_dim)
        normed = normalise(heads, wide[norm], EPS)
        half = head_dim // 2
        size = np.hypot(normed[..., :half], normed[..., half:])
        return rotate(normed, here, THETA), 24 * UNIT * np.concatenate([size, size], axis=-1)

    q, q_bound = turned("q", "q_norm")
    assert_close(got["turned"], q, q_bound, f"{what}: turned")
    k, k_bound = turned("k", "k_norm")
    caches = {}
    for name, row, bound in (("k_cache", k, k_bound), ("v_cache", wide["v"].reshape(kv_heads, -1), 0.0)):
        caches[name] = check_rows(got[name], states[name], shape, position, 1, f"{what}: {name}")[None]
        error = np.abs(caches[name][0, :, position].astype(np.float64) - row)
        assert (error <= row_bound(kind, row, bound)).all(), f"{what}: {name}"
    if kind == "q8":  # the very integers that numpy makes of a row of float32
        wanted_row = quantize_q8(wide["v"].reshape(kv_heads, -1))
        for found, wanted in zip(q8_memory.unpack(got["v_cache"], kv_heads, head_dim), wanted_row, strict=True):
            np.testing.assert_array_equal(found[:, position], wanted, err_msg=what)
    scale = head_dim**-0.5
    for name, query, q_error in (
        ("a1", got["turned"].astype(np.float64), 0.0),
        ("a2", q, q_bound),
        ("a3", q, q_bound),
    ):
        seen = (caches["k_cache"], caches["v_cache"], here, sequence, scale)
        wanted = attend(query, *seen)
        bound = attention_bound(query, q_error, *seen)
        assert_close(got[name], wanted.reshape(-1), bound.reshape(-1), f"{what}: {name}")


def attention_bound(
    q: np.ndarray,
    q_error: np.ndarray | float,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
    scale: float,
) -> np.ndarray:
    """For one row. A score that is off by e changes its weight by a factor exp(e); sums of weighted values round as
    products do."""
    kv_heads, head_dim = k_cache.shape[1], q.shape[2]
    keys = np.abs(k_cache[0, :, : positions[0] + 1].astype(np.float64)).transpose(0, 2, 1)
    size = (SUM_UNITS * UNIT * np.abs(q) + q_error).reshape(kv_heads, -1, head_dim)
    score_error = (size @ keys * scale).max(axis=-1, keepdims=True)
    # The kernel's exponent is base 2 and itself a rounded number.
    top = (np.abs(q).reshape(kv_heads, -1, head_dim) @ keys * scale).max(axis=-1, keepdims=True)
    values = attend(q, k_cache, np.abs(v_cache), positions, sequences, scale).reshape(kv_heads, -1, head_dim)
    return (2 * score_error + 4 * UNIT * top + SUM_UNITS * UNIT) * values


@pytest.mark.parametrize("kind", ["f16", "q8"])
@pytest.mark.parametrize("position", [0, 1, 40])
def test_rope_and_cache_append_alone(position, kind):
    """What runs when the fusions are disabled."""
    graph = parse_graph(f"""graph rope(state %x: f32[1,6,48], state %cache: {kind}[1,6,41,48], state %positions: i32[1],
            state %sequences: i32[1]) {{
        %y: f32[1,6,48] = rope(%x, %positions) {{theta=10000.0}}
        %cache2: {kind}[1,6,41,48] = cache_append(%cache, %y, %positions, %sequences)
        return y=%y, cache=%cache2
    }}""")
    x = np.random.default_rng(1).standard_normal((1, 6, 48)).astype(np.float32)
    cache = held(kind, np.random.default_rng(2).standard_normal((6, 41, 48)), position)
    with Step(graph, target_for("host"), {}) as step:
        got = step.run({"x": x, "cache": cache, "positions": np.array([position])})
    wanted = rotate(x.astype(np.float64), np.array([position]), 10000.0)
    assert_close(got["y"], wanted, 4 * UNIT * np.abs(x).max(), "rope")
    values = check_rows(got["cache"], cache, (6, 41, 48), position, 1, "cache")
    row = got["y"][0].astype(np.float16) if kind == "f16" else round_q8(got["y"][0])
    np.testing.assert_array_equal(values[:, position], row)
