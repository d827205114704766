"""Small kernels against float64: embeddings of every weight type, norms, elementwise ops, rope, cache, token choice."""

from __future__ import annotations

import numpy as np
import pytest
from bars import UNIT, assert_close
from product_graphs import STATES
from run_node import Step, same_bits
from weights import any_bytes, dequantized, raw_weights

from psigraph.codegen.target import target_for
from psigraph.codegen.weight_types import WEIGHT_TYPES
from psigraph.ir.ops.vector import factor_of, gated, normalise
from psigraph.ir.text import parse_graph

EPS = 1e-6
HOST = target_for("host")


def random_vector(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("dtype", WEIGHT_TYPES)
def test_embedding_decodes_blocks_bit_for_bit(dtype):
    """Every product of a block's parts is exact in float32, so one rounding is left, and it is the same everywhere."""
    columns = (256, 768 if WEIGHT_TYPES[dtype].block_columns == 256 else 672)
    rows = (40, 17)
    tables = ", ".join(f"weight %t{i}: {dtype}[{r},{c}]" for i, (r, c) in enumerate(zip(rows, columns, strict=True)))
    norms = ", ".join(f"weight %n{i}: f32[{c}]" for i, c in enumerate(columns))
    lines = []
    for i, c in enumerate(columns):
        lines.append(f"%e{i}: f32[1,{c}] = embed(%t{i}, %tokens)")
        lines += [
            f"%x{i}.{form}: f32[1,{c}], %s{i}.{form}: {form}[1,{c}], %f{i}.{form}: f32[1,1] = "
            f"embed_norm(%t{i}, %tokens, %n{i}) {{eps={EPS}}}"
            for form in ("f32", "i8x2")
        ]
    names = [f"{stem}{i}.{form}" for i in (0, 1) for form in ("f32", "i8x2") for stem in "xsf"] + ["e0", "e1"]
    results = ", ".join(f"{name}=%{name}" for name in names)
    graph = parse_graph(
        f"graph tables({tables}, {norms}, {STATES}) {{\n" + "\n".join(lines) + f"\nreturn {results}\n}}"
    )
    norm = {f"n{i}": 1 + random_vector(c, i) / 4 for i, c in enumerate(columns)}
    for make in (raw_weights, any_bytes):
        raw = {f"t{i}": make(dtype, r, c, i) for i, (r, c) in enumerate(zip(rows, columns, strict=True))}
        with np.errstate(all="ignore"):
            values = [dequantized(raw[f"t{i}"], dtype, rows[i], columns[i]) for i in (0, 1)]
        with Step(graph, HOST, {**raw, **norm}) as step:
            for token in (0, 7, 8, 15, 16):
                got = step.run({"tokens": np.array([token])})
                for i in (0, 1):
                    x = values[i][token]
                    for name in (f"e{i}", f"x{i}.f32", f"x{i}.i8x2"):
                        np.testing.assert_array_equal(got[name][0], x, err_msg=f"{dtype} row {token} {name}")
                    if make is any_bytes:  # may hold infinities
                        continue
                    weighted = x.astype(np.float64) * norm[f"n{i}"]
                    for form in ("f32", "i8x2"):
                        label = f"{dtype} row {token} {form}"
                        assert_close(got[f"s{i}.{form}"], weighted, UNIT * np.abs(weighted), label)
                        wanted = factor_of(x.astype(np.float64), EPS)
                        np.testing.assert_allclose(got[f"f{i}.{form}"][0], wanted, rtol=16 * UNIT, err_msg=label)


@pytest.mark.parametrize("size", [96, 272, 2048])
def test_vectors(size):
    heads = size // 16
    graph = parse_graph(f"""graph vectors(weight %n: f32[{size}], weight %hn: f32[16], {STATES},
            state %a: f32[1,{size}], state %b: f32[1,{size}]) {{
        %norm: f32[1,{size}] = rms_norm(%a, %n) {{eps={EPS}}}
        %normq: i8x2[1,{size}] = rms_norm(%a, %n) {{eps={EPS}}}
        %f: f32[1,1] = rms_factor(%a) {{eps={EPS}}}
        %sum: f32[1,{size}] = add(%a, %b)
        %product: f32[1,{size}] = mul(%a, %n)
        %productq: i8x2[1,{size}] = mul(%a, %n)
        %gated: f32[1,{size}] = swiglu(%a, %b)
        %gatedq: i8x2[1,{size}] = swiglu(%a, %b)
        %digits: i8x2[1,{size}] = quantize(%a)
        %heads: f32[1,{heads},16] = split_heads(%a) {{heads={heads}}}
        %headnorm: f32[1,{heads},16] = rms_norm(%heads, %hn) {{eps={EPS}}}
        %flat: f32[1,{size}] = merge_heads(%headnorm)
        %flatq: i8x2[1,{size}] = merge_heads(%headnorm)
        return norm=%norm, normq=%normq, f=%f, sum=%sum, product=%product, productq=%productq, gated=%gated,
            gatedq=%gatedq, digits=%digits, headnorm=%headnorm, flat=%flat, flatq=%flatq
    }}""")
    weights = {"n": 1 + random_vector(size, 1) / 4, "hn": 1 + random_vector(16, 2) / 4}
    n, hn = (weights[name].astype(np.float64) for name in ("n", "hn"))
    with Step(graph, HOST, weights) as step:
        for kind in ("normal", "outliers", "denormals", "zero"):
            a, b = random_vector(size, 3)[None], random_vector(size, 4)[None]
            if kind == "outliers":
                a[:, ::37] *= 1e4
            elif kind == "denormals":
                a[:, : size // 2] = np.float32(1e-40)
            elif kind == "zero":
                a[:] = 0
            got = step.run({"a": a, "b": b})
            x, y = a.astype(np.float64), b.astype(np.float64)
            normed = normalise(x, n, EPS)
            for name in ("norm", "normq"):
                assert_close(got[name], normed, 24 * UNIT * np.abs(normed) + 1e-45, f"{kind} {name}")
            np.testing.assert_allclose(got["f"], factor_of(x, EPS), rtol=16 * UNIT)
            assert_close(got["sum"], x + y, UNIT * np.abs(x + y), f"{kind} sum")
            for name in ("product", "productq"):
                assert_close(got[name], x * n, UNIT * np.abs(x * n) + 1e-45, f"{kind} {name}")
            silu = gated(x, y)
            for name in ("gated", "gatedq"):
                # The exponent's rounding grows with its size; below exp(-80) float32 has nothing left.
                bound = 8 * UNIT * (1 + np.abs(x)) * np.abs(silu) + 1e-34 * np.abs(x * y) + 1e-44
                assert_close(got[name], silu, bound, f"{kind} {name}")
            assert_close(got["digits"], x, 0.0, f"{kind} digits")
            by_head = normalise(x.reshape(1, heads, 16), hn, EPS)
            assert_close(got["headnorm"], by_head, 24 * UNIT * np.abs(by_head) + 1e-45, f"{kind} headnorm")
            assert_close(got["flat"], by_head.ravel(), 24 * UNIT * np.abs(by_head).ravel() + 1e-45, f"{kind} flat")
            assert_close(got["flatq"], by_head.ravel(), 24 * UNIT * np.abs(by_head).ravel() + 1e-45, f"{kind} flatq")
            for order in ("reverse", "shuffle"):
                again = step.run({"a": a, "b": b}, order)
                assert all(same_bits(got[name], again[name]) for name in got)


def test_two_weights_of_one_shape_keep_apart():
    """mul and add of one value with itself, results used again: buffers are reused, values are not mixed up."""
    graph = parse_graph(f"""graph reuse({STATES}, state %a: f32[1,64]) {{
        %b: f32[1,64] = add(%a, %a)
        %c: f32[1,64] = mul(%b, %a)
        %d: f32[1,64] = add(%c, %b)
        %e: f32[1,64] = mul(%d, %c)
        %g: f32[1,64] = add(%e, %a)
        return a=%g
    }}""")
    a = np.arange(64, dtype=np.float32)[None]
    with Step(graph, HOST, {}) as step:
        got = step.run({"a": a})["a"]
    c = 2 * a * a
    np.testing.assert_array_equal(got, (c + 2 * a) * c + a)


@pytest.mark.parametrize("vocabulary", [40, 1024, 5000])
def test_token_choice(vocabulary):
    """Ties go to the lowest index, what is not finite is noticed wherever it stands, log and stop flag follow."""
    graph = parse_graph(f"""graph choice({STATES}, state %logits: f32[1,{vocabulary}]) {{
        %best: i32[1] = argmax(%logits)
        %log1: i32[1,32] = record(%log, %best, %positions, %sequences)
        %stop1: i32[1] = stop_on(%best, %end_tokens, %stop, %positions, %sequences)
        %positions1: i32[1] = advance(%positions)
        %tokens2: i32[1], %log2: i32[1,32], %stop2: i32[1], %positions2: i32[1] =
            choose(%logits, %log1, %end_tokens, %stop1, %positions1, %sequences)
        return best=%best, log=%log2, stop=%stop2, positions=%positions2, tokens=%tokens2
    }}""")
    logits = random_vector(vocabulary, 1)
    tied = logits.copy()
    tied[[vocabulary - 1, 9, 33]] = 50.0
    negative = -np.abs(logits) - 1
    negative[5] = -0.5
    one_out = np.where(np.arange(vocabulary) == 9, logits, -np.inf)
    signed_zero = np.full(vocabulary, -0.0, np.float32)
    cases = [(logits, int(np.argmax(logits))), (tied, 9), (negative, 5), (one_out, 9), (signed_zero, 0)]
    for wrong in (np.nan, -np.nan, np.inf):
        places = (0, 12, vocabulary - 1)
        cases += [(np.where(np.arange(vocabulary) == place, wrong, logits), -1) for place in places]
    cases += [(np.full(vocabulary, wrong), -1) for wrong in (-np.inf, np.inf, np.nan)]
    with Step(graph, HOST, {}) as step:
        for values, best in cases:
            nothing = [-1] * 7
            # (end tokens, stop before, stop afterwards)
            for ends, before, after in (
                ([-1, *nothing], 0, int(best == -1)),
                ([best, *nothing], 0, 1),
                ([*nothing, best], 0, 1),
                ([-1, *nothing], 1, 1),
            ):
                states = {
                    "logits": values.astype("f4"),
                    "positions": [30],
                    "stop": [before],
                    "log": [-7] * 32,
                    "end_tokens": ends,
                }
                got = step.run({name: np.array(array) for name, array in states.items()})
                found = [int(got[name][0]) for name in ("best", "tokens", "stop", "positions")]
                assert found == [best, best, after, 32]
                assert got["log"].tolist() == [[-7] * 30 + [best, best]]
