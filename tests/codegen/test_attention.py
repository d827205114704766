"""Attention, rope and cache kernels: head sizes x groups x positions x splits, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import q8_memory
from bars import SUM_UNITS, UNIT, assert_close
from run_node import Step, same_bits

from psigraph.codegen.lower import lower
from psigraph.codegen.target import Target, target_for
from psigraph.ir import meaning
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.graph import Graph
from psigraph.ir.text import parse_graph
from psigraph.ir.types import Q8_GROUP, quantize_q8, round_q8

EPS, THETA = 1e-6, 1e6
HALF_UNIT = 2.0**-11
# (head_dim, query heads a key/value head, key/value heads, multiprocessors, blocks of a cluster at most)
SHAPES = [(16, 1, 2, 132, 8), (16, 4, 1, 2, 1), (32, 2, 2, 132, 4), (64, 2, 2, 3, 4), (64, 4, 1, 132, 8),
          (96, 2, 1, 132, 8), (128, 1, 1, 4, 8), (128, 2, 2, 4, 1), (128, 2, 2, 132, 8), (128, 4, 2, 132, 8),
          (128, 5, 1, 132, 8), (128, 2, 8, 132, 1), (128, 4, 2, 1, 4), (256, 2, 1, 132, 8),
          (128, 2, 8, 16, 8),
          (16, 1, 2, 132, 1)]  # fmt: skip
# For a q8 cache: head sizes of whole groups and not, clusters and none, sets of heads, warps with several tiles.
Q8_SHAPES = [(16, 1, 2, 132, 8), (48, 2, 2, 3, 4), (64, 4, 1, 4, 1), (80, 5, 1, 132, 8), (128, 2, 2, 132, 8),
             (128, 2, 2, 4, 1), (128, 4, 2, 1, 4), (256, 2, 1, 132, 8), (64, 16, 1, 132, 2),
             (128, 11, 1, 132, 4)]  # fmt: skip
CASES = [("f16", *shape) for shape in SHAPES] + [("q8", *shape) for shape in Q8_SHAPES]


def target_of(sm_count: int, cluster: int) -> Target:
    """The host target with clusters of this size, or as a GPU without them."""
    target = target_for("host", sm_count)
    return target.plain() if cluster == 1 else replace(target, cluster=cluster)


def attention_graph(head_dim: int, group: int, kv_heads: int, context: int, kind: str = "f16") -> Graph:
    """Append and attend as three kernels, as one with f32 results and as one with i8x2 results."""
    heads = group * kv_heads
    cache = f"{kind}[{kv_heads},{context},{head_dim}]"
    query, key = f"f32[{heads * head_dim}]", f"f32[{kv_heads * head_dim}]"
    attrs = f"eps={EPS}, theta={THETA}, heads={heads}, kv_heads={kv_heads}"
    operands = "%q, %k, %v, %q_norm, %k_norm"
    return parse_graph(f"""graph attend(weight %q_norm: f32[{head_dim}], weight %k_norm: f32[{head_dim}],
            state %q: {query}, state %k: {key}, state %v: {key}, state %k_cache: {cache}, state %v_cache: {cache},
            state %log: i32[{context}], state %position: i32[1]) {{
        %turned: f32[{heads},{head_dim}], %k1: {cache}, %v1: {cache} =
            rope_append({operands}, %k_cache, %v_cache, %position) {{{attrs}}}
        %a1: f32[{heads},{head_dim}] = attention(%turned, %k1, %v1, %position) {{scale={head_dim**-0.5}}}
        %a2: {query}, %k2: {cache}, %v2: {cache} =
            rope_attention({operands}, %k1, %v1, %position) {{{attrs}, scale={head_dim**-0.5}}}
        %a3: i8x2[{heads * head_dim}], %k3: {cache}, %v3: {cache} =
            rope_attention({operands}, %k2, %v2, %position) {{{attrs}, scale={head_dim**-0.5}}}
        return turned=%turned, a1=%a1, a2=%a2, a3=%a3, k_cache=%k3, v_cache=%v3
    }}""")


def positions_of(sm_count: int, kv_heads: int, cluster: int) -> tuple[int, list[int]]:
    """(context, positions): the first ones, those around the edges of tiles and of a round of all warps, the last."""
    splits = cluster if cluster > 1 else max(1, min(32, sm_count // kv_heads))
    tiles = min(4 * splits, 12)  # where warps are few, so that each has several
    context = 16 * 2 * tiles + 7
    edges = [0, 1, 15, 16, 17, 31, 63, 64, 65, 16 * splits, 16 * tiles - 1, 16 * tiles, context - 1]
    return context, sorted({edge for edge in edges if edge < context})


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
                "position": np.array([position], np.int32),
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
    declared = "queries[SETS * 8][QUERY];"
    numbers = "for (int i = threadIdx.x; i < SETS * 8 * QUERY; i += 128) queries[i / QUERY][i % QUERY] = 0x6000;"
    filled = f"{declared}\n{numbers}\n__syncthreads();"
    changed = tuple(replace(kernel, text=kernel.text.replace(declared, filled)) for kernel in program.kernels)
    assert sum(kernel.text.count(filled) for kernel in changed) == 3  # attention, and the two fusions with it
    generator = np.random.default_rng(1)
    norms = {name: (1 + generator.standard_normal(head_dim) / 4).astype(np.float32) for name in ("q_norm", "k_norm")}
    states = {
        "q": generator.standard_normal(group * head_dim).astype(np.float32) * 3,
        "k": generator.standard_normal(head_dim).astype(np.float32),
        "v": generator.standard_normal(head_dim).astype(np.float32),
        "position": np.array([position], np.int32),
    }
    for name in ("k_cache", "v_cache"):
        states[name] = held("f16", generator.standard_normal((1, context, head_dim)), position)
    found = []
    for each in (program, replace(program, kernels=changed)):
        with Step(graph, target, norms, program=each) as step:
            found.append(step.run(states))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


def test_a_head_too_wide_for_the_shared_memory_is_refused():
    graph = attention_graph(256, 16, 1, 64)
    with pytest.raises(UnsupportedModelError, match="head_dim 256 with 16 query heads a key/value head needs more"):
        lower(graph, target_for("sm_120"))
    lower(attention_graph(256, 4, 1, 64), target_for("sm_120"))


def held(kind: str, rows: np.ndarray, first: int) -> np.ndarray:
    """The memory of a cache that holds these rows [kv_heads, context, head_dim], with NaN from position `first` on."""
    if kind == "q8":
        memory = q8_memory.pack(*quantize_q8(rows))
        return q8_memory.poison(memory, rows.shape[0], rows.shape[2], first)
    halves = rows.astype(np.float16)
    halves[:, first:] = np.nan
    return halves


def check_rows(memory: np.ndarray, before: np.ndarray, shape: tuple[int, ...], first: int, count: int, what: str):
    """Only the positions first .. first + count - 1 have changed; returns what a cache stands for, float16[shape]."""
    kv_heads, context, head_dim = shape
    parts = [(memory, before)]
    values = memory
    if memory.dtype == np.uint8:
        planes = (q8_memory.unpack(each, kv_heads, head_dim) for each in (memory, before))
        parts = list(zip(*planes, strict=True))
        values = q8_memory.values_of(memory, kv_heads, head_dim)[:, :context]
    for now, then in parts:
        for kept in (slice(0, first), slice(first + count, None)):
            np.testing.assert_array_equal(now[:, kept], then[:, kept], err_msg=what)
    return values


def row_bound(kind: str, rows: np.ndarray, error: np.ndarray | float) -> np.ndarray:
    """How far a cache's rows may be from `rows`, which are themselves known up to `error`."""
    if kind == "f16":
        return error + HALF_UNIT * np.abs(rows) + 2.0**-25
    starts = range(0, rows.shape[-1], Q8_GROUP)
    size = np.maximum.reduceat(np.abs(rows) + error, starts, axis=-1)
    amax = np.repeat(size, Q8_GROUP, axis=-1)[..., : rows.shape[-1]]
    # Half a step of the integers; a scale rounded to a half, 127 times; the product rounded to a half.
    return error + amax / 254 * 1.001 + 2 * HALF_UNIT * amax + 128 * 2.0**-25


