"""Attention over the KV cache, with q/k norm, RoPE and the cache append in its prologue.

One block serves one key/value head and one *split* of the positions, so that every SM has
work at any depth; all query heads of the group share each key and value read. Inside a
block, `head_dim / 8` lanes read one row of the cache (16 bytes each) and keep a running
softmax (max, sum, weighted values: Milakov and Gimelshein 2018; split form as in
FlashDecoding). How many splits are active depends on the position, read on the device, so
that one captured graph serves every token. With one active split the block writes the
result; otherwise the last block of a head to finish adds the splits up in fixed order.
"""

from __future__ import annotations

import math

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Node
from .emission import Context, Emitted
from .weight_types import padded_columns
from .writer import Writer, c_float, signature

ATTENTION_OPS = ("rope_append", "rope_attention", "attention")

THREADS = 256
UNROLL = 2
MAX_SPLITS = 32


def emit_attention(node: Node, ctx: Context) -> Emitted:
    """The kernel of one of `ATTENTION_OPS`."""
    rotate = node.op != "attention"
    attend = node.op != "rope_append"
    cache = node.ins[5 if rotate else 1].type
    kv_heads, _, head_dim = cache.shape
    heads = int(node.attr("heads")) if rotate else node.ins[0].type.shape[0]  # type: ignore[arg-type]
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        raise UnsupportedModelError(f"head_dim {head_dim}: kernels support powers of two from 16 to 256")
    group = heads // kv_heads
    rows = THREADS // (head_dim // 8)
    splits = max(1, min(MAX_SPLITS, ctx.target.sm_count // kv_heads)) if attend else 1
    parameters: list[str] = []
    args: list[str | int] = []

    def take(declaration: str, arg: str | int) -> None:
        parameters.append(declaration)
        args.append(arg)

    take("const float* q", ctx.read(node.ins[0]))
    if rotate:
        for name, value in zip(("k", "v", "q_norm", "k_norm"), node.ins[1:5], strict=True):
            take(f"const float* {name}", ctx.read(value))
        take("u16* k_cache", ctx.in_place(node.outs[1], node.ins[5]))
        take("u16* v_cache", ctx.in_place(node.outs[2], node.ins[6]))
        table_attrs = {key: value for key, value in node.attrs if key not in ("eps", "scale", "heads", "kv_heads")}
        take("const float2* rope", ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **table_attrs))
    else:
        take("const u16* k_cache", ctx.read(node.ins[1]))
        take("const u16* v_cache", ctx.read(node.ins[2]))
    take("const int* position", ctx.read(node.ins[-1]))
    result = node.outs[0]
    quantized = result.type.dtype == "i8x2"
    take("u8* y" if quantized else "float* y", ctx.write(result))
    if attend:
        take("float* partial", ctx.scratch("partial", kv_heads * splits * group * (head_dim + 2) * 4))
        take("u32* arrived", ctx.scratch("arrived", kv_heads * 4, zeroed=True))
    take("int context", ctx.ctx)

    writer = Writer()
    with writer.block(signature(THREADS, parameters)):
        writer.lines(f"""
            constexpr int HEAD_DIM = {head_dim}, SPLITS = {splits};
            constexpr int GROUP = {group};  // query heads that share a key/value head
            constexpr int ROW_LANES = HEAD_DIM / 8, ROWS = {THREADS} / ROW_LANES;  // lanes of a row; rows at once
            const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
            const int kv_head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;
            const int now = from_earlier_step(position);
            const int share = ((now + SPLITS) / SPLITS + ROWS - 1) / ROWS * ROWS;
            const int per_split = share > {UNROLL} * ROWS ? share : {UNROLL} * ROWS;
            const int active = now / per_split + 1;  // splits that have positions
            const int first = split * per_split, last = first + per_split < now + 1 ? first + per_split : now + 1;
            const u64 head_start = (u64)kv_head * context * HEAD_DIM;
            __shared__ __align__(16) float queries[GROUP][HEAD_DIM];
        """)
        if rotate:
            writer.lines("""
                __shared__ __align__(16) u16 new_key[HEAD_DIM], new_value[HEAD_DIM];
                __shared__ float2 turn[HEAD_DIM / 2];  // cosine and sine of this position
                __shared__ float norm_weights[2][HEAD_DIM];
            """)
        if attend:
            writer.line("extern __shared__ __align__(16) u8 shared_memory[];")
            writer.line("float* row_sums = (float*)shared_memory;  // [row][query head][HEAD_DIM]")
            writer.line("// [row][query head]: maximum, sum of weights")
            writer.line("float2* row_tops = (float2*)(row_sums + ROWS * GROUP * HEAD_DIM);")
            _prefetch(writer, rotate)
        writer.line("let_next_kernel_start();")
        if rotate:
            writer.lines(f"""
                for (int i = threadIdx.x; i < HEAD_DIM; i += {THREADS}) {{
                    norm_weights[0][i] = q_norm[i];
                    norm_weights[1][i] = k_norm[i];
                    if (i < HEAD_DIM / 2) turn[i] = rope[(u64)now * (HEAD_DIM / 2) + i];
                }}
                __syncthreads();
            """)
        scale = float(node.attr("scale")) * math.log2(math.e) if attend else 1.0  # type: ignore[arg-type]
        writer.line("wait_for_previous_kernel();")
        if attend:
            writer.line("if (split >= active) return;")
        if rotate:
            _rotate(writer, scale, float(node.attr("eps")))  # type: ignore[arg-type]
        else:
            writer.lines(f"""
                for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += {THREADS})
                    queries[i / HEAD_DIM][i % HEAD_DIM] = fresh(q + kv_head * GROUP * HEAD_DIM + i) * {c_float(scale)};
            """)
        writer.line("__syncthreads();")
        if attend:
            _attend(writer, rotate, quantized, heads * head_dim)
        else:
            writer.lines(f"""
                for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += {THREADS})
                    y[kv_head * GROUP * HEAD_DIM + i] = queries[i / HEAD_DIM][i % HEAD_DIM];
            """)
    return Emitted(
        stem=node.op,
        body=writer.text(),
        grid=kv_heads * splits,
        block=THREADS,
        args=tuple(args),
        shared_bytes=rows * group * (head_dim * 4 + 8) if attend else 0,
        cache_bytes_per_position=2 * kv_heads * head_dim * 2 if attend else 0,
        describe=f"{kv_heads} key/value heads x {splits} splits, {group} query heads share each read",
    )


def _prefetch(writer: Writer, rotate: bool) -> None:
    writer.lines(f"""

        // Keys and values of earlier positions were written by earlier steps: no need to wait for them.
        const int row = threadIdx.x / ROW_LANES, part = threadIdx.x % ROW_LANES;
        uint4 keys[{UNROLL}], values[{UNROLL}];
        auto fetch = [&](int base) {{
            for_each<{UNROLL}>([&](auto u) {{
                int p = base + u.index * ROWS + row;
                if (p < last && p < now) {{
                    u64 at = head_start + (u64)p * HEAD_DIM + part * 8;
                    keys[u.index] = from_earlier_step((const uint4*)(k_cache + at));
                    values[u.index] = from_earlier_step((const uint4*)(v_cache + at));
                }}
            }});
        }};
        fetch(first);
    """)


def _rotate(writer: Writer, scale: float, eps: float) -> None:
    """q/k norm and RoPE, a warp a head; the block that owns the new position writes the cache."""
    writer.lines(f"""

        // q/k norm and RoPE: one warp a head. The new key and value belong to the block of the last position.
        const bool owner = last == now + 1;
        #pragma unroll 1
        for (int head = warp; head < GROUP + (owner ? 2 : 0); head += {THREADS // 32}) {{
            const float* source = (head == GROUP ? k : v) + kv_head * HEAD_DIM;
            if (head < GROUP) source = q + (kv_head * GROUP + head) * HEAD_DIM;
            constexpr int PAIRS = HEAD_DIM > 64 ? HEAD_DIM / 64 : 1;
            float low[PAIRS], high[PAIRS], squares = 0.0f;
            for_each<PAIRS>([&](auto u) {{
                int i = u.index * 32 + lane;
                bool inside = i < HEAD_DIM / 2;
                low[u.index] = inside ? fresh(source + i) : 0.0f;
                high[u.index] = inside ? fresh(source + HEAD_DIM / 2 + i) : 0.0f;
                squares += low[u.index] * low[u.index] + high[u.index] * high[u.index];
            }});
            float factor = rsqrtf(lanes_sum(squares, 32) * (1.0f / HEAD_DIM) + {c_float(eps)});
            for_each<PAIRS>([&](auto u) {{
                int i = u.index * 32 + lane;
                if (i < HEAD_DIM / 2) {{
                    float a = low[u.index], b = high[u.index];
                    if (head <= GROUP) {{
                        const float* weights = norm_weights[head == GROUP];
                        float x = a * factor * weights[i], y2 = b * factor * weights[HEAD_DIM / 2 + i];
                        a = x * turn[i].x - y2 * turn[i].y;
                        b = y2 * turn[i].x + x * turn[i].y;
                    }}
                    if (head < GROUP) {{
                        queries[head][i] = a * {c_float(scale)};
                        queries[head][HEAD_DIM / 2 + i] = b * {c_float(scale)};
                    }} else {{
                        u16* shared = head == GROUP ? new_key : new_value;
                        u16* cache = (head == GROUP ? k_cache : v_cache) + head_start + (u64)now * HEAD_DIM;
                        shared[i] = float_to_half(a);
                        shared[HEAD_DIM / 2 + i] = float_to_half(b);
                        cache[i] = shared[i];
                        cache[HEAD_DIM / 2 + i] = shared[HEAD_DIM / 2 + i];
                    }}
                }}
            }});
        }}
    """)


def _attend(writer: Writer, rotate: bool, quantized: bool, size: int) -> None:
    new_row = (
        """
                if (p == now) {
                    keys[u.index] = ((const uint4*)new_key)[part];
                    values[u.index] = ((const uint4*)new_value)[part];
                }"""
        if rotate
        else """
                if (p == now) {
                    u64 at = head_start + (u64)p * HEAD_DIM + part * 8;
                    keys[u.index] = fresh((const uint4*)(k_cache + at));
                    values[u.index] = fresh((const uint4*)(v_cache + at));
                }"""
    )
    writer.lines(f"""

        // Running softmax of this row's positions, base 2: maximum, sum of weights, weighted values.
        float query[GROUP][8], top[GROUP], total[GROUP], sum[GROUP][8];
        for_each<GROUP>([&](auto g) {{
            for_each<8>([&](auto i) {{
                query[g.index][i.index] = queries[g.index][part * 8 + i.index];
                sum[g.index][i.index] = 0.0f;
            }});
            top[g.index] = -1e30f;
            total[g.index] = 0.0f;
        }});
        #pragma unroll 1
        for (int base = first; base < last; base += {UNROLL} * ROWS) {{
            if (base > first) fetch(base);
            float scores[{UNROLL}][GROUP];
            for_each<{UNROLL}>([&](auto u) {{
                int p = base + u.index * ROWS + row;{new_row}
                float key[8];
                halves_of(keys[u.index], key);
                for_each<GROUP>([&](auto g) {{
                    float score = 0.0f;
                    for_each<8>([&](auto i) {{ score += query[g.index][i.index] * key[i.index]; }});
                    score = lanes_sum(score, ROW_LANES);
                    scores[u.index][g.index] = p < last ? score : -1e30f;
                }});
            }});
            float shrink[GROUP];
            for_each<GROUP>([&](auto g) {{
                float highest = top[g.index];
                for_each<{UNROLL}>([&](auto u) {{ highest = fmaxf(highest, scores[u.index][g.index]); }});
                shrink[g.index] = exp2_fast(top[g.index] - highest);
                top[g.index] = highest;
                total[g.index] *= shrink[g.index];
                for_each<8>([&](auto i) {{ sum[g.index][i.index] *= shrink[g.index]; }});
            }});
            for_each<{UNROLL}>([&](auto u) {{
                int p = base + u.index * ROWS + row;
                if (p < last) {{
                    float value[8];
                    halves_of(values[u.index], value);
                    for_each<GROUP>([&](auto g) {{
                        float weight = exp2_fast(scores[u.index][g.index] - top[g.index]);
                        total[g.index] += weight;
                        for_each<8>([&](auto i) {{ sum[g.index][i.index] += weight * value[i.index]; }});
                    }});
                }}
            }});
        }}

        // All rows of the block: each leaves its maximum, sum of weights and weighted values.
        for_each<GROUP>([&](auto g) {{
            for_each<2>([&](auto i) {{
                const float* four = sum[g.index] + 4 * i.index;
                float4* mine = (float4*)row_sums + ((row * GROUP + g.index) * HEAD_DIM + part * 8) / 4;
                mine[i.index] = make_float4(four[0], four[1], four[2], four[3]);
            }});
            if (part == 0) row_tops[row * GROUP + g.index] = make_float2(top[g.index], total[g.index]);
        }});
        __syncthreads();
        float* mine = partial + (u64)(kv_head * SPLITS + split) * GROUP * (HEAD_DIM + 2);
        #pragma unroll 1
        for (int base = 0; base < GROUP * HEAD_DIM; base += {THREADS}) {{
            int o = base + threadIdx.x, g = o / HEAD_DIM, d = o % HEAD_DIM, at = kv_head * GROUP * HEAD_DIM + o;
            bool inside = o < GROUP * HEAD_DIM;
            float highest = -1e30f, weights = 0.0f, value = 0.0f;
            if (inside) {{
                #pragma unroll 4
                for (int r = 0; r < ROWS; r++) highest = fmaxf(highest, row_tops[r * GROUP + g].x);
                #pragma unroll 4
                for (int r = 0; r < ROWS; r++) {{
                    float2 theirs = row_tops[r * GROUP + g];
                    float share_of_row = exp2_fast(theirs.x - highest);
                    weights += share_of_row * theirs.y;
                    value += share_of_row * row_sums[(r * GROUP + g) * HEAD_DIM + d];
                }}
            }}
            if (active == 1) {{
                value = inside ? divide(value, weights) : 0.0f;
    """)
    with writer.indented(), writer.indented():
        _store(writer, quantized, size)
    writer.lines(f"""
            }} else if (inside) {{
                mine[g * (HEAD_DIM + 2) + d] = value;
                if (d == 0) {{
                    mine[g * (HEAD_DIM + 2) + HEAD_DIM] = highest;
                    mine[g * (HEAD_DIM + 2) + HEAD_DIM + 1] = weights;
                }}
            }}
        }}
        if (active == 1) return;

        // The last split of the head to finish adds all of them up.
        __shared__ u32 finished;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) finished = atomicAdd(arrived + kv_head, 1u);
        __syncthreads();
        if (finished != (u32)active - 1) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[kv_head] = 0u;
        const float* all = partial + (u64)kv_head * SPLITS * GROUP * (HEAD_DIM + 2);
        #pragma unroll 1
        for (int base = 0; base < GROUP * HEAD_DIM; base += {THREADS}) {{
            int o = base + threadIdx.x, g = o / HEAD_DIM, d = o % HEAD_DIM, at = kv_head * GROUP * HEAD_DIM + o;
            bool inside = o < GROUP * HEAD_DIM;
            float highest = -1e30f, weights = 0.0f, value = 0.0f;
            if (inside) {{
                #pragma unroll 4
                for (int s = 0; s < active; s++)
                    highest = fmaxf(highest, fresh(all + (s * GROUP + g) * (HEAD_DIM + 2) + HEAD_DIM));
                #pragma unroll 4
                for (int s = 0; s < active; s++) {{
                    const float* theirs = all + (s * GROUP + g) * (HEAD_DIM + 2);
                    float share_of_split = exp2_fast(fresh(theirs + HEAD_DIM) - highest);
                    weights += share_of_split * fresh(theirs + HEAD_DIM + 1);
                    value += share_of_split * fresh(theirs + d);
                }}
                value = divide(value, weights);
            }}
    """)
    with writer.indented():
        _store(writer, quantized, size)
    writer.line("}")


def _store(writer: Writer, quantized: bool, size: int) -> None:
    if quantized:
        writer.line(f"store_digits(y, (float2*)(y + {2 * padded_columns(size)}), at, value, inside);")
    else:
        writer.line("if (inside) y[at] = value;")
