"""Kernels over many rows: weight types x shapes x token counts, heads x positions, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from attention_graphs import check_rows, held, row_bound
from bars import SUM_UNITS, UNIT, assert_close
from prefill_graphs import CHUNK, CONTEXT, EPS, THETA, heads_graph, prefill_product_graph, row_states
from product_graphs import random_matrices, terms
from run_node import Arrays, Step, same_bits

from psigraph.codegen.lower import lower
from psigraph.codegen.target import target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.graph import Graph
from psigraph.ir.ops.attention import attend, rotate
from psigraph.ir.ops.vector import normalise
from psigraph.ir.regime import Regime
from psigraph.ir.text import parse_graph
from psigraph.ir.types import FLOAT_WEIGHTS, round_q8

HALF_UNIT, LEAST_HALF = 2.0**-11, 2.0**-25  # what rounding to a half costs, relative and where it is subnormal
ROUND = SUM_UNITS * UNIT
TOKENS = 160  # a whole block of tokens and a part of one
# (types of the matrices, rows, columns, library): each type alone and beside others, whole and ragged rows and columns.
PRODUCTS = [
    (("q4_k", "q4_k", "q6_k"), 256, 512, False),
    (("q5_k", "bf16", "q4_k"), 104, 256, False),
    (("q8_0", "f16", "f32"), 88, 672, False),
    (("q4_k", "q6_k", "q5_k"), 256, 256, True),
    (("q8_0", "bf16", "f32"), 72, 288, True),
    (("f16", "f16", "f16"), 16, 96, True),
]


def test_every_weight_type_is_in_a_case_of_either_way():
    for library in (False, True):
        assert {dtype for types, *_, way in PRODUCTS for dtype in types if way == library} == set(WEIGHT_TYPES)


def many_rows(graph: Graph, weights: Arrays, library: bool = False) -> Step:
    return Step(graph, target_for("host"), weights, regime=Regime.MANY, library=library)


def span(rows: int, first: int, count: int) -> Arrays:
    """States: rows at positions from `first` on, of which `count` are there."""
    positions = np.full(rows, -1, np.int32)
    positions[:count] = first + np.arange(count)
    return {"positions": positions, "count": np.array([count])}


def rounded(x: np.ndarray) -> np.ndarray:
    """How far a half may be from x."""
    return HALF_UNIT * np.abs(x) + LEAST_HALF


@pytest.mark.parametrize(("dtypes", "rows", "columns", "library"), PRODUCTS)
def test_products(dtypes, rows, columns, library):
    graph = prefill_product_graph(dtypes, rows, columns, TOKENS)
    raw, values = random_matrices(graph)
    generator = np.random.default_rng(5)
    states = {
        "x": generator.standard_normal((TOKENS, columns)).astype(np.float32),
        "residual": generator.standard_normal((TOKENS, rows)).astype(np.float32),
        "less": generator.standard_normal((TOKENS, 24)).astype(np.float32),
    }
    states["x"][:, ::37] *= 100  # outliers
    states["x"][3] = 0
    states["x"][4] *= 1e-30
    with many_rows(graph, raw, library) as step:
        for count in (1, 33, 128, 129, TOKENS):
            states |= span(TOKENS, 7, count)
            got = step.run(states)
            check_products(graph, values, states, got, count, f"{'+'.join(dtypes)}, {count} tokens")
        for order in ("reverse", "shuffle"):
            again = step.run(states, order)
            assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


def check_products(graph: Graph, values: Arrays, states: Arrays, got: Arrays, count: int, what: str) -> None:
    x = states["x"][:count].astype(np.float64)
    norm = normalise(x, values["norm"], EPS)
    assert_close(got["h"][:count], norm, rounded(norm) + 16 * UNIT * np.abs(norm), f"{what}: h")
    h = got["h"][:count].astype(np.float64)

    def product(weight: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """w @ x of every row, and how far it may be. A weight as halves is scale * (quant - centre) + offset: scale,
        offset and result are rounded, and what is rounded is at most as large as the largest weight of its block."""
        matrix, dtype = values[weight], graph.param(weight).type.dtype
        size = (2 * HALF_UNIT + ROUND) * np.abs(matrix) + HALF_UNIT / 3 * terms(matrix, dtype) + LEAST_HALF
        if dtype in ("q8_0", *FLOAT_WEIGHTS):  # rounded once
            size = (HALF_UNIT + ROUND) * np.abs(matrix) + LEAST_HALF
        return x @ matrix.T, np.abs(x) @ size.T

    for name, weight in (("q", "w0"), ("k", "w1"), ("v", "w2")):
        want, bound = product(weight, h)
        assert_halves_close(got[name][:count], want, bound, f"{what}: {name}")
    want, bound = product("w0", h)
    residual = states["residual"][:count].astype(np.float64)
    assert_halves_close(got["more"][:count], residual + want, bound + ROUND * np.abs(residual), f"{what}: more")
    (gate, gate_bound), (up, up_bound) = product("w0", h), product("w1", h)
    silu = gate / (1 + np.exp(-np.clip(gate, -700, 700)))
    act = silu * up
    bound = 1.1 * gate_bound * np.abs(up) + np.abs(silu) * up_bound + gate_bound * up_bound + ROUND * np.abs(act)
    found = got["act"][:count].astype(np.float64)
    assert_halves_close(found, act, bound + rounded(act) + 16 * LEAST_HALF, f"{what}: act")
    if "down" in values:
        want, bound = product("down", found)
        less = states["less"][:count].astype(np.float64)
        assert_halves_close(got["x2"][:count], less + want, bound + ROUND * np.abs(less), f"{what}: x2")


def assert_halves_close(got: np.ndarray, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Within the bound, and the NMSE bar of halves."""
    error = np.abs(got.astype(np.float64) - want)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    assert (error <= bound).all(), f"{what}: {got[worst]} at {worst}, wanted {want[worst]} within {bound[worst]:.3g}"
    power = (want**2).sum()
    assert (error**2).sum() <= 1e-6 * power + 1e-60, f"{what}: NMSE {(error**2).sum() / power:.2e}"


