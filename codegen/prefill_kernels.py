"""The kernels over a chunk of tokens that are no products: embedding, norm, rotation and cache, attention, state."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Node
from .cache_types import CACHE_TYPES
from .emission import KernelSpec
from .prefill_emission import PrefillContext, PrefillKernel
from .weight_types import WEIGHT_TYPES, superblocks
from .writer import c_float

THREADS = 256
ATTEND_THREADS, ATTEND_ROWS = 128, 64  # as in the header


def emit_embed(node: Node, ctx: PrefillContext) -> KernelSpec:
    """embed: a block a token."""
    table = node.ins[0]
    row, columns = WEIGHT_TYPES[table.type.dtype], table.type.shape[1]
    kernel = PrefillKernel("prefill_embed", THREADS)
    kernel.take("const u8* table", ctx.param(table))
    kernel.take("const int* tokens", ctx.param(node.ins[1]))
    kernel.take("const int* span", "span")
    kernel.take("float* x", ctx.write(node.out).buffer)
    kernel.writer.lines(f"""
        const int token = blockIdx.x;
        if (token >= span[1]) return;
        const int row = tokens[token];
        const u8* tile = table + (u64)(row >> 4) * {superblocks(columns)} * {row.struct}::BYTES;
        for (int at = threadIdx.x; at < {columns}; at += {THREADS}) {{
            const u8* superblock = tile + (at >> 8) * {row.struct}::BYTES;
            x[(u64)token * {columns} + at] = {row.struct}::element(superblock, row & 15, at & 255);
        }}
    """)
    return kernel.done(ctx.tokens, bytes_read=ctx.tokens * (columns // row.block_columns) * row.block_bytes)


def emit_rms_norm(node: Node, ctx: PrefillContext) -> KernelSpec:
    """rms_norm of rows of the residual into halves: a block a token."""
    x, out = node.ins[0].type, node.out.type
    if len(x.shape) != 2 or out.dtype != "f16":
        raise UnsupportedModelError(f"rms_norm over a sequence as {out}: kernels make halves for products of it")
    width = x.shape[1]
    source, kernel = ctx.place(node.ins[0]), PrefillKernel("prefill_rms_norm", THREADS)
    kernel.take("const float* x", source.buffer)
    kernel.take("const float* weight", ctx.param(node.ins[1]))
    kernel.take("const int* span", "span")
    y = ctx.write(node.out)
    kernel.take("u16* y", y.buffer)
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    kernel.writer.lines(f"""
        const int token = blockIdx.x;
        if (token >= span[1]) return;
        const float* row = x + (u64)token * {source.stride};
        float square = 0.0f;
        for (int i = threadIdx.x; i < {width}; i += {THREADS}) square += row[i] * row[i];
        __shared__ float warp_sums[{THREADS // 32}];
        square = lanes_sum(square, 32);
        if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = square;
        __syncthreads();
        float squares = 0.0f;
        for (int w = 0; w < {THREADS // 32}; w++) squares += warp_sums[w];
        const float factor = rsqrtf(squares * {c_float(1.0 / width)} + {c_float(eps)});
        for (int i = threadIdx.x; i < {width}; i += {THREADS})
            y[(u64)token * {y.stride} + i] = float_to_half(row[i] * factor * weight[i]);
    """)
    return kernel.done(ctx.tokens)


def emit_rope_append(node: Node, ctx: PrefillContext) -> KernelSpec:
    """rope_append: a warp a token and head; q as halves, k and v into their caches at the span's positions."""
    kv_heads, _, head_dim = node.ins[5].type.shape
    held = CACHE_TYPES[node.ins[5].type.dtype]
    heads = int(node.attr("heads"))  # type: ignore[arg-type]
    _check_head(head_dim)
    kernel = PrefillKernel("prefill_rope_append", THREADS)
    places = [ctx.place(value) for value in node.ins[:3]]
    for name, place in zip("qkv", places, strict=True):
        kernel.take(f"const float* {name}", place.buffer)
    for name, value in zip(("q_norm", "k_norm"), node.ins[3:5], strict=True):
        kernel.take(f"const float* {name}", ctx.param(value))
    kernel.take("u8* k_cache", ctx.in_place(node.outs[1], node.ins[5]))
    kernel.take("u8* v_cache", ctx.in_place(node.outs[2], node.ins[6]))
    attrs = {key: value for key, value in node.attrs if key not in ("eps", "heads", "kv_heads")}
    kernel.take("const float2* rope", ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **attrs))
    kernel.take("const int* span", "span")
    turned = ctx.write(node.outs[0])
    kernel.take("u16* turned", turned.buffer)
    kernel.take("int context", ctx.ctx)
    eps = float(node.attr("eps"))  # type: ignore[arg-type]
    rows = heads + 2 * kv_heads
    kernel.writer.lines(f"""
        constexpr int HEAD_DIM = {head_dim}, HEADS = {heads}, KV_HEADS = {kv_heads};
        constexpr int PAIRS = HEAD_DIM > 64 ? HEAD_DIM / 64 : 1;
        const int lane = threadIdx.x & 31, which = blockIdx.x * {THREADS // 32} + (threadIdx.x >> 5);
        const int token = which / {rows}, head = which % {rows};  // heads of q, then of k, then of v
        if (token >= span[1]) return;
        const int position = span[0] + token;
        const int own = head < HEADS ? head : (head - HEADS) % KV_HEADS;
        const float* source = q + (u64)token * {places[0].stride} + {places[0].offset};
        if (head >= HEADS + KV_HEADS) source = v + (u64)token * {places[2].stride} + {places[2].offset};
        else if (head >= HEADS) source = k + (u64)token * {places[1].stride} + {places[1].offset};
        source += own * HEAD_DIM;
        float low[PAIRS], high[PAIRS], squares = 0.0f;
        for_each<PAIRS>([&](auto u) {{
            int i = u.index * 32 + lane;
            bool inside = i < HEAD_DIM / 2;
            low[u.index] = inside ? source[i] : 0.0f;
            high[u.index] = inside ? source[HEAD_DIM / 2 + i] : 0.0f;
            squares += low[u.index] * low[u.index] + high[u.index] * high[u.index];
        }});
        const float factor = rsqrtf(lanes_sum(squares, 32) * (1.0f / HEAD_DIM) + {c_float(eps)});
        const float* weights = head < HEADS ? q_norm : k_norm;
        u16* to = turned + (u64)token * {turned.stride} + head * HEAD_DIM;
        {held.typedef(head_dim)}
        __shared__ Cache::Row rows[{THREADS // 32}];
        Cache::Row& row = rows[threadIdx.x >> 5];
        for_each<PAIRS>([&](auto u) {{
            int i = u.index * 32 + lane;
            if (i < HEAD_DIM / 2) {{
                float a = low[u.index], b = high[u.index];
                if (head < HEADS + KV_HEADS) {{
                    float2 turn = rope[(u64)position * (HEAD_DIM / 2) + i];
                    float x = a * factor * weights[i], y = b * factor * weights[HEAD_DIM / 2 + i];
                    a = x * turn.x - y * turn.y;
                    b = y * turn.x + x * turn.y;
                }}
                if (head < HEADS) {{
                    to[i] = float_to_half(a);
                    to[HEAD_DIM / 2 + i] = float_to_half(b);
                }} else {{
                    Cache::put(row, i, a);
                    Cache::put(row, HEAD_DIM / 2 + i, b);
                }}
            }}
        }});
        if (head >= HEADS) {{
            Cache::finish(row, lane);
            u8* cache = (head < HEADS + KV_HEADS ? k_cache : v_cache) + own * Cache::head_bytes(context);
            Cache::store(cache, position, row, lane);
        }}
    """)
    blocks = -(-ctx.tokens * rows // (THREADS // 32))
    return kernel.done(blocks, describe="a warp a token and head")


def emit_attention(node: Node, ctx: PrefillContext) -> KernelSpec:
    """attention: a block a key/value head and 64 pairs of token and query head; those with most keys first."""
    q, (kv_heads, _, head_dim) = node.ins[0], node.ins[1].type.shape
    heads = q.type.shape[1]
    _check_head(head_dim)
    if q.type.dtype != "f16" or node.out.type.dtype != "f16":
        raise UnsupportedModelError("attention over a sequence: kernels read halves and make halves for a product")
    group = heads // kv_heads
    held = CACHE_TYPES[node.ins[1].type.dtype]
    blocks = -(-ctx.tokens * group // ATTEND_ROWS)
    kernel = PrefillKernel("prefill_attention", ATTEND_THREADS)
    source = ctx.place(q)
    kernel.take("const u16* q", source.buffer)
    kernel.take("const u8* k_cache", ctx.place(node.ins[1]).buffer)
    kernel.take("const u8* v_cache", ctx.place(node.ins[2]).buffer)
    kernel.take("const int* span", "span")
    y = ctx.write(node.out)
    kernel.take("u16* y", y.buffer)
    kernel.take("int context", ctx.ctx)
    scale = float(node.attr("scale")) * math.log2(math.e)  # type: ignore[arg-type]
    kernel.writer.lines(f"""
        DYNAMIC_SHARED(shared_memory);
        const int kv_head = blockIdx.x % {kv_heads}, block = {blocks - 1} - (int)blockIdx.x / {kv_heads};
        attend_block<{head_dim}, {group}, {held.chunk_tiles}>(
            q, k_cache, v_cache, y, {source.stride}, {y.stride}, span[0], span[1], context, kv_head, block,
            {c_float(scale)}, (u16*)shared_memory);
    """)
    keys = 32 if head_dim > 128 else 64
    shared = held.chunk_bytes(head_dim, keys)
    describe = f"{kv_heads} key/value heads x {blocks} blocks of {ATTEND_ROWS} rows, {group} query heads a token"
    return kernel.done(kv_heads * blocks, shared, describe=describe)


def _check_head(head_dim: int) -> None:
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        raise UnsupportedModelError(f"head_dim {head_dim}: kernels support powers of two from 16 to 256")


def emit_record(node: Node, ctx: PrefillContext) -> KernelSpec:
    """record: the tokens at the span's positions."""
    kernel = PrefillKernel("prefill_record", THREADS)
    kernel.take("int* log", ctx.in_place(node.out, node.ins[0]))
    kernel.take("const int* tokens", ctx.param(node.ins[1]))
    kernel.take("const int* span", "span")
    kernel.writer.line(f"const int token = blockIdx.x * {THREADS} + threadIdx.x;")
    kernel.writer.line("if (token < span[1]) log[span[0] + token] = tokens[token];")
    return kernel.done(-(-ctx.tokens // THREADS))


def emit_advance(node: Node, ctx: PrefillContext) -> KernelSpec:
    """advance: the position behind the span."""
    kernel = PrefillKernel("prefill_advance", 32)
    kernel.take("const int* span", "span")
    kernel.take("int* position", ctx.in_place(node.out, node.out))
    kernel.writer.line("if (threadIdx.x == 0) *position = span[0] + span[1];")
    return kernel.done(1)


PREFILL_EMITTERS: dict[str, Callable[[Node, PrefillContext], KernelSpec]] = {
    "embed": emit_embed,
    "rms_norm": emit_rms_norm,
    "rope_append": emit_rope_append,
    "attention": emit_attention,
    "record": emit_record,
    "advance": emit_advance,
}
