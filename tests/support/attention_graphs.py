"""Graphs of attention over a cache, for a list of head sizes and groups, and what their caches hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import q8_memory

from psigraph.codegen.target import Target, target_for
from psigraph.ir.graph import Graph
from psigraph.ir.text import parse_graph
from psigraph.ir.types import Q8_GROUP, quantize_q8

EPS, THETA = 1e-6, 1e6
HALF_UNIT = 2.0**-11
# (head_dim, query heads a key/value head, key/value heads, multiprocessors, blocks of a cluster at most)
SHAPES = [(16, 1, 2, 132, 8), (16, 4, 1, 2, 1), (32, 2, 2, 132, 4), (64, 2, 2, 3, 4), (64, 4, 1, 132, 8),
          (96, 2, 1, 132, 8), (128, 1, 1, 4, 8), (128, 2, 2, 4, 1), (128, 2, 2, 132, 8), (128, 4, 2, 132, 8),
          (128, 5, 1, 132, 8), (128, 2, 8, 132, 1), (128, 4, 2, 1, 4), (256, 2, 1, 132, 8),
          (128, 2, 8, 16, 8),
          (16, 1, 2, 132, 1),
          (192, 4, 1, 132, 8)]  # whole sets of heads, and a ring of three stages in a cluster  # fmt: skip
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
    cache = f"{kind}[1,{kv_heads},{context},{head_dim}]"
    query, key = f"f32[1,{heads * head_dim}]", f"f32[1,{kv_heads * head_dim}]"
    attrs = f"eps={EPS}, theta={THETA}, heads={heads}, kv_heads={kv_heads}"
    operands, rows = "%q, %k, %v, %q_norm, %k_norm", "%positions, %sequences"
    return parse_graph(f"""graph attend(weight %q_norm: f32[{head_dim}], weight %k_norm: f32[{head_dim}],
            state %q: {query}, state %k: {key}, state %v: {key}, state %k_cache: {cache}, state %v_cache: {cache},
            state %positions: i32[1], state %sequences: i32[1]) {{
        %turned: f32[1,{heads},{head_dim}], %k1: {cache}, %v1: {cache} =
            rope_append({operands}, %k_cache, %v_cache, {rows}) {{{attrs}}}
        %a1: f32[1,{heads},{head_dim}] = attention(%turned, %k1, %v1, {rows}) {{scale={head_dim**-0.5}}}
        %a2: {query}, %k2: {cache}, %v2: {cache} =
            rope_attention({operands}, %k1, %v1, {rows}) {{{attrs}, scale={head_dim**-0.5}}}
        %a3: i8x2[1,{heads * head_dim}], %k3: {cache}, %v3: {cache} =
            rope_attention({operands}, %k2, %v2, {rows}) {{{attrs}, scale={head_dim**-0.5}}}
        return turned=%turned, a1=%a1, a2=%a2, a3=%a3, k_cache=%k3, v_cache=%v3
    }}""")


def positions_of(sm_count: int, kv_heads: int, cluster: int) -> tuple[int, list[int]]:
    """(context, positions): the first ones, those around the edges of tiles and of a round of all warps, the last."""
    splits = cluster if cluster > 1 else max(1, min(32, sm_count // kv_heads))
    tiles = min(4 * splits, 12)  # where warps are few, so that each has several
    context = 16 * 2 * tiles + 7
    edges = [0, 1, 15, 16, 17, 31, 63, 64, 65, 16 * splits, 16 * tiles - 1, 16 * tiles, context - 1]
    return context, sorted({edge for edge in edges if edge < context})


def held(kind: str, rows: np.ndarray, first: int) -> np.ndarray:
    """The memory of a cache that holds these rows [kv_heads, context, head_dim], with NaN from position `first` on."""
    if kind == "q8":
        memory = q8_memory.pack(*quantize_q8(rows))
        return q8_memory.poison(memory, rows.shape[0], rows.shape[2], first)
    halves = rows.astype(np.float16)
    halves[:, first:] = np.nan
    return halves


def check_rows(
    memory: np.ndarray, before: np.ndarray, shape: tuple[int, ...], first: int, count: int, what: str
) -> np.ndarray:
    """Only the positions first .. first + count - 1 have changed; returns what a cache stands for, float16[shape].

    shape: [kv_heads, context, head_dim].
    """
    kv_heads, context, head_dim = shape
    values = memory if memory.dtype == np.uint8 else memory.reshape(shape)
    parts = [(values, before)]
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