def test_large_activations_do_not_overflow():
    """What SwiGLU makes may be larger than a half holds: it is stored times 2^-4."""
    graph = parse_graph(f"""graph large(weight %w: f16[32,64], weight %norm: f32[64], state %x: f32[8,64],
            {row_states(8)}) {{
        %h: f16[8,64] = rms_norm(%x, %norm) {{eps={EPS}}}
        %act: f16[8,32] = matvec_swiglu(%h, %w, %w)
        return h=%h, act=%act
    }}""")
    matrix = np.full((32, 64), 1, np.float16)
    raw = {"w": matrix.view(np.uint8).ravel(), "norm": np.full(64, 9, np.float32)}
    with many_rows(graph, raw) as step:
        got = step.run({"x": np.ones((8, 64)), **span(8, 0, 8)})
    want = float(got["h"][0, 0]) ** 2 * 64**2
    assert want > 65504
    np.testing.assert_allclose(got["act"].astype(np.float64), want, rtol=2**-10)


# (head_dim, query heads a key/value head, key/value heads)
HEADS = [(16, 1, 2), (32, 3, 2), (128, 5, 1), (256, 2, 1)]


@pytest.mark.parametrize("kind", ["f16", "q8"])
@pytest.mark.parametrize(("head_dim", "group", "kv_heads"), HEADS)
def test_heads(head_dim, group, kv_heads, kind):
    generator = np.random.default_rng(head_dim + group)
    norms = {name: (1 + generator.standard_normal(head_dim) / 4).astype(np.float32) for name in ("q_norm", "k_norm")}
    heads = group * kv_heads
    with many_rows(heads_graph(head_dim, group, kv_heads, kind), norms) as step:
        for first, count in ((0, 1), (0, CHUNK), (15, 2), (63, 2), (70, 33), (CONTEXT - CHUNK, CHUNK)):
            what = f"{count} tokens at {first}"
            states = {
                "q": generator.standard_normal((CHUNK, heads * head_dim)).astype(np.float32) * 3,
                "k": generator.standard_normal((CHUNK, kv_heads * head_dim)).astype(np.float32),
                "v": generator.standard_normal((CHUNK, kv_heads * head_dim)).astype(np.float32),
                **span(CHUNK, first, count),
            }
            for name in ("k_cache", "v_cache"):
                rows = generator.standard_normal((kv_heads, CONTEXT, head_dim))
                states[name] = held(kind, rows, first)  # nobody may look at what lies behind the chunk
            got = step.run(states)
            check_heads(kind, norms, states, got, (first, count), head_dim, what)
        for order in ("reverse", "shuffle"):
            again = step.run(states, order)
            assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


