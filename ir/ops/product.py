"""Products with weight matrices, and what passes fuse behind them.

`f` is the RMS factor of the residual that a norm was taken of and `s` is that residual times the norm's weights, so
that `f * (w @ s)` is the product with the normalised vector.
"""

from __future__ import annotations

import numpy as np

from ..op import Arrays, Attributes, EvalContext, Op, Results, Types
from ..types import WEIGHT_DTYPES
from .choice import choice, chosen_rule
from .vector import EPS, gated, with_norm

KEEP = {"keep_logits": bool}


def _several(t: Types, columns: int) -> Results:
    return tuple(t.made(t.weight(name, columns)[0]) for name in t.names if name.startswith("w"))


def _matvec_rule(t: Types, attrs: Attributes) -> Results:
    return _several(t, t.factor("x"))


def _matvec(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    x, *weights = ins
    return tuple(x @ weight.T for weight in weights)


def _scaled_matvec_rule(t: Types, attrs: Attributes) -> Results:
    columns = t.factor("s")
    t.rows("f", 1)
    return _several(t, columns)


def _scaled_matvec(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    s, factor, *weights = ins
    return tuple(factor * (s @ weight.T) for weight in weights)


def _gate_and_up(t: Types, columns: int) -> Results:
    rows, _ = t.weight("w_gate", columns)
    t.expect("w_up", WEIGHT_DTYPES, (rows, columns))
    return (t.made(rows),)


def _matvec_swiglu_rule(t: Types, attrs: Attributes) -> Results:
    return _gate_and_up(t, t.factor("x"))


def _matvec_swiglu(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    x, gate, up = ins
    return (gated(x @ gate.T, x @ up.T),)


def _scaled_swiglu_rule(t: Types, attrs: Attributes) -> Results:
    columns = t.factor("s")
    t.rows("f", 1)
    return _gate_and_up(t, columns)


def _scaled_swiglu(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    s, factor, gate, up = ins
    return (gated(factor * (s @ gate.T), factor * (s @ up.T)),)


RESIDUAL: dict[str, type] = {}
"""Optional attributes of everything that adds a product to a residual: members of `MatvecAdd` in functions.cuh."""


def _matvec_add_rule(t: Types, attrs: Attributes) -> Results:
    rows, _ = t.weight("w", t.factor("x"))
    t.rows("residual", rows)
    return (t.made(rows),)


def _matvec_add(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    x, weight, residual = ins
    return (residual + x @ weight.T,)


def _matvec_add_norm_rule(t: Types, attrs: Attributes) -> Results:
    (sum_,) = _matvec_add_rule(t, attrs)
    t.vector("norm_weight", sum_.shape[1])
    return sum_, sum_, t.made(1)


def _matvec_add_norm(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    (sum_,) = _matvec_add(context, ins[:3], attrs)
    return with_norm(sum_, ins[3], attrs["eps"])


def _kept(logits: np.ndarray, rest: list[np.ndarray], attrs: Attributes) -> Arrays:
    chosen = choice(logits, *rest)
    return (logits, *chosen) if attrs.get("keep_logits") else chosen


def _with_logits(t: Types, attrs: Attributes, vocabulary: int) -> Results:
    chosen = chosen_rule(t, attrs)
    return (t.made(vocabulary), *chosen) if attrs.get("keep_logits") else chosen


def _matvec_choose_rule(t: Types, attrs: Attributes) -> Results:
    return _with_logits(t, attrs, t.weight("w", t.factor("x"))[0])


def _matvec_choose(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    x, weight, *rest = ins
    return _kept(x @ weight.T, rest, attrs)


def _scaled_matvec_choose_rule(t: Types, attrs: Attributes) -> Results:
    columns = t.factor("s")
    t.rows("f", 1)
    return _with_logits(t, attrs, t.weight("w", columns)[0])


def _scaled_matvec_choose(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    s, factor, weight, *rest = ins
    return _kept(factor * (s @ weight.T), rest, attrs)


_CHOICE_TYPES = "i32[2,16] i32[8] i32[2] i32[T] i32[T]"

OPS = (
    Op(
        "matvec(x, w...) -> y...",
        "w @ x for every weight",
        _matvec_rule,
        _matvec,
        "f32[T,256] f16[40,256] f16[24,256]",
        product=True,
    ),
    Op(
        "scaled_matvec(s, f, w...) -> y...",
        "f * (w @ s) for every weight",
        _scaled_matvec_rule,
        _scaled_matvec,
        "f32[T,256] f32[T,1] f16[40,256] f16[24,256]",
        product=True,
        fused=True,
    ),
    Op(
        "scaled_swiglu(s, f, w_gate, w_up) -> y",
        "swiglu(f * (w_gate @ s), f * (w_up @ s))",
        _scaled_swiglu_rule,
        _scaled_swiglu,
        "f32[T,256] f32[T,1] f16[40,256] f16[40,256]",
        may_quantize=("y",),
        product=True,
        fused=True,
    ),
    Op(
        "matvec_swiglu(x, w_gate, w_up) -> y",
        "swiglu(w_gate @ x, w_up @ x)",
        _matvec_swiglu_rule,
        _matvec_swiglu,
        "f32[T,256] f16[40,256] f16[40,256]",
        may_quantize=("y",),
        product=True,
        fused=True,
    ),
    Op(
        "matvec_add(x, w, residual) -> y",
        "residual + w @ x",
        _matvec_add_rule,
        _matvec_add,
        "f32[T,256] f16[40,256] f32[T,40]",
        optional=RESIDUAL,
        product=True,
        fused=True,
    ),
    Op(
        "matvec_add_norm(x, w, residual, norm_weight) -> x2, s, f",
        "x2 = residual + w @ x; s = x2 * norm_weight; f = rms_factor(x2)",
        _matvec_add_norm_rule,
        _matvec_add_norm,
        "f32[T,256] f16[48,256] f32[T,48] f32[48] {eps=1e-06}",
        attributes=EPS,
        optional=RESIDUAL,
        may_quantize=("s",),
        product=True,
        fused=True,
    ),
    Op(
        "matvec_choose(x, w, log, end_tokens, stop, positions, sequences) -> tokens, log, stop, positions",
        "choose of w @ x",
        _matvec_choose_rule,
        _matvec_choose,
        f"f32[T,256] f16[40,256] {_CHOICE_TYPES} {{keep_logits=true}}",
        optional=KEEP,
        product=True,
        consumes=("log", "stop"),
        extra_result="logits",
        fused=True,
    ),
    Op(
        "scaled_matvec_choose(s, f, w, log, end_tokens, stop, positions, sequences) -> tokens, log, stop, positions",
        "choose of f * (w @ s)",
        _scaled_matvec_choose_rule,
        _scaled_matvec_choose,
        f"f32[T,256] f32[T,1] f16[40,256] {_CHOICE_TYPES} {{keep_logits=true}}",
        optional=KEEP,
        product=True,
        consumes=("log", "stop"),
        extra_result="logits",
        fused=True,
    ),
)
