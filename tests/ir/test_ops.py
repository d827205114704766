"""The op table: complete rows, meanings against formulas written out, type rules' refusals."""

import re
from pathlib import Path

import numpy as np
import pytest

from psigraph.ir.document import op_tables
from psigraph.ir.graph import TensorType
from psigraph.ir.op import Machine, TypeMismatch
from psigraph.ir.ops import FUSED, OPS, UNFUSED

RNG = np.random.default_rng(3)
DOCS = Path(__file__).parents[2] / "docs"


def types(*texts):
    found = []
    for text in texts:
        dtype, extents = re.fullmatch(r"(\w+)\[([\d,]+)\]", text).groups()
        found.append(TensorType(dtype, tuple(map(int, extents.split(",")))))
    return found


def compute(op, *ins, **attrs):
    outs = OPS[op].meaning(Machine(), list(ins), attrs)
    return outs if len(outs) > 1 else outs[0]


def test_the_documentation_carries_the_table():
    assert op_tables() in (DOCS / "ir.md").read_text(encoding="utf-8")


def test_rows_are_consistent():
    for op in (*UNFUSED, *FUSED):
        assert set(op.consumes) <= set(op.operands) & set(op.results), op.name
        assert set(op.may_quantize) <= set(op.results), op.name
        assert op.summary
        assert not set(op.attributes) & set(op.optional)
    assert len(OPS) == len(UNFUSED) + len(FUSED)


def test_rms_norm():
    x, weight = RNG.standard_normal((3, 8)), RNG.standard_normal(8)
    wanted = [row / np.sqrt((row**2).sum() / 8 + 1e-3) * weight for row in x]
    np.testing.assert_allclose(compute("rms_norm", x, weight, eps=1e-3), wanted)
    np.testing.assert_allclose(compute("rms_norm", x[0], weight, eps=1e-3), wanted[0])
    np.testing.assert_allclose(compute("rms_factor", x[0], eps=1e-3), [1 / np.sqrt((x[0] ** 2).mean() + 1e-3)])


def test_rope_turns_pairs_of_the_two_halves():
    x, position = RNG.standard_normal((2, 8)), 5
    turned = compute("rope", x, np.array([position]), theta=100.0)
    for head in range(2):
        for i in range(4):
            pair = complex(x[head, i], x[head, i + 4]) * np.exp(1j * position * 100.0 ** (-2 * i / 8))
            np.testing.assert_allclose([turned[head, i], turned[head, i + 4]], [pair.real, pair.imag])


