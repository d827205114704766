"""Ops over a sequence: every row as the step computes it, types, and what the rules refuse."""

import numpy as np
import pytest

from psigraph.ir.errors import SpecError
from psigraph.ir.graph import TensorType
from psigraph.ir.op import Machine, TypeMismatch
from psigraph.ir.ops import OPS
from psigraph.ir.sequence import PER_TOKEN
from psigraph.ir.text import parse_graph
from psigraph.ir.verify import verify

RNG = np.random.default_rng(8)
T, FIRST = 5, 2
EPS = {"eps": 1e-3}
ROPE = {**EPS, "theta": 100.0, "heads": 4, "kv_heads": 2}


def normal(*shape):
    return RNG.standard_normal(shape)


CACHE = normal(2, 9, 4)
# Op -> (operands, attributes): those of a token have T rows in front.
CASES = {
    "embed": ([normal(7, 4), np.array([[3], [0], [6], [3], [1]])], {}),
    "rms_norm": ([normal(T, 2, 4), normal(4)], EPS),
    "matvec": ([normal(T, 4), normal(3, 4), normal(2, 4)], {}),
    "split_heads": ([normal(T, 8)], {"heads": 2}),
    "merge_heads": ([normal(T, 2, 4)], {}),
    "rope": ([normal(T, 2, 4), None], {"theta": 100.0}),
    "cache_append": ([CACHE, normal(T, 2, 4), None], {}),
    "attention": ([normal(T, 4, 4), CACHE, normal(2, 9, 4), None], {"scale": 0.5}),
    "swiglu": ([normal(T, 4), normal(T, 4)], {}),
    "add": ([normal(T, 4), normal(T, 4)], {}),
    "mul": ([normal(T, 4), normal(4)], {}),
    "record": ([np.arange(9), np.array([[3], [0], [6], [3], [1]]), None], {}),
    "matvec_swiglu": ([normal(T, 4), normal(3, 4), normal(3, 4)], {}),
    "matvec_add": ([normal(T, 4), normal(3, 4), normal(T, 3)], {}),
    "rope_append": ([normal(T, 16), normal(T, 8), normal(T, 8), normal(4), normal(4), CACHE, CACHE, None], ROPE),
}


def test_every_op_that_has_a_form_is_tested():
    assert set(CASES) == set(PER_TOKEN)
    for name, operands in PER_TOKEN.items():
        assert set(operands) <= set(OPS[name].operands)


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_a_step(name):
    op, (operands, attrs) = OPS[name], CASES[name]
    count = 4 if any(array is None for array in operands) else T
    ins = [np.array([FIRST, count], np.int32) if array is None else array for array in operands]
    got = op.compute(Machine(), ins, attrs)
    names, made = op.operand_names(len(ins)), op.result_names(len(ins), attrs)
    current = list(ins)
    for t in range(count):
        row = [
            array[t] if array.ndim == PER_TOKEN[name].get(label, -2) + 1 else array
            for label, array in zip(names, current, strict=True)
        ]
        row = [
            np.array([FIRST + t], np.int32) if label == "position" else array
            for label, array in zip(names, row, strict=True)
        ]
        for label, result, whole in zip(made, op.meaning(Machine(), row, attrs), got, strict=True):
            if label in op.consumes:
                current[names.index(label)] = result
            else:
                np.testing.assert_array_equal(whole[t], result)
    for label, whole in zip(made, got, strict=True):
        if label in op.consumes:
            np.testing.assert_array_equal(whole, current[names.index(label)])
        else:
            assert whole.shape[0] == T
            assert not whole[count:].any(), "rows that do not count are zero"


def test_types():
    cache, span = TensorType("f16", (2, 9, 4)), TensorType("i32", (2,))

    def infer(name, *types, **attrs):
        return tuple(map(str, OPS[name].infer(types, attrs)))

    def f32(*shape):
        return TensorType("f32", shape)

    halves, weight = TensorType("f16", (5, 256)), TensorType("q4_k", (64, 256))
    assert infer("embed", TensorType("q4_k", (9, 256)), TensorType("i32", (5, 1))) == ("f32[5,256]",)
    assert infer("matvec", halves, weight, weight) == ("f32[5,64]", "f32[5,64]")
    assert infer("split_heads", f32(5, 8), heads=2) == ("f32[5,2,4]",)
    assert infer("cache_append", cache, f32(5, 2, 4), span) == ("f16[2,9,4]",)
    assert infer("attention", f32(5, 4, 4), cache, cache, span, scale=1.0) == ("f32[5,4,4]",)
    assert infer("advance", span) == ("i32[1]",)
    for name, types, attrs, why in (
        ("attention", (f32(5, 4, 4), cache, cache, TensorType("i32", (1,))), {"scale": 1.0}, "wanted a span"),
        ("add", (f32(5, 4), f32(6, 4)), {}, r"b is f32\[6,4\], wanted 5 rows"),
        ("matvec", (f32(5, 4), TensorType("f32", (3, 8))), {}, "w0 is"),
        ("advance", (TensorType("i32", (3,)),), {}, "position is"),
    ):
        with pytest.raises(TypeMismatch, match=why):
            OPS[name].infer(types, attrs)


def test_halves_stand_only_over_a_sequence():
    over = """graph g(weight %w: f32[4,4], state %x: f32[3,4], state %y: f32[4]) {
        %a: f16[3,4] = matvec(%x, %w)
        return a=%a }"""
    verify(parse_graph(over))
    with pytest.raises(SpecError, match=r"%a is f16\[4\], but the op makes f32\[4\]"):
        verify(parse_graph(over.replace("%a: f16[3,4] = matvec(%x", "%a: f16[4] = matvec(%y")))
