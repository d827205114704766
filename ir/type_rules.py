"""The type rules of the ops: operand types -> result types, or TypeMismatch."""

from __future__ import annotations

from .graph import TensorType
from .op import F32_ONE, I32_ONE, Attributes, TypeMismatch, Types
from .sampling import PEAK_SPAN, SAMPLER_WORDS
from .types import CACHE_DTYPES, I8X2_GROUP, WEIGHT_DTYPES

Results = tuple[TensorType, ...]


def f32(*shape: int) -> TensorType:
    return TensorType("f32", shape)


def embed(t: Types, attrs: Attributes) -> Results:
    t.scalar("token")
    return (f32(t.weight("table")[1]),)


def rms_norm(t: Types, attrs: Attributes) -> Results:
    shape = t["x"].shape
    t.expect("x", "f32", shape if len(shape) == 2 else (None,))
    t.vector("weight", shape[-1])
    return (f32(*shape),)


def matvec(t: Types, attrs: Attributes) -> Results:
    columns = t.activation("x")
    return tuple(f32(t.weight(name, columns)[0]) for name in t.names[1:])


def split_heads(t: Types, attrs: Attributes) -> Results:
    length, heads = t.vector("x"), attrs["heads"]
    if heads < 1 or length % heads:
        raise t.fail("x", f"a vector that {heads} heads can share")
    return (f32(heads, length // heads),)


def merge_heads(t: Types, attrs: Attributes) -> Results:
    heads, head_dim = t.expect("x", "f32", (None, None))
    return (f32(heads * head_dim),)


def check_rope(attrs: Attributes) -> None:
    """The attributes of a rotation go together (`meaning.turning`)."""
    yarn = ("original", "beta_fast", "beta_slow")
    given = [name for name in yarn if name in attrs]
    if given and len(given) < len(yarn):
        raise TypeMismatch(f"{given[0]} goes with all of {', '.join(yarn)}")
    if given and not (attrs["theta"] > 1 and attrs["original"] > 0 and min(attrs["beta_fast"], attrs["beta_slow"]) > 0):
        raise TypeMismatch("wanted theta above 1, original, beta_fast and beta_slow above 0")
    if not attrs.get("factor", 1.0) >= 1:
        raise TypeMismatch(f"factor is {attrs['factor']}, wanted 1 or more")


def rope(t: Types, attrs: Attributes) -> Results:
    check_rope(attrs)
    heads, head_dim = t.expect("x", "f32", (None, None))
    t.scalar("position")
    if head_dim % 2:
        raise t.fail("x", "an even head_dim")
    return (f32(heads, head_dim),)


def cache_append(t: Types, attrs: Attributes) -> Results:
    kv_heads, head_dim = t.expect("row", "f32", (None, None))
    t.expect("cache", CACHE_DTYPES, (kv_heads, None, head_dim))
    t.scalar("position")
    return (t["cache"],)


def attention(t: Types, attrs: Attributes) -> Results:
    heads, head_dim = t.expect("q", "f32", (None, None))
    shape = t.expect("k_cache", CACHE_DTYPES, (None, None, head_dim))
    t.expect("v_cache", t["k_cache"].dtype, shape)
    t.scalar("position")
    if heads % shape[0]:
        raise t.fail("q", f"a number of heads that {shape[0]} key/value heads divide")
    return (f32(heads, head_dim),)


def swiglu(t: Types, attrs: Attributes) -> Results:
    return (f32(t.vector("up", t.vector("gate"))),)


def elementwise(t: Types, attrs: Attributes) -> Results:
    return (f32(t.vector("b", t.vector("a"))),)


def rms_factor(t: Types, attrs: Attributes) -> Results:
    t.vector("x")
    return (F32_ONE,)


def argmax(t: Types, attrs: Attributes) -> Results:
    t.vector("logits")
    return (I32_ONE,)


def adjust(t: Types, attrs: Attributes) -> Results:
    size = t.vector("logits")
    t.scalar("token")
    t.vector("history", dtypes="i32")
    t.vector("sampler", SAMPLER_WORDS, dtypes="i32")
    t.scalar("position")
    return f32(size), f32(-(-size // PEAK_SPAN)), t["history"]


def draw(t: Types, attrs: Attributes) -> Results:
    size = t.vector("logits")
    t.vector("peaks", -(-size // PEAK_SPAN))
    t.vector("sampler", SAMPLER_WORDS, dtypes="i32")
    t.scalar("position")
    return (I32_ONE,)


def record(t: Types, attrs: Attributes) -> Results:
    t.vector("log", dtypes="i32")
    t.scalar("token")
    t.scalar("position")
    return (t["log"],)


def stop_on(t: Types, attrs: Attributes) -> Results:
    t.scalar("token")
    t.vector("end_tokens", dtypes="i32")
    t.scalar("stop")
    return (I32_ONE,)


def advance(t: Types, attrs: Attributes) -> Results:
    t.expect("position", "i32", t["position"].shape if t["position"].shape == (2,) else (1,))
    return (I32_ONE,)


def quantize(t: Types, attrs: Attributes) -> Results:
    length = t.vector("x")
    if length % I8X2_GROUP:
        raise t.fail("x", f"a vector of whole groups of {I8X2_GROUP}")
    return (TensorType("i8x2", (length,)),)


def scaled_matvec(t: Types, attrs: Attributes) -> Results:
    columns = t.activation("s")
    t.scalar("f", "f32")
    return tuple(f32(t.weight(name, columns)[0]) for name in t.names[2:])


def gate_and_up(t: Types, columns: int) -> Results:
    rows, _ = t.weight("w_gate", columns)
    t.expect("w_up", WEIGHT_DTYPES, (rows, columns))
    return (f32(rows),)


def scaled_swiglu(t: Types, attrs: Attributes) -> Results:
    t.scalar("f", "f32")
    return gate_and_up(t, t.activation("s"))


def matvec_swiglu(t: Types, attrs: Attributes) -> Results:
    return gate_and_up(t, t.activation("x"))


def matvec_add(t: Types, attrs: Attributes) -> Results:
    rows, _ = t.weight("w", t.activation("x"))
    return (f32(t.vector("residual", rows)),)


def matvec_add_norm(t: Types, attrs: Attributes) -> Results:
    (result,) = matvec_add(t, attrs)
    t.vector("norm_weight", result.size)
    return result, result, F32_ONE


def embed_norm(t: Types, attrs: Attributes) -> Results:
    (result,) = embed(t, attrs)
    t.vector("norm_weight", result.size)
    return result, result, F32_ONE


def rope_append(t: Types, attrs: Attributes) -> Results:
    check_rope(attrs)
    kv_heads, _, head_dim = t.expect("k_cache", CACHE_DTYPES, (attrs["kv_heads"], None, None))
    heads = attrs["heads"]
    if heads < 1 or heads % kv_heads:
        raise TypeMismatch(f"{heads} heads are no multiple of {kv_heads} key/value heads")
    if head_dim % 2:
        raise t.fail("k_cache", "an even head_dim")
    t.vector("q", heads * head_dim)
    t.vector("k", kv_heads * head_dim)
    t.vector("v", kv_heads * head_dim)
    t.vector("q_norm", head_dim)
    t.vector("k_norm", head_dim)
    t.expect("v_cache", t["k_cache"].dtype, t["k_cache"].shape)
    t.scalar("position")
    return f32(heads, head_dim), t["k_cache"], t["v_cache"]


def rope_attention(t: Types, attrs: Attributes) -> Results:
    q, k_cache, v_cache = rope_append(t, attrs)
    return f32(q.size), k_cache, v_cache


def choose(t: Types, attrs: Attributes) -> Results:
    if "logits" in t.names:
        t.vector("logits")
    t.vector("log", dtypes="i32")
    t.vector("end_tokens", dtypes="i32")
    t.scalar("stop")
    t.scalar("position")
    return I32_ONE, t["log"], I32_ONE, I32_ONE


def draw_choose(t: Types, attrs: Attributes) -> Results:
    draw(t, attrs)
    t.vector("log", dtypes="i32")
    t.vector("end_tokens", dtypes="i32")
    t.scalar("stop")
    return I32_ONE, t["log"], I32_ONE, I32_ONE


def chosen_from(t: Types, attrs: Attributes, vocabulary: int) -> Results:
    chosen = choose(t, attrs)
    return (f32(vocabulary), *chosen) if attrs.get("keep_logits") else chosen


def matvec_choose(t: Types, attrs: Attributes) -> Results:
    return chosen_from(t, attrs, t.weight("w", t.activation("x"))[0])


def scaled_matvec_choose(t: Types, attrs: Attributes) -> Results:
    t.scalar("f", "f32")
    return chosen_from(t, attrs, t.weight("w", t.activation("s"))[0])
