"""Kernels over a sequence: weight types x shapes x token counts, heads x positions, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from bars import SUM_UNITS, UNIT, assert_close
from prefill_graphs import CHUNK, CONTEXT, EPS, THETA, PrefillStep, heads_graph, prefill_product_graph
from product_graphs import random_matrices
from run_node import Arrays, same_bits
from test_attention import check_rows, held, row_bound
from test_products import terms

from psigraph.codegen.prefill_lower import lower_prefill
from psigraph.codegen.target import target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir import meaning
from psigraph.ir.errors import UnsupportedModelError
from psigraph.ir.graph import Graph
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
    with PrefillStep(graph, raw, library) as step:
        for count in (1, 33, 128, 129, TOKENS):
            states["span"] = np.array([7, count], np.int32)
            got = step.run(states)
            check_products(graph, values, states, got, count, f"{'+'.join(dtypes)}, {count} tokens")
        for order in ("reverse", "shuffle"):
            again = step.run(states, order)
            assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


def check_products(graph: Graph, values: Arrays, states: Arrays, got: Arrays, count: int, what: str) -> None:
    x = states["x"][:count].astype(np.float64)
    norm = meaning.normalise(x, values["norm"], EPS)
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

    few = values["w2"].shape[0]
    rows = values["w0"].shape[0]
    merged = got["q"][:count]  # q, k and v lie in one row
    assert merged.shape == (count, 2 * rows + few)
    for name, weight, part in (
        ("q", "w0", merged[:, :rows]),
        ("k", "w1", merged[:, rows : 2 * rows]),
        ("v", "w2", merged[:, 2 * rows :]),
    ):
        want, bound = product(weight, h)
        assert_halves_close(part, want, bound, f"{what}: {name}")
    want, bound = product("w0", h)
    residual = states["residual"][:count].astype(np.float64)
    assert_halves_close(got["more"][:count], residual + want, bound + ROUND * np.abs(residual), f"{what}: more")
    (gate, gate_bound), (up, up_bound) = product("w0", h), product("w1", h)
    silu = gate / (1 + np.exp(-np.clip(gate, -700, 700)))
    act = silu * up
    bound = 1.1 * gate_bound * np.abs(up) + np.abs(silu) * up_bound + gate_bound * up_bound + ROUND * np.abs(act)
    found = got["act"][:count].astype(np.float64) * 16  # stored times 2^-4
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
            state %span: i32[2]) {{
        %h: f16[8,64] = rms_norm(%x, %norm) {{eps={EPS}}}
        %act: f16[8,32] = matvec_swiglu(%h, %w, %w)
        return h=%h, act=%act
    }}""")
    matrix = np.full((32, 64), 1, np.float16)
    raw = {"w": matrix.view(np.uint8).ravel(), "norm": np.full(64, 9, np.float32)}
    with PrefillStep(graph, raw) as step:
        got = step.run({"x": np.ones((8, 64)), "span": np.array([0, 8])})
    want = float(got["h"][0, 0]) ** 2 * 64**2
    assert want > 65504
    np.testing.assert_allclose(got["act"].astype(np.float64) * 16, want, rtol=2**-10)


# (head_dim, query heads a key/value head, key/value heads)
HEADS = [(16, 1, 2), (32, 3, 2), (128, 5, 1), (256, 2, 1)]


@pytest.mark.parametrize("kind", ["f16", "q8"])
@pytest.mark.parametrize(("head_dim", "group", "kv_heads"), HEADS)
def test_heads(head_dim, group, kv_heads, kind):
    generator = np.random.default_rng(head_dim + group)
    norms = {name: (1 + generator.standard_normal(head_dim) / 4).astype(np.float32) for name in ("q_norm", "k_norm")}
    heads = group * kv_heads
    with PrefillStep(heads_graph(head_dim, group, kv_heads, kind), norms) as step:
        for first, count in ((0, 1), (0, CHUNK), (15, 2), (63, 2), (70, 33), (CONTEXT - CHUNK, CHUNK)):
            what = f"{count} tokens at {first}"
            states = {
                "q": generator.standard_normal((CHUNK, heads * head_dim)).astype(np.float32) * 3,
                "k": generator.standard_normal((CHUNK, kv_heads * head_dim)).astype(np.float32),
                "v": generator.standard_normal((CHUNK, kv_heads * head_dim)).astype(np.float32),
                "span": np.array([first, count], np.int32),
            }
            for name in ("k_cache", "v_cache"):
                rows = generator.standard_normal((kv_heads, CONTEXT, head_dim))
                states[name] = held(kind, rows, first)  # nobody may look at what lies behind the span
            got = step.run(states)
            check_heads(kind, norms, states, got, head_dim, what)
        for order in ("reverse", "shuffle"):
            again = step.run(states, order)
            assert all(same_bits(got[name], again[name]) for name in got), f"order {order} shows"


