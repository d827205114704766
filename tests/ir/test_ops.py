"""The op table: complete rows, references against formulas written out, type rules' refusals."""

import re

import numpy as np
import pytest

from psigraph.inspect.op_table import op_tables
from psigraph.ir.graph import TensorType
from psigraph.ir.op import EvalContext, TypeMismatch
from psigraph.ir.ops import FUSED, OPS, UNFUSED
from psigraph.text.sampler import SamplerSettings

RNG = np.random.default_rng(3)


def types(*texts):
    found = []
    for text in texts:
        dtype, extents = re.fullmatch(r"(\w+)\[([\d,]+)\]", text).groups()
        found.append(TensorType(dtype, tuple(map(int, extents.split(",")))))
    return found


def compute(op, *ins, **attrs):
    outs = OPS[op].reference(EvalContext(), list(ins), attrs)
    return outs if len(outs) > 1 else outs[0]


def test_every_op_is_documented():
    assert all(f"`{name}(" in op_tables() for name in OPS)


def test_rows_are_consistent():
    for op in (*UNFUSED, *FUSED):
        assert set(op.consumes) <= set(op.operands) & set(op.results), op.name
        assert set(op.may_quantize) <= set(op.results), op.name
        assert op.summary
        assert not set(op.attributes) & set(op.optional)
    assert len(OPS) == len(UNFUSED) + len(FUSED)


def test_rms_norm():
    x, weight = RNG.standard_normal((3, 8)), RNG.standard_normal(8)
    wanted = np.array([row / np.sqrt((row**2).sum() / 8 + 1e-3) * weight for row in x])
    np.testing.assert_allclose(compute("rms_norm", x, weight, eps=1e-3), wanted)
    np.testing.assert_allclose(compute("rms_norm", x[:, None], weight, eps=1e-3), wanted[:, None])
    np.testing.assert_allclose(compute("rms_factor", x[:1], eps=1e-3), [[1 / np.sqrt((x[0] ** 2).mean() + 1e-3)]])


def test_rope_turns_pairs_of_the_two_halves():
    x, positions = RNG.standard_normal((2, 2, 8)), (5, 11)
    turned = compute("rope", x, np.array(positions), theta=100.0)
    for row, position in enumerate(positions):
        for head in range(2):
            for i in range(4):
                pair = complex(x[row, head, i], x[row, head, i + 4]) * np.exp(1j * position * 100.0 ** (-2 * i / 8))
                np.testing.assert_allclose(turned[row, head, [i, i + 4]], [pair.real, pair.imag])


