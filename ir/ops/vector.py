"""Ops on vectors, row by row: embedding, norms, heads, and what takes one value of each operand."""

from __future__ import annotations

import numpy as np

from ..op import Arrays, Attributes, EvalContext, Op, Results, Types
from ..types import I8X2_GROUP

EPS = {"eps": float}


def factor_of(x: np.ndarray, eps: float) -> np.ndarray:
    """1 / root mean square of the last axis, which stays with extent 1."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(1 / np.sqrt(mean_square + x.dtype.type(eps)))


def normalise(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.asarray(x * factor_of(x, eps) * weight.astype(x.dtype, copy=False))


def with_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Arrays:
    """(x, x * weight, factor of x): what a deferred norm hands on."""
    return x, x * weight.astype(x.dtype, copy=False), factor_of(x, eps)


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, without overflow for very negative gates."""
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1, small) / (1 + small)
    return np.asarray(gate * sigmoid * up)


def _embed_rule(t: Types, attrs: Attributes) -> Results:
    t.integers("tokens")
    return (t.made(t.weight("table")[1]),)


def _embed(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    table, tokens = ins
    return (table[np.maximum(tokens, 0)].astype(context.dtype),)


def _embed_norm_rule(t: Types, attrs: Attributes) -> Results:
    (x,) = _embed_rule(t, attrs)
    t.vector("norm_weight", x.shape[1])
    return x, x, t.made(1)


def _embed_norm(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    (x,) = _embed(context, ins[:2], attrs)
    return with_norm(x, ins[2], attrs["eps"])


def _rms_norm_rule(t: Types, attrs: Attributes) -> Results:
    shape = t["x"].shape
    extents = t.rows("x", *([None] * (2 if len(shape) == 3 else 1)))
    t.vector("weight", extents[-1])
    return (t.made(*extents),)


def _rms_norm(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (normalise(ins[0], ins[1], attrs["eps"]),)


def _rms_factor_rule(t: Types, attrs: Attributes) -> Results:
    t.rows("x", None)
    return (t.made(1),)


def _rms_factor(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (factor_of(ins[0], attrs["eps"]),)


def _split_heads_rule(t: Types, attrs: Attributes) -> Results:
    (length,), heads = t.rows("x", None), attrs["heads"]
    if heads < 1 or length % heads:
        raise t.fail("x", f"rows that {heads} heads can share")
    return (t.made(heads, length // heads),)


def _split_heads(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (ins[0].reshape(len(ins[0]), attrs["heads"], -1),)


def _merge_heads_rule(t: Types, attrs: Attributes) -> Results:
    heads, head_dim = t.rows("x", None, None)
    return (t.made(heads * head_dim),)


def _merge_heads(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (ins[0].reshape(len(ins[0]), -1),)


def _two_alike(t: Types, attrs: Attributes) -> Results:
    first, second = t.names
    return (t.made(*t.rows(second, *t.rows(first, None))),)


def _scaled_by_vector(t: Types, attrs: Attributes) -> Results:
    """One of the two may be a vector that all rows share."""
    if len(t["b"].shape) == 1:
        return (t.made(t.vector("b", t.rows("a", None)[0])),)
    return _two_alike(t, attrs)


def _swiglu(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (gated(ins[0], ins[1]),)


def _add(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (ins[0] + ins[1],)


def _mul(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return ((ins[0] * ins[1]).astype(context.dtype, copy=False),)


def _quantize_rule(t: Types, attrs: Attributes) -> Results:
    (length,) = t.rows("x", None)
    if length % I8X2_GROUP:
        raise t.fail("x", f"rows of whole groups of {I8X2_GROUP}")
    return (t.made(length, dtype="i8x2"),)


def _quantize(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    # The interpreter rounds whatever is declared i8x2, so that it can be told not to.
    return (ins[0],)


OPS = (
    Op(
        "embed(table, tokens) -> x",
        "rows `tokens` of the table; row 0 for -1",
        _embed_rule,
        _embed,
        "q6_k[9,256] i32[T]",
    ),
    Op(
        "rms_norm(x, weight) -> y",
        "x over its root mean square along the last axis, times weight",
        _rms_norm_rule,
        _rms_norm,
        "f32[T,96] f32[96] {eps=1e-06}",
        attributes=EPS,
        may_quantize=("y",),
    ),
    Op(
        "split_heads(x) -> y",
        "[T, heads * head_dim] seen as [T, heads, head_dim]",
        _split_heads_rule,
        _split_heads,
        "f32[T,64] {heads=4}",
        attributes={"heads": int},
    ),
    Op(
        "merge_heads(x) -> y",
        "[T, heads, head_dim] seen as [T, heads * head_dim]",
        _merge_heads_rule,
        _merge_heads,
        "f32[T,4,16]",
        may_quantize=("y",),
    ),
    Op(
        "swiglu(gate, up) -> y",
        "silu(gate) * up",
        _two_alike,
        _swiglu,
        "f32[T,96] f32[T,96]",
        may_quantize=("y",),
        elementwise=True,
    ),
    Op("add(a, b) -> y", "a + b", _two_alike, _add, "f32[T,96] f32[T,96]", elementwise=True),
    Op(
        "mul(a, b) -> y",
        "a * b; b may be a vector for all rows",
        _scaled_by_vector,
        _mul,
        "f32[T,96] f32[96]",
        may_quantize=("y",),
        elementwise=True,
    ),
    Op(
        "rms_factor(x) -> f",
        "1 / sqrt(mean(x^2) + eps)",
        _rms_factor_rule,
        _rms_factor,
        "f32[T,96] {eps=1e-06}",
        attributes=EPS,
    ),
    Op(
        "quantize(x) -> y",
        "x as two int8 planes with one scale for 16 values",
        _quantize_rule,
        _quantize,
        "f32[T,96]",
        elementwise=True,
    ),
    Op(
        "embed_norm(table, tokens, norm_weight) -> x, s, f",
        "x = rows `tokens` of the table; s = x * norm_weight; f = rms_factor(x)",
        _embed_norm_rule,
        _embed_norm,
        "q6_k[9,256] i32[T] f32[256] {eps=1e-06}",
        attributes=EPS,
        may_quantize=("s",),
        fused=True,
    ),
)
