"""Ops of attention: rotation, the KV cache, softmax over it, and what passes fuse of them."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np

from ..op import Arrays, Attributes, EvalContext, Op, Results, TypeMismatch, Types
from ..types import CACHE_DTYPES
from .vector import EPS, normalise

NO_ATTRIBUTES: Attributes = MappingProxyType({})
HEADS = {"heads": int, "kv_heads": int}
# For positions that are stretched over a longer context: absent, factor and attn_factor, or all (`turning`).
ROPE_SCALING = {"factor": float, "attn_factor": float, "original": int, "beta_fast": float, "beta_slow": float}
CACHES = ("k_cache", "v_cache")


def turning(head_dim: int, theta: float, attrs: Attributes) -> tuple[np.ndarray, float]:
    """(radians a position that pair i rotates by, float64[head_dim / 2]; what the rotated pairs are multiplied with).

    attrs, of `rope`: for stretched positions factor and attn_factor, and for YaRN (arXiv 2309.00071, as in
    ggml's rope_yarn) original, beta_fast and beta_slow.
    """
    factor, magnitude = attrs.get("factor", 1.0), attrs.get("attn_factor", 1.0)
    pair = np.arange(head_dim // 2)
    own = np.power(float(theta), -2.0 * pair / head_dim)
    if "original" not in attrs:
        return own / factor, magnitude

    def pair_that_makes(turns: float) -> float:
        """Within the original context."""
        return head_dim * math.log(attrs["original"] / (2 * math.pi * turns)) / (2 * math.log(theta))

    # Fast pairs keep their speed, slow ones are stretched like a linear scaling, and between them it blends.
    first = max(0, math.floor(pair_that_makes(attrs["beta_fast"])))
    last = min(head_dim - 1, math.ceil(pair_that_makes(attrs["beta_slow"])))
    stretched = np.clip((pair - first) / max(0.001, last - first), 0.0, 1.0)
    return own * (1 - stretched) + own / factor * stretched, magnitude * (1 + 0.1 * math.log(factor))


def rotate(x: np.ndarray, positions: np.ndarray, theta: float, attrs: Attributes = NO_ATTRIBUTES) -> np.ndarray:
    """NeoX order: element i turns with element i + head_dim/2. x: [T, heads, head_dim]; attrs: see `turning`."""
    half = x.shape[-1] // 2
    # Angles in float64: at position 40,000 float32 would be off by thousandths of a radian.
    speed, magnitude = turning(x.shape[-1], theta, attrs)
    angle = positions[:, None, None] * speed
    cosine, sine = (magnitude * np.cos(angle)).astype(x.dtype), (magnitude * np.sin(angle)).astype(x.dtype)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=-1)


def append(
    context: EvalContext, cache: np.ndarray, rows: np.ndarray, positions: np.ndarray, sequences: np.ndarray
) -> np.ndarray:
    """The cache [sequences, kv_heads, ctx, head_dim] with rows [T, kv_heads, head_dim] at their positions, rounded to
    its element type."""
    target, there = cache if context.in_place_cache else cache.copy(), positions >= 0
    rows = rows[there]
    target[sequences[there], :, positions[there]] = rows if context.round_row is None else context.round_row(rows)
    return target


def attend(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    positions: np.ndarray,
    sequences: np.ndarray,
    scale: float,
) -> np.ndarray:
    """Softmax attention of q [T, heads, head_dim] over each row's positions 0..position; heads share keys in groups."""
    out = np.zeros_like(q)
    kv_heads = k_cache.shape[1]
    for row in np.flatnonzero(positions >= 0):
        seen = slice(positions[row] + 1)
        keys = k_cache[sequences[row], :, seen].astype(q.dtype)
        values = v_cache[sequences[row], :, seen].astype(q.dtype)
        scores = q[row].reshape(kv_heads, -1, q.shape[2]) @ keys.transpose(0, 2, 1) * q.dtype.type(scale)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probabilities = scores / scores.sum(axis=-1, keepdims=True)
        out[row] = np.asarray(probabilities @ values).reshape(q.shape[1:])
    return out


def _check_rope(attrs: Attributes) -> None:
    """The attributes of a rotation go together (`turning`)."""
    yarn = ("original", "beta_fast", "beta_slow")
    given = [name for name in yarn if name in attrs]
    if given and len(given) < len(yarn):
        raise TypeMismatch(f"{given[0]} goes with all of {', '.join(yarn)}")
    if given and not (attrs["theta"] > 1 and attrs["original"] > 0 and min(attrs["beta_fast"], attrs["beta_slow"]) > 0):
        raise TypeMismatch("wanted theta above 1, original, beta_fast and beta_slow above 0")
    if not attrs.get("factor", 1.0) >= 1:
        raise TypeMismatch(f"factor is {attrs['factor']}, wanted 1 or more")


def _rope_rule(t: Types, attrs: Attributes) -> Results:
    _check_rope(attrs)
    heads, head_dim = t.rows("x", None, None)
    t.integers("positions")
    if head_dim % 2:
        raise t.fail("x", "an even head_dim")
    return (t.made(heads, head_dim),)


def _rope(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (rotate(ins[0], ins[1], attrs["theta"], attrs),)


def _cache_append_rule(t: Types, attrs: Attributes) -> Results:
    kv_heads, head_dim = t.rows("row", None, None)
    t.expect("cache", CACHE_DTYPES, (None, kv_heads, None, head_dim))
    t.integers("positions", "sequences")
    return (t["cache"],)


def _cache_append(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    return (append(context, *ins),)


def _attention_rule(t: Types, attrs: Attributes) -> Results:
    heads, head_dim = t.rows("q", None, None)
    shape = t.expect("k_cache", CACHE_DTYPES, (None, None, None, head_dim))
    t.expect("v_cache", t["k_cache"].dtype, shape)
    t.integers("positions", "sequences")
    if heads % shape[1]:
        raise t.fail("q", f"a number of heads that {shape[1]} key/value heads divide")
    return (t.made(heads, head_dim),)


def _attention(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    q, k_cache, v_cache, positions, sequences = ins
    return (attend(q, k_cache, v_cache, positions, sequences, attrs["scale"]),)


def _rope_append_rule(t: Types, attrs: Attributes) -> Results:
    _check_rope(attrs)
    _, kv_heads, _, head_dim = t.expect("k_cache", CACHE_DTYPES, (None, attrs["kv_heads"], None, None))
    heads = attrs["heads"]
    if heads < 1 or heads % kv_heads:
        raise TypeMismatch(f"{heads} heads are no multiple of {kv_heads} key/value heads")
    if head_dim % 2:
        raise t.fail("k_cache", "an even head_dim")
    t.rows("q", heads * head_dim)
    t.rows("k", kv_heads * head_dim)
    t.rows("v", kv_heads * head_dim)
    t.vector("q_norm", head_dim)
    t.vector("k_norm", head_dim)
    t.expect("v_cache", t["k_cache"].dtype, t["k_cache"].shape)
    t.integers("positions", "sequences")
    return t.made(heads, head_dim), t["k_cache"], t["v_cache"]


def _rope_append(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    q, k, v, q_norm, k_norm, k_cache, v_cache, positions, sequences = ins

    def rotated(flat: np.ndarray, heads: int, norm: np.ndarray) -> np.ndarray:
        x = normalise(flat.reshape(len(flat), heads, -1), norm, attrs["eps"])
        return rotate(x, positions, attrs["theta"], attrs)

    keys, values = rotated(k, attrs["kv_heads"], k_norm), v.reshape(len(v), attrs["kv_heads"], -1)
    return (
        rotated(q, attrs["heads"], q_norm),
        append(context, k_cache, keys, positions, sequences),
        append(context, v_cache, values, positions, sequences),
    )


def _rope_attention_rule(t: Types, attrs: Attributes) -> Results:
    q, k_cache, v_cache = _rope_append_rule(t, attrs)
    return t.made(q.shape[1] * q.shape[2]), k_cache, v_cache


def _rope_attention(context: EvalContext, ins: list[np.ndarray], attrs: Attributes) -> Arrays:
    q, k_cache, v_cache = _rope_append(context, ins, attrs)
    positions, sequences = ins[-2:]
    a = attend(q, k_cache, v_cache, positions, sequences, attrs["scale"])
    return a.reshape(len(q), -1), k_cache, v_cache


_ROPE = "theta=10000.0, factor=4.0, attn_factor=1.0, original=64, beta_fast=32.0, beta_slow=1.0"
_ROPE_TYPES = "f32[T,64] f32[T,32] f32[T,32] f32[16] f32[16] f16[2,2,40,16] f16[2,2,40,16] i32[T] i32[T]"

OPS = (
    Op(
        "rope(x, positions) -> y",
        "pairs (i, i + head_dim/2) rotated by position * theta^(-2i/head_dim); the rest stretches it",
        _rope_rule,
        _rope,
        f"f32[T,2,16] i32[T] {{{_ROPE}}}",
        attributes={"theta": float},
        optional=ROPE_SCALING,
    ),
    Op(
        "cache_append(cache, row, positions, sequences) -> cache",
        "the cache with the rows, rounded to its type, at [sequence, :, position]",
        _cache_append_rule,
        _cache_append,
        "f16[2,2,40,16] f32[T,2,16] i32[T] i32[T]",
        consumes=("cache",),
    ),
    Op(
        "attention(q, k_cache, v_cache, positions, sequences) -> y",
        "softmax(scale * q k) v over positions 0..position; head h reads key/value head h // (heads / kv_heads)",
        _attention_rule,
        _attention,
        "f32[T,4,16] f16[2,2,40,16] f16[2,2,40,16] i32[T] i32[T] {scale=0.25}",
        attributes={"scale": float},
    ),
    Op(
        "rope_append(q, k, v, q_norm, k_norm, k_cache, v_cache, positions, sequences) -> q, k_cache, v_cache",
        "q and k split, normalised per head and rotated; k and v appended to their caches",
        _rope_append_rule,
        _rope_append,
        f"{_ROPE_TYPES} {{eps=1e-06, {_ROPE}, heads=4, kv_heads=2}}",
        attributes={**EPS, "theta": float, **HEADS},
        optional=ROPE_SCALING,
        consumes=CACHES,
        fused=True,
    ),
    Op(
        "rope_attention(q, k, v, q_norm, k_norm, k_cache, v_cache, positions, sequences) -> a, k_cache, v_cache",
        "rope_append, then attention, heads merged",
        _rope_attention_rule,
        _rope_attention,
        f"{_ROPE_TYPES} {{eps=1e-06, {_ROPE}, scale=0.25, heads=4, kv_heads=2}}",
        attributes={**EPS, "theta": float, "scale": float, **HEADS},
        optional=ROPE_SCALING,
        may_quantize=("a",),
        consumes=CACHES,
        fused=True,
    ),
)