def check(graph: Graph, norms: dict, states: dict, got: dict, what: str) -> None:
    kind, shape = graph.param("k_cache").type.dtype, graph.param("k_cache").type.shape
    kv_heads, _, head_dim = shape
    position = int(states["position"][0])
    wide = {name: array.astype(np.float64) for name, array in {**norms, **states}.items()}

    def turned(name: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
        heads = wide[name].reshape(-1, head_dim)
        normed = meaning.normalise(heads, wide[norm], EPS)
        half = head_dim // 2
        size = np.hypot(normed[:, :half], normed[:, half:])
        return meaning.rotate(normed, position, THETA), 24 * UNIT * np.concatenate([size, size], axis=1)

    q, q_bound = turned("q", "q_norm")
    assert_close(got["turned"], q, q_bound, f"{what}: turned")
    k, k_bound = turned("k", "k_norm")
    caches = {}
    for name, row, bound in (("k_cache", k, k_bound), ("v_cache", wide["v"].reshape(kv_heads, -1), 0.0)):
        caches[name] = check_rows(got[name], states[name], shape, position, 1, f"{what}: {name}")
        error = np.abs(caches[name][:, position].astype(np.float64) - row)
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
        wanted = meaning.attend(query, caches["k_cache"], caches["v_cache"], position, scale)
        bound = attention_bound(query, q_error, caches["k_cache"], caches["v_cache"], position, scale)
        assert_close(got[name], wanted.reshape(-1), bound.reshape(-1), f"{what}: {name}")


def attention_bound(
    q: np.ndarray, q_error: np.ndarray | float, k_cache: np.ndarray, v_cache: np.ndarray, position: int, scale: float
) -> np.ndarray:
    """A score that is off by e changes its weight by a factor exp(e); sums of weighted values round as products do."""
    kv_heads = k_cache.shape[0]
    keys = np.abs(k_cache[:, : position + 1].astype(np.float64)).transpose(0, 2, 1)
    size = (SUM_UNITS * UNIT * np.abs(q) + q_error).reshape(kv_heads, -1, q.shape[1])
    score_error = (size @ keys * scale).max(axis=-1, keepdims=True)
    # The kernel's exponent is base 2 and itself a rounded number.
    top = (np.abs(q).reshape(kv_heads, -1, q.shape[1]) @ keys * scale).max(axis=-1, keepdims=True)
    values = meaning.attend(q, k_cache, np.abs(v_cache), position, scale).reshape(kv_heads, -1, q.shape[1])
    return (2 * score_error + 4 * UNIT * top + SUM_UNITS * UNIT) * values


@pytest.mark.parametrize("kind", ["f16", "q8"])
@pytest.mark.parametrize("position", [0, 1, 40])
def test_rope_and_cache_append_alone(position, kind):
    """What runs when the fusions are disabled."""
    graph = parse_graph(f"""graph rope(state %x: f32[6,48], state %cache: {kind}[6,41,48], state %log: i32[41],
            state %position: i32[1]) {{
        %y: f32[6,48] = rope(%x, %position) {{theta=10000.0}}
        %cache2: {kind}[6,41,48] = cache_append(%cache, %y, %position)
        return y=%y, cache=%cache2
    }}""")
    x = np.random.default_rng(1).standard_normal((6, 48)).astype(np.float32)
    cache = held(kind, np.random.default_rng(2).standard_normal((6, 41, 48)), position)
    with Step(graph, target_for("host"), {}) as step:
        got = step.run({"x": x, "cache": cache, "position": np.array([position])})
    wanted = meaning.rotate(x.astype(np.float64), position, 10000.0)
    assert_close(got["y"], wanted, 4 * UNIT * np.abs(x).max(), "rope")
    values = check_rows(got["cache"], cache, (6, 41, 48), position, 1, "cache")
    row = got["y"].astype(np.float16) if kind == "f16" else round_q8(got["y"])
    np.testing.assert_array_equal(values[:, position], row)