def check_heads(kind: str, norms: Arrays, states: Arrays, got: Arrays, head_dim: int, what: str) -> None:
    first, count = (int(n) for n in states["span"])
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
            rows = states[name][t].astype(np.float64).reshape(-1, head_dim)
            normed = meaning.normalise(rows, norms[norm].astype(np.float64), EPS)
            want = meaning.rotate(normed, first + t, THETA)
            size = np.hypot(normed[:, :half], normed[:, half:])
            error = 24 * UNIT * np.concatenate([size, size], axis=1)
            bound = error + rounded(want) if name == "q" else row_bound(kind, want, error)
            assert (np.abs(found.astype(np.float64) - want) <= bound).all(), f"{what}: {name} of token {t}"
        value = states["v"][t].reshape(-1, head_dim)
        value = value.astype(np.float16) if kind == "f16" else round_q8(value)
        np.testing.assert_array_equal(caches["v_cache"][:, first + t], value, err_msg=what)
        if t in (0, 1, count // 2, count - 1):
            keys, values, scale = caches["k_cache"], caches["v_cache"], head_dim**-0.5
            want = meaning.attend(turned[t], keys, values, first + t, scale)
            size = meaning.attend(turned[t], keys, np.abs(values), first + t, scale)
            # Weights and results are rounded to halves; scores are sums in float32 of exact products.
            scores = np.abs(turned[t]).sum(axis=1).max() * np.nanmax(np.abs(keys.astype(np.float64))) * scale
            bound = (2 * HALF_UNIT + 4 * ROUND * (1 + scores)) * size + LEAST_HALF
            assert (np.abs(outputs[t] - want) <= bound).all(), f"{what}: attention of token {t}"


def test_embedding_and_state():
    """Every table type at once; the log takes the tokens, the position moves behind the span."""
    tables = "".join(f"weight %{dtype}: {dtype}[40,512], " for dtype in WEIGHT_TYPES)
    lines = "".join(f"%x_{dtype}: f32[70,512] = embed(%{dtype}, %tokens)\n" for dtype in WEIGHT_TYPES)
    results = "".join(f"x_{dtype}=%x_{dtype}, " for dtype in WEIGHT_TYPES)
    graph = parse_graph(f"""graph begin({tables} state %tokens: i32[70,1], state %log: i32[99],
            state %position: i32[1], state %span: i32[2]) {{
        {lines} %log2: i32[99] = record(%log, %tokens, %span)
        %position2: i32[1] = advance(%span)
        return {results} log=%log2, position=%position2
    }}""")
    raw, values = random_matrices(graph)
    tokens = np.random.default_rng(1).integers(0, 40, (70, 1)).astype(np.int32)
    tokens[:2, 0] = (0, 39)
    log = np.full(99, -5, np.int32)
    with PrefillStep(graph, raw) as step:
        for first, count in ((0, 70), (20, 3)):
            got = step.run({"tokens": tokens, "log": log, "span": np.array([first, count], np.int32)})
            for dtype in WEIGHT_TYPES:
                want = values[dtype][tokens[:count, 0]]
                assert_close(got[f"x_{dtype}"][:count], want, 4 * UNIT * terms(want, dtype), dtype)
            wanted = log.copy()
            wanted[first : first + count] = tokens[:count, 0]
            assert got["log"].tolist() == wanted.tolist()
            assert got["position"].tolist() == [first + count]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("%y: f32[8,256] = matvec(%x, %w)", "%x has other readers"),
        ("%h: f32[8,256] = rms_norm(%x, %norm) {eps=1e-6}", "kernels make halves"),
        ("%y: f32[8,256] = add(%x, %x)", "op add has no kernel"),
    ],
)
def test_what_no_kernel_supports(lines, why):
    name = lines.split(":")[0]
    graph = parse_graph(f"""graph odd(weight %w: q4_k[256,256], weight %norm: f32[256], state %x: f32[8,256],
            state %span: i32[2]) {{ {lines} return y={name} }}""")
    with pytest.raises(UnsupportedModelError, match=why):
        lower_prefill(graph, target_for("host"))
