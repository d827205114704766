"""The op table: one row an op, with its operands, results, attributes, type rule and meaning.

Unfused ops are what model specs are written in; fused ops are what passes make of them,
and one kernel computes. In the fused ones `f` is the RMS factor of the residual that a
norm was taken of and `s` is that residual times the norm's weights, so that
`f * (w @ s)` is the product with the normalised vector.
"""

from __future__ import annotations

from . import meaning, type_rules
from .op import Op, TypeMismatch

EPS = {"eps": float}
HEADS = {"heads": int, "kv_heads": int}
# For positions that are stretched over a longer context: absent, factor and attn_factor, or all (`meaning.turning`).
ROPE_SCALING = {"factor": float, "attn_factor": float, "original": int, "beta_fast": float, "beta_slow": float}
KEEP = {"keep_logits": bool}
ROPE_OPERANDS = ("q", "k", "v", "q_norm", "k_norm", "k_cache", "v_cache", "position")
CHOICE_OPERANDS = ("log", "end_tokens", "stop", "position")
CACHES = ("k_cache", "v_cache")
CHOICE = ("token", "log", "stop", "position")
DRAW_OPERANDS = ("logits", "peaks", "sampler")


def row(name: str, operands: tuple[str, ...], results: tuple[str, ...], summary: str, **options: object) -> Op:
    """A row whose rule and meaning are the functions of the same name (or `rule=`)."""
    rule = options.pop("rule", None) or getattr(type_rules, name)
    return Op(name, operands, results, rule, getattr(meaning, name), summary, **options)  # type: ignore[arg-type]


UNFUSED = (
    row("embed", ("table", "token"), ("x",), "row `token` of the table"),
    row(
        "rms_norm",
        ("x", "weight"),
        ("y",),
        "x over its root mean square along the last axis, times weight",
        attributes=EPS,
        may_quantize=("y",),
    ),
    row("matvec", ("x", "w..."), ("y...",), "w @ x for every weight", product=True),
    row("split_heads", ("x",), ("y",), "[heads * head_dim] seen as [heads, head_dim]", attributes={"heads": int}),
    row("merge_heads", ("x",), ("y",), "[heads, head_dim] seen as [heads * head_dim]", may_quantize=("y",)),
    row(
        "rope",
        ("x", "position"),
        ("y",),
        "pairs (i, i + head_dim/2) turned by position * theta^(-2i/head_dim); the rest stretches it",
        attributes={"theta": float},
        optional=ROPE_SCALING,
    ),
    row(
        "cache_append",
        ("cache", "row", "position"),
        ("cache",),
        "the cache with the row, rounded to its type, at [:, position]",
        consumes=("cache",),
    ),
    row(
        "attention",
        ("q", "k_cache", "v_cache", "position"),
        ("y",),
        "softmax(scale * q k) v over positions 0..position; head h reads key/value head h // (heads / kv_heads)",
        attributes={"scale": float},
    ),
    row("swiglu", ("gate", "up"), ("y",), "silu(gate) * up", may_quantize=("y",)),
    row("add", ("a", "b"), ("y",), "a + b", rule=type_rules.elementwise),
    row("mul", ("a", "b"), ("y",), "a * b", rule=type_rules.elementwise, may_quantize=("y",)),
    row("rms_factor", ("x",), ("f",), "1 / sqrt(mean(x^2) + eps)", attributes=EPS),
    row("argmax", ("logits",), ("token",), "index of the largest logit, the lowest one of equals"),
    row(
        "adjust",
        ("logits", "token", "history", "sampler", "position"),
        ("adjusted", "peaks", "history"),
        "biases and penalties of the sampler's settings; history takes the token at [position]; "
        "a peak is the largest of 1024 values",
        consumes=("history",),
    ),
    row(
        "draw",
        (*DRAW_OPERANDS, "position"),
        ("token",),
        "a token by chance: top-k, top-p, min-p and temperature of the settings, random by seed and position",
    ),
    row("record", ("log", "token", "position"), ("log",), "the log with the token at [position]", consumes=("log",)),
    row("stop_on", ("token", "end_tokens", "stop"), ("stop",), "1 if stop is set or the token is an end token"),
    row("advance", ("position",), ("position",), "position + 1; behind a span"),
    row("quantize", ("x",), ("y",), "x as two int8 planes with one scale for 16 values"),
)

FUSED = (
    row("scaled_matvec", ("s", "f", "w..."), ("y...",), "f * (w @ s) for every weight", product=True),
    row(
        "scaled_swiglu",
        ("s", "f", "w_gate", "w_up"),
        ("y",),
        "swiglu(f * (w_gate @ s), f * (w_up @ s))",
        may_quantize=("y",),
        product=True,
    ),
    row(
        "matvec_swiglu",
        ("x", "w_gate", "w_up"),
        ("y",),
        "swiglu(w_gate @ x, w_up @ x)",
        may_quantize=("y",),
        product=True,
    ),
    row("matvec_add", ("x", "w", "residual"), ("y",), "residual + w @ x", product=True),
    row(
        "matvec_add_norm",
        ("x", "w", "residual", "norm_weight"),
        ("x2", "s", "f"),
        "x2 = residual + w @ x; s = x2 * norm_weight; f = rms_factor(x2)",
        attributes=EPS,
        may_quantize=("s",),
        product=True,
    ),
    row(
        "embed_norm",
        ("table", "token", "norm_weight"),
        ("x", "s", "f"),
        "x = row `token` of the table; s = x * norm_weight; f = rms_factor(x)",
        attributes=EPS,
        may_quantize=("s",),
    ),
    row(
        "rope_append",
        ROPE_OPERANDS,
        ("q", "k_cache", "v_cache"),
        "q and k split, normalised per head and turned; k and v appended to their caches",
        attributes={**EPS, "theta": float, **HEADS},
        optional=ROPE_SCALING,
        consumes=CACHES,
    ),
    row(
        "rope_attention",
        ROPE_OPERANDS,
        ("a", "k_cache", "v_cache"),
        "rope_append, then attention, heads merged",
        attributes={**EPS, "theta": float, "scale": float, **HEADS},
        optional=ROPE_SCALING,
        may_quantize=("a",),
        consumes=CACHES,
    ),
    row("choose", ("logits", *CHOICE_OPERANDS), CHOICE, "argmax, record, stop_on and advance", consumes=("log",)),
    row(
        "draw_choose",
        (*DRAW_OPERANDS, *CHOICE_OPERANDS),
        CHOICE,
        "draw, record, stop_on and advance",
        consumes=("log",),
    ),
    row(
        "matvec_choose",
        ("x", "w", *CHOICE_OPERANDS),
        CHOICE,
        "choose of w @ x",
        optional=KEEP,
        product=True,
        consumes=("log",),
        extra_result="logits",
    ),
    row(
        "scaled_matvec_choose",
        ("s", "f", "w", *CHOICE_OPERANDS),
        CHOICE,
        "choose of f * (w @ s)",
        optional=KEEP,
        product=True,
        consumes=("log",),
        extra_result="logits",
    ),
)

OPS: dict[str, Op] = {op.name: op for op in (*UNFUSED, *FUSED)}
FUSED_NAMES = frozenset(op.name for op in FUSED)

__all__ = ["FUSED", "FUSED_NAMES", "OPS", "UNFUSED", "Op", "TypeMismatch"]