def test_attention_shares_key_heads_in_groups():
    heads, kv_heads, dim = 4, 2, 8
    rows = ((1, 2), (0, 4))  # (sequence, position)
    q = RNG.standard_normal((2, heads, dim))
    k, v = RNG.standard_normal((2, 2, kv_heads, 6, dim))
    sequences, positions = np.array(rows).T
    found = compute("attention", q, k, v, positions, sequences, scale=0.5)
    for row, (sequence, position) in enumerate(rows):
        for head in range(heads):
            keys, values = k[sequence, head // 2], v[sequence, head // 2]
            weights = np.exp([0.5 * q[row, head] @ keys[at] for at in range(position + 1)])
            wanted = sum(w * values[at] for at, w in enumerate(weights / weights.sum()))
            np.testing.assert_allclose(found[row, head], wanted)


def test_attention_survives_large_scores():
    q, k, v = np.full((1, 1, 2), 1e4), np.full((1, 1, 2, 2), 1e4), np.ones((1, 1, 2, 2))
    found = compute("attention", q, k, v, np.array([1]), np.array([0]), scale=1.0)
    np.testing.assert_array_equal(found, [[[1, 1]]])


def test_swiglu_for_large_gates():
    gate, up = np.array([0.0, 1.0, -1e4, 1e4]), np.array([2.0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(compute("swiglu", gate, up), [0, 2 / (1 + np.exp(-1)), 0, 2e4], atol=1e-12)


@pytest.mark.parametrize("in_place", [False, True])
def test_cache_append_rounds_to_f16_and_copies_unless_told(in_place):
    cache, row = np.zeros((2, 2, 4, 2), dtype=np.float16), np.array([[[1 / 3, 1.0], [2.0, 3.0]]])
    ins = [cache, row, np.array([2]), np.array([1])]
    (after,) = OPS["cache_append"].reference(EvalContext(in_place_cache=in_place), ins, {})
    np.testing.assert_array_equal(after[1, :, 2], row[0].astype(np.float16))
    assert not after[1][:, [0, 1, 3]].any()
    assert not after[0].any()
    assert (after is cache) == in_place


def test_choose():
    log, ends, first = np.zeros((1, 4), dtype=np.int32), np.array([3, -1]), np.array([0])
    logits = np.array([[0.0, 2.0, 1.0, 2.0]])
    token, log2, stop, position = compute("choose", logits, log, ends, first, np.array([2]), first)
    assert (token[0], list(log2[0]), stop[0], position[0]) == (1, [0, 0, 1, 0], 0, 3)
    logits[0, 3] = 3
    assert compute("choose", logits, log, ends, first, np.array([2]), first)[2][0] == 1
    # A stop that was set stays set.
    assert compute("stop_on", np.array([1]), ends, np.array([1]), np.array([2]), first)[0] == 1


def test_of_equal_rows_the_position_decides_what_is_drawn():
    logits, settings = np.zeros((5, 60)), SamplerSettings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0).words()
    drawn = [compute("draw", logits, logits[:, :1], settings, np.array([first, 7, 8, 9, 7])) for first in (0, 7)]
    assert drawn[0][1] == drawn[0][4] == drawn[1][0]
    assert len(set(drawn[0][:4].tolist())) > 2


ROW = ("i32[1]", "i32[1]")
CACHES = ("f16[3,2,16,8]", "f16[3,2,16,8]", *ROW)
ROPE = {"eps": 1e-6, "theta": 1e4, "heads": 4, "kv_heads": 2}
CHOICE = ("i32[3,16]", "i32[8]", "i32[3]", *ROW)
CHOSEN = ["i32[1]", "i32[3,16]", "i32[3]", "i32[1]"]


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "wanted"),
    [
        ("embed", ("q6_k[9,256]", "i32[5]"), {}, ["f32[5,256]"]),
        ("matvec", ("i8x2[1,256]", "q4_k[7,256]", "q6_k[5,256]"), {}, ["f32[1,7]", "f32[1,5]"]),
        ("matvec", ("f16[5,256]", "q4_k[64,256]"), {}, ["f32[5,64]"]),
        ("rms_norm", ("f32[5,2,8]", "f32[8]"), {"eps": 1e-6}, ["f32[5,2,8]"]),
        ("split_heads", ("f32[3,32]",), {"heads": 4}, ["f32[3,4,8]"]),
        ("mul", ("f32[3,32]", "f32[3,32]"), {}, ["f32[3,32]"]),
        ("quantize", ("f32[1,32]",), {}, ["i8x2[1,32]"]),
        ("scaled_swiglu", ("i8x2[1,32]", "f32[1,1]", "q8_0[5,32]", "q8_0[5,32]"), {}, ["f32[1,5]"]),
        ("matvec_add_norm", ("f32[1,32]", "f16[6,32]", "f32[1,6]", "f32[6]"), {"eps": 1e-6},
         ["f32[1,6]", "f32[1,6]", "f32[1,1]"]),
        ("cache_append", ("q8[3,2,16,8]", "f16[1,2,8]", *ROW), {}, ["q8[3,2,16,8]"]),
        ("rope_append", ("f32[1,32]", "f32[1,16]", "f32[1,16]", "f32[8]", "f32[8]", *CACHES), ROPE,
         ["f32[1,4,8]", *CACHES[:2]]),
        ("rope_attention", ("f32[1,32]", "f32[1,16]", "f32[1,16]", "f32[8]", "f32[8]", *CACHES),
         {**ROPE, "scale": 0.3}, ["f32[1,32]", *CACHES[:2]]),
        ("matvec_choose", ("f32[1,32]", "f16[9,32]", *CHOICE), {}, CHOSEN),
        ("scaled_matvec_choose", ("f32[1,32]", "f32[1,1]", "f16[9,32]", *CHOICE), {"keep_logits": True},
         ["f32[1,9]", *CHOSEN]),
    ],
)  # fmt: skip
def test_type_rules(op, operands, attrs, wanted):
    assert [str(found) for found in OPS[op].infer(types(*operands), attrs)] == wanted