def check_heads(
    kind: str, norms: Arrays, states: Arrays, got: Arrays, rows: tuple[int, int], head_dim: int, what: str
) -> None:
    first, count = rows
    shape = (states["k"].shape[1] // head_dim, CONTEXT, head_dim)
    caches = {
        name: check_rows(got[name], states[name], shape, first, count, f"{what}: {name}")
        for name in ("k_cache", "v_cache")
    }
    half = head_dim // 2
    turned = got["turned"].reshape(CHUNK, -1, head_dim).astype(np.float64)
    outputs = got["a"].reshape(CHUNK, -1, head_dim).astype(np.float64)
    for t in range(count):
        for name, norm, found in (("q", "q_norm", turned[t]), ("k", "k_norm", caches["k_cache"][:, first + t])):
            heads = states[name][t].astype(np.float64).reshape(-1, head_dim)
            normed = normalise(heads, norms[norm].astype(np.float64), EPS)
            want = rotate(normed[None], np.array([first + t]), THETA)[0]
            size = np.hypot(normed[:, :half], normed[:, half:])
            error = 24 * UNIT * np.concatenate([size, size], axis=1)
            bound = error + rounded(want) if name == "q" else row_bound(kind, want, error)
            assert (np.abs(found.astype(np.float64) - want) <= bound).all(), f"{what}: {name} of token {t}"
        value = states["v"][t].reshape(-1, head_dim)
        value = value.astype(np.float16) if kind == "f16" else round_q8(value)
        np.testing.assert_array_equal(caches["v_cache"][:, first + t], value, err_msg=what)
        if t in (0, 1, count // 2, count - 1):
            keys, values, scale = caches["k_cache"], caches["v_cache"], head_dim**-0.5
            here, sequence = np.array([first + t]), np.zeros(1, np.int32)
            want = attend(turned[t : t + 1], keys[None], values[None], here, sequence, scale)[0]
            size = attend(turned[t : t + 1], keys[None], np.abs(values)[None], here, sequence, scale)[0]
            # Weights and results are rounded to halves; scores are sums in float32 of exact products.
            scores = np.abs(turned[t]).sum(axis=1).max() * np.nanmax(np.abs(keys.astype(np.float64))) * scale
            bound = (2 * HALF_UNIT + 4 * ROUND * (1 + scores)) * size + LEAST_HALF
            assert (np.abs(outputs[t] - want) <= bound).all(), f"{what}: attention of token {t}"


def test_embedding_and_log():
    """Every table type at once; the log takes the tokens."""
    tables = "".join(f"weight %{dtype}: {dtype}[40,512], " for dtype in WEIGHT_TYPES)
    lines = "".join(f"%x_{dtype}: f32[70,512] = embed(%{dtype}, %tokens)\n" for dtype in WEIGHT_TYPES)
    results = "".join(f"x_{dtype}=%x_{dtype}, " for dtype in WEIGHT_TYPES)
    graph = parse_graph(f"""graph begin({tables} state %tokens: i32[70], state %log: i32[1,99], {row_states(70)}) {{
        {lines} %log2: i32[1,99] = record(%log, %tokens, %positions, %sequences)
        return {results} log=%log2
    }}""")
    raw, values = random_matrices(graph)
    tokens = np.random.default_rng(1).integers(0, 40, 70).astype(np.int32)
    tokens[:2] = (0, 39)
    log = np.full((1, 99), -5, np.int32)
    with many_rows(graph, raw) as step:
        for first, count in ((0, 70), (20, 3)):
            got = step.run({"tokens": tokens, "log": log, **span(70, first, count)})
            for dtype in WEIGHT_TYPES:
                want = values[dtype][tokens[:count]]
                assert_close(got[f"x_{dtype}"][:count], want, 4 * UNIT * terms(want, dtype), dtype)
            wanted = log.copy()
            wanted[0, first : first + count] = tokens[:count]
            assert got["log"].tolist() == wanted.tolist()


def refused(line: str) -> str:
    """Why lowering for many rows refuses a node."""
    graph = parse_graph(f"""graph odd(weight %w: q4_k[256,256], state %x: f32[8,256], state %q: f16[8,2,16],
            state %cache: f16[1,1,32,16], {row_states(8)}) {{ {line} return y={line.split(":")[0]} }}""")
    with pytest.raises(UnsupportedModelError) as caught:
        lower(graph, target_for("host"), regime=Regime.MANY)
    return str(caught.value)


def test_what_no_kernel_supports():
    assert refused("%y: f32[8,256] = matvec(%x, %w)").startswith("%x has other readers")
    attention = "attention(%q, %cache, %cache, %positions, %sequences) {scale=1.0}"
    assert refused(f"%y: f32[8,2,16] = {attention}").startswith("attention over many rows: kernels read halves and")
    assert refused("%y: f32[8,1] = rms_factor(%x) {eps=1e-6}") == "op rms_factor has no kernel for many rows"
