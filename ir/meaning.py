"""The numpy meaning of the ops: plain functions, the fused ones made of the unfused ones."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np

from . import sampling
from .op import Attributes, Machine

Arrays = tuple[np.ndarray, ...]
Operands = list[np.ndarray]

NO_ATTRIBUTES: Attributes = MappingProxyType({})


def factor_of(x: np.ndarray, eps: float) -> np.ndarray:
    """1 / root mean square of the last axis, which stays with extent 1."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return np.asarray(1 / np.sqrt(mean_square + x.dtype.type(eps)))


def normalise(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.asarray(x * factor_of(x, eps) * weight.astype(x.dtype, copy=False))


def turning(head_dim: int, theta: float, attrs: Attributes) -> tuple[np.ndarray, float]:
    """(radians a position that pair i turns by, float64[head_dim / 2]; what the turned pairs are multiplied with).

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


def rotate(x: np.ndarray, position: int, theta: float, attrs: Attributes = NO_ATTRIBUTES) -> np.ndarray:
    """NeoX order: element i turns together with element i + head_dim/2. x: [heads, head_dim]; attrs: see `turning`."""
    half = x.shape[-1] // 2
    # Angles in float64: at position 40,000 float32 would be off by thousandths of a radian.
    speed, magnitude = turning(x.shape[-1], theta, attrs)
    angle = position * speed
    cosine, sine = (magnitude * np.cos(angle)).astype(x.dtype), (magnitude * np.sin(angle)).astype(x.dtype)
    low, high = x[:, :half], x[:, half:]
    return np.concatenate([low * cosine - high * sine, high * cosine + low * sine], axis=1)


def append(machine: Machine, cache: np.ndarray, row: np.ndarray, position: int) -> np.ndarray:
    """The cache [kv_heads, ctx, head_dim] with `row` at [:, position], rounded to its element type."""
    target = cache if machine.in_place_cache else cache.copy()
    target[:, position] = row if machine.round_row is None else machine.round_row(row)
    return target


def attend(q: np.ndarray, k_cache: np.ndarray, v_cache: np.ndarray, position: int, scale: float) -> np.ndarray:
    """Softmax attention of q [heads, head_dim] over positions 0..position; heads share keys in groups."""
    kv_heads = k_cache.shape[0]
    keys = k_cache[:, : position + 1].astype(q.dtype)
    values = v_cache[:, : position + 1].astype(q.dtype)
    groups = q.reshape(kv_heads, -1, q.shape[1])
    scores = groups @ keys.transpose(0, 2, 1) * q.dtype.type(scale)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    return np.asarray(probabilities @ values).reshape(q.shape)


def gated(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, without overflow for very negative gates."""
    small = np.exp(-np.abs(gate))
    sigmoid = np.where(gate >= 0, 1, small) / (1 + small)
    return np.asarray(gate * sigmoid * up)


def choice(logits: np.ndarray, log: np.ndarray, ends: np.ndarray, stop: np.ndarray, position: np.ndarray) -> Arrays:
    """(token, log, stop, position) after this step."""
    return moved_on(np.array([np.argmax(logits)], dtype=np.int32), log, ends, stop, position)


def moved_on(token: np.ndarray, log: np.ndarray, ends: np.ndarray, stop: np.ndarray, position: np.ndarray) -> Arrays:
    """(token, log, stop, position) after a step that chose `token`."""
    return token, recorded(log, token, position), stopping(token, ends, stop), position + np.int32(1)


def drawn(logits: np.ndarray, settings: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The token that the settings, the seed and the position choose: i32[1]."""
    words = sampling.words_of(settings)
    token = sampling.choices(logits, words).at(sampling.random_words(position, words.seed))
    return np.asarray(token, dtype=np.int32)


def recorded(log: np.ndarray, token: np.ndarray, position: np.ndarray) -> np.ndarray:
    changed = log.copy()
    changed[position[0]] = token[0]
    return changed


def stopping(token: np.ndarray, ends: np.ndarray, stop: np.ndarray) -> np.ndarray:
    return np.array([1 if stop[0] or token[0] in ends else 0], dtype=np.int32)


# One function per row of the table from here on.


def embed(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    table, token = ins
    return (table[token[0]].astype(machine.dtype),)


def rms_norm(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (normalise(ins[0], ins[1], attrs["eps"]),)


def matvec(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    x, *weights = ins
    return tuple(weight @ x for weight in weights)


def split_heads(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (ins[0].reshape(attrs["heads"], -1),)


def merge_heads(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (ins[0].reshape(-1),)


def rope(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (rotate(ins[0], int(ins[1][0]), attrs["theta"], attrs),)


def cache_append(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (append(machine, ins[0], ins[1], int(ins[2][0])),)


def attention(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    q, k_cache, v_cache, position = ins
    return (attend(q, k_cache, v_cache, int(position[0]), attrs["scale"]),)


def swiglu(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (gated(ins[0], ins[1]),)


def add(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (ins[0] + ins[1],)


def mul(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return ((ins[0] * ins[1]).astype(machine.dtype, copy=False),)


def rms_factor(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (factor_of(ins[0], attrs["eps"]),)


def argmax(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (np.array([np.argmax(ins[0])], dtype=np.int32),)


def adjust(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    logits, token, history, settings, position = ins
    words, here = sampling.words_of(settings), int(position[0])
    history = recorded(history, token, position)
    values = sampling.adjusted(logits, history[max(0, here + 1 - words.window) : here + 1], words)
    values = values.astype(machine.dtype)
    return values, sampling.peaks_of(values), history


def draw(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    logits, _, settings, position = ins
    return (drawn(logits, settings, position),)


def record(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (recorded(*ins),)


def stop_on(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return (stopping(*ins),)


def advance(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    position = ins[0]  # of a step, or the span of a sequence: its first position, and how many rows count
    return (position[:1] + (position[1:] if position.size == 2 else np.int32(1)),)


def quantize(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    # The interpreter rounds whatever is declared i8x2, so that it can be told not to.
    return (ins[0],)


def scaled_matvec(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    s, factor, *weights = ins
    return tuple(factor * (weight @ s) for weight in weights)


def scaled_swiglu(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    s, factor, gate, up = ins
    return (gated(factor * (gate @ s), factor * (up @ s)),)


def matvec_swiglu(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    x, gate, up = ins
    return (gated(gate @ x, up @ x),)


def matvec_add(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    x, weight, residual = ins
    return (residual + weight @ x,)


def with_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> Arrays:
    """(x, x * weight, factor of x): what a deferred norm hands on."""
    return x, x * weight.astype(x.dtype, copy=False), factor_of(x, eps)


def matvec_add_norm(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    x, weight, residual, norm_weight = ins
    return with_norm(residual + weight @ x, norm_weight, attrs["eps"])


def embed_norm(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    table, token, norm_weight = ins
    return with_norm(table[token[0]].astype(machine.dtype), norm_weight, attrs["eps"])


def rope_append(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    q, k, v, q_norm, k_norm, k_cache, v_cache, position = ins
    place = int(position[0])

    def turned(flat: np.ndarray, heads: int, norm: np.ndarray) -> np.ndarray:
        return rotate(normalise(flat.reshape(heads, -1), norm, attrs["eps"]), place, attrs["theta"], attrs)

    q_out = turned(q, attrs["heads"], q_norm)
    k_out = turned(k, attrs["kv_heads"], k_norm)
    k_cache = append(machine, k_cache, k_out, place)
    v_cache = append(machine, v_cache, v.reshape(attrs["kv_heads"], -1), place)
    return q_out, k_cache, v_cache


def rope_attention(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    q, k_cache, v_cache = rope_append(machine, ins, attrs)
    return attend(q, k_cache, v_cache, int(ins[-1][0]), attrs["scale"]).reshape(-1), k_cache, v_cache


def choose(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    return choice(*ins)


def draw_choose(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    logits, _, settings, log, ends, stop, position = ins
    return moved_on(drawn(logits, settings, position), log, ends, stop, position)


def kept(logits: np.ndarray, rest: list[np.ndarray], attrs: Attributes) -> Arrays:
    chosen = choice(logits, *rest)
    return (logits, *chosen) if attrs.get("keep_logits") else chosen


def matvec_choose(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    x, weight, *rest = ins
    return kept(weight @ x, rest, attrs)


def scaled_matvec_choose(machine: Machine, ins: Operands, attrs: Attributes) -> Arrays:
    s, factor, weight, *rest = ins
    return kept(factor * (weight @ s), rest, attrs)