@pytest.mark.parametrize(
    ("op", "operands", "attrs", "message"),
    [
        ("embed", ("q6_k[256]", "i32[1]"), {}, "table is q6_k[256], wanted"),
        ("embed", ("q6_k[9,256]", "f32[1]"), {}, "tokens is f32[1], wanted i32[?]"),
        ("rms_norm", ("f32[1,4,8]", "f32[4]"), {"eps": 1e-6}, "weight is f32[4], wanted f32[8]"),
        ("rms_norm", ("i8x2[1,16]", "f32[16]"), {"eps": 1e-6}, "x is i8x2[1,16], wanted f32|f16[?,?]"),
        ("rms_norm", ("f32[16]", "f32[16]"), {"eps": 1e-6}, "x is f32[16], wanted f32|f16[?,?]"),
        ("split_heads", ("f32[1,32]",), {"heads": 5}, "rows that 5 heads can share"),
        ("split_heads", ("f32[1,32]",), {"heads": 0}, "rows that 0 heads can share"),
        ("rope", ("f32[1,2,7]", "i32[1]"), {"theta": 1.0}, "an even head_dim"),
        ("rope", ("f32[5,2,8]", "i32[4]"), {"theta": 1.0}, "positions is i32[4], wanted i32[5]"),
        ("cache_append", ("f32[3,2,16,8]", "f32[1,2,8]", *ROW), {}, "cache is f32[3,2,16,8], wanted f16|q8[?,2,?,8]"),
        ("cache_append", ("f16[3,2,16,8]", "f32[5,2,8]", "i32[5]", "i32[1]"), {}, "sequences is i32[1], wanted i32[5]"),
        ("attention", ("f32[1,3,8]", *CACHES), {"scale": 1.0}, "2 key/value heads divide"),
        ("attention", ("f32[1,4,8]", "f16[3,2,16,8]", "f16[3,2,15,8]", *ROW), {"scale": 1.0}, "v_cache is"),
        ("attention", ("f32[1,4,8]", "q8[3,2,16,8]", "f16[3,2,16,8]", *ROW), {"scale": 1.0},
         "v_cache is f16[3,2,16,8], wanted q8"),
        ("add", ("f32[1,4]", "f32[1,5]"), {}, "b is f32[1,5], wanted f32|f16[1,4]"),
        ("add", ("f32[5,4]", "f32[6,4]"), {}, "b is f32[6,4], wanted f32|f16[5,4]"),
        ("add", ("f32[5,4]", "f32[4]"), {}, "b is f32[4], wanted f32|f16[5,4]"),
        ("mul", ("f32[5,4]", "f32[5]"), {}, "b is f32[5], wanted f32[4]"),
        ("quantize", ("f32[1,20]",), {}, "whole groups of 16"),
        ("matvec", ("f32[1,32]", "q8_0[4,32]", "i32[4,32]"), {}, "w1 is i32[4,32]"),
        ("matvec_add", ("f32[1,32]", "q8_0[4,32]", "f32[1,5]"), {}, "residual is f32[1,5], wanted f32|f16[1,4]"),
        ("matvec_add", ("f32[2,32]", "q8_0[4,32]", "f32[3,4]"), {}, "residual is f32[3,4], wanted f32|f16[2,4]"),
        ("scaled_matvec", ("f32[1,32]", "f32[1,2]", "q8_0[4,32]"), {}, "f is f32[1,2], wanted f32|f16[1,1]"),
        ("matvec_swiglu", ("f32[1,32]", "q8_0[4,32]", "q8_0[5,32]"), {}, "w_up is q8_0[5,32]"),
        ("rope_append", ("f32[1,24]", "f32[1,16]", "f32[1,16]", "f32[8]", "f32[8]", *CACHES), {**ROPE, "heads": 3},
         "3 heads are no multiple of 2"),
        ("rope_append", ("f32[1,32]", "f32[1,8]", "f32[1,16]", "f32[8]", "f32[8]", *CACHES), ROPE, "k is f32[1,8]"),
        ("choose", ("f32[2,3,4]", *CHOICE), {}, "logits is f32[2,3,4]"),
        ("choose", ("f32[1,3]", "i32[2,16]", *CHOICE[1:]), {}, "log is i32[2,16], wanted i32[3,?]"),
        ("swiglu", ("f32[1,4]",), {}, "takes 2 operands (gate, up), not 1"),
        ("scaled_matvec", ("f32[1,32]", "f32[1,1]"), {}, "takes at least 3 operands, not 2"),
    ],
)  # fmt: skip
def test_type_rules_refuse(op, operands, attrs, message):
    with pytest.raises(TypeMismatch) as caught:
        OPS[op].infer(types(*operands), attrs)
    assert message in str(caught.value)


def test_what_an_op_remembers_keeps_equal_attributes_of_other_types_apart():
    wanted = OPS["rope"].infer(types("f32[1,2,8]", "i32[1]"), {"theta": 1.0})
    assert OPS["rope"].infer(types("f32[1,2,8]", "i32[1]"), {"theta": 1.0}) == wanted
    for wrong in (1, True):
        with pytest.raises(TypeMismatch, match="wants theta as float"):
            OPS["rope"].infer(types("f32[1,2,8]", "i32[1]"), {"theta": wrong})


def test_quantizable_results():
    assert OPS["matvec_add_norm"].quantizable(4, {}) == (1,)
    assert OPS["rope_attention"].quantizable(9, {}) == (0,)
    assert OPS["matvec"].quantizable(3, {}) == ()