def test_attention_shares_key_heads_in_groups():
    heads, kv_heads, dim, position = 4, 2, 8, 2
    q = RNG.standard_normal((heads, dim))
    k, v = RNG.standard_normal((2, kv_heads, 6, dim))
    found = compute("attention", q, k, v, np.array([position]), scale=0.5)
    for head in range(heads):
        scores = np.array([0.5 * q[head] @ k[head // 2, at] for at in range(position + 1)])
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(found[head], sum(w * v[head // 2, at] for at, w in enumerate(weights)))


def test_attention_survives_large_scores():
    q, k, v = np.full((1, 2), 1e4), np.full((1, 2, 2), 1e4), np.ones((1, 2, 2))
    np.testing.assert_array_equal(compute("attention", q, k, v, np.array([1]), scale=1.0), [[1, 1]])


def test_swiglu_for_large_gates():
    gate, up = np.array([0.0, 1.0, -1e4, 1e4]), np.array([2.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(compute("swiglu", gate, up), [0, 2 / (1 + np.exp(-1)), 0, 2e4], atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_cache_append_rounds_to_f16_and_copies_unless_told(in_place):
    cache, row = np.zeros((2, 4, 2), dtype=np.float16), np.array([[1 / 3, 1.0], [2.0, 3.0]])
    (after,) = OPS["cache_append"].meaning(Machine(in_place_cache=in_place), [cache, row, np.array([2])], {})
    np.testing.assert_array_equal(after[:, 2], row.astype(np.float16))
    assert not after[:, [0, 1, 3]].any()
    assert (after is cache) == in_place


def test_choose():
    log, ends = np.zeros(4, dtype=np.int32), np.array([3, -1])
    logits = np.array([0.0, 2.0, 1.0, 2.0])
    token, log2, stop, position = compute("choose", logits, log, ends, np.array([0]), np.array([2]))
    assert (token[0], list(log2), stop[0], position[0]) == (1, [0, 0, 1, 0], 0, 3)
    logits[3] = 3
    assert compute("choose", logits, log, ends, np.array([0]), np.array([2]))[2][0] == 1
    # A stop that was set stays set.
    assert compute("stop_on", np.array([1]), ends, np.array([1]))[0] == 1


CACHES = ("f16[2,16,8]", "f16[2,16,8]", "i32[1]")
ROPE = {"eps": 1e-6, "theta": 1e4, "heads": 4, "kv_heads": 2}
CHOICE = ("i32[16]", "i32[8]", "i32[1]", "i32[1]")


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "wanted"),
    [
        ("embed", ("q6_k[9,256]", "i32[1]"), {}, ["f32[256]"]),
        ("matvec", ("i8x2[256]", "q4_k[7,256]", "q6_k[5,256]"), {}, ["f32[7]", "f32[5]"]),
        ("split_heads", ("f32[32]",), {"heads": 4}, ["f32[4,8]"]),
        ("quantize", ("f32[32]",), {}, ["i8x2[32]"]),
        ("scaled_swiglu", ("i8x2[32]", "f32[1]", "q8_0[5,32]", "q8_0[5,32]"), {}, ["f32[5]"]),
        ("matvec_add_norm", ("f32[32]", "f16[6,32]", "f32[6]", "f32[6]"), {"eps": 1e-6},
         ["f32[6]", "f32[6]", "f32[1]"]),
        ("rope_append", ("f32[32]", "f32[16]", "f32[16]", "f32[8]", "f32[8]", *CACHES), ROPE,
         ["f32[4,8]", "f16[2,16,8]", "f16[2,16,8]"]),
        ("rope_attention", ("f32[32]", "f32[16]", "f32[16]", "f32[8]", "f32[8]", *CACHES), {**ROPE, "scale": 0.3},
         ["f32[32]", "f16[2,16,8]", "f16[2,16,8]"]),
        ("matvec_choose", ("f32[32]", "f16[9,32]", *CHOICE), {}, ["i32[1]", "i32[16]", "i32[1]", "i32[1]"]),
        ("scaled_matvec_choose", ("f32[32]", "f32[1]", "f16[9,32]", *CHOICE), {"keep_logits": True},
         ["f32[9]", "i32[1]", "i32[16]", "i32[1]", "i32[1]"]),
    ],
)  # fmt: skip
def test_type_rules(op, operands, attrs, wanted):
    assert [str(found) for found in OPS[op].infer(types(*operands), attrs)] == wanted


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "message"),
    [
        ("embed", ("q6_k[256]", "i32[1]"), {}, "table is q6_k[256], wanted"),
        ("embed", ("q6_k[9,256]", "f32[1]"), {}, "token is f32[1], wanted i32[1]"),
        ("rms_norm", ("f32[4,8]", "f32[4]"), {"eps": 1e-6}, "weight is f32[4], wanted f32[8]"),
        ("rms_norm", ("i8x2[16]", "f32[16]"), {"eps": 1e-6}, "x is i8x2[16], wanted f32[?]"),
        ("split_heads", ("f32[32]",), {"heads": 5}, "a vector that 5 heads can share"),
        ("split_heads", ("f32[32]",), {"heads": 0}, "a vector that 0 heads can share"),
        ("rope", ("f32[2,7]", "i32[1]"), {"theta": 1.0}, "an even head_dim"),
        ("cache_append", ("f32[2,16,8]", "f32[2,8]", "i32[1]"), {}, "cache is f32[2,16,8], wanted f16|q8[2,?,8]"),
        ("attention", ("f32[3,8]", *CACHES), {"scale": 1.0}, "2 key/value heads divide"),
        ("attention", ("f32[4,8]", "f16[2,16,8]", "f16[2,15,8]", "i32[1]"), {"scale": 1.0}, "v_cache is"),
        ("attention", ("f32[4,8]", "q8[2,16,8]", "f16[2,16,8]", "i32[1]"), {"scale": 1.0},
         "v_cache is f16[2,16,8], wanted q8"),
        ("add", ("f32[4]", "f32[5]"), {}, "b is f32[5], wanted f32[4]"),
        ("quantize", ("f32[20]",), {}, "whole groups of 16"),
        ("matvec", ("f32[32]", "q8_0[4,32]", "i32[4,32]"), {}, "w1 is i32[4,32]"),
        ("matvec_add", ("f32[32]", "q8_0[4,32]", "f32[5]"), {}, "residual is f32[5], wanted f32[4]"),
        ("scaled_matvec", ("f32[32]", "f32[2]", "q8_0[4,32]"), {}, "f is f32[2], wanted f32[1]"),
        ("matvec_swiglu", ("f32[32]", "q8_0[4,32]", "q8_0[5,32]"), {}, "w_up is q8_0[5,32]"),
        ("rope_append", ("f32[24]", "f32[16]", "f32[16]", "f32[8]", "f32[8]", *CACHES), {**ROPE, "heads": 3},
         "3 heads are no multiple of 2"),
        ("rope_append", ("f32[32]", "f32[8]", "f32[16]", "f32[8]", "f32[8]", *CACHES), ROPE, "k is f32[8]"),
        ("choose", ("f32[2,3]", *CHOICE), {}, "logits is f32[2,3]"),
        ("swiglu", ("f32[4]",), {}, "takes 2 operands (gate, up), not 1"),
        ("scaled_matvec", ("f32[32]", "f32[1]"), {}, "takes at least 3 operands, not 2"),
    ],
)  # fmt: skip
def test_type_rules_refuse(op, operands, attrs, message):
    with pytest.raises(TypeMismatch) as caught:
        OPS[op].infer(types(*operands), attrs)
    assert message in str(caught.value)


def test_what_an_op_remembers_keeps_equal_attributes_of_other_types_apart():
    wanted = OPS["rope"].infer(types("f32[2,8]", "i32[1]"), {"theta": 1.0})
    assert OPS["rope"].infer(types("f32[2,8]", "i32[1]"), {"theta": 1.0}) == wanted
    for wrong in (1, True):
        with pytest.raises(TypeMismatch, match="wants theta as float"):
            OPS["rope"].infer(types("f32[2,8]", "i32[1]"), {"theta": wrong})


def test_quantizable_results():
    assert OPS["matvec_add_norm"].quantizable(4, {}) == (1,)
    assert OPS["rope_attention"].quantizable(8, {}) == (0,)
    assert OPS["matvec"].quantizable(3, {}) == ()
