"""Attention over the KV cache, with q/k norm, RoPE and the cache append in its prologue.

A *tile* is 16 positions of one key/value head, and belongs to one warp: the tiles of a head go round
its blocks first and then round their warps, so that every SM has work early. All query heads of the
group share each key and value read. Both products of a tile run on the tensor cores with float16
operands and float32 sums. Queries and softmax weights are cut in two halves each (`high + low`), which
sit in columns that would be empty otherwise, so that nothing is lost beside the cache's own float16.
How a tile gets into shared memory and becomes halves is the cache type's (`cache_types.py`).

Results are added up in the cluster, or in memory (`attention_gather.py`).

How many tiles there are depends on the position, read on the device, so that one captured
graph serves every token.
"""

from __future__ import annotations

import math

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Node
from .attention_gather import gather
from .cache_types import CACHE_TYPES, TILE, CacheType, StepParts
from .emission import Context, Emitted
from .writer import Writer, c_float, inset, signature

ATTENTION_OPS = ("rope_append", "rope_attention", "attention")

WARPS = 4
THREADS = 32 * WARPS
MAX_SPLITS = 32
TILES_AHEAD = 2  # of each warp, on their way into L2


def emit_attention(node: Node, ctx: Context) -> Emitted:
    """The kernel of one of `ATTENTION_OPS`."""
    rotate = node.op != "attention"
    attend = node.op != "rope_append"
    cache = node.ins[5 if rotate else 1].type
    kv_heads, _, head_dim = cache.shape
    held = CACHE_TYPES[cache.dtype]
    heads = int(node.attr("heads")) if rotate else node.ins[0].type.shape[0]  # type: ignore[arg-type]
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise UnsupportedModelError(f"head_dim {head_dim}: kernels support multiples of 16 from 16 to 256")
    group = heads // kv_heads
    clusters = attend and ctx.target.cluster > 1
    splits = _splits(ctx, kv_heads, group * head_dim) if attend else 1
    parameters: list[str] = []
    args: list[str | int] = []

    def take(declaration: str, arg: str | int) -> None:
        parameters.append(declaration)
        args.append(arg)

    take("const float* q", ctx.read(node.ins[0]))
    if rotate:
        for name, value in zip(("k", "v", "q_norm", "k_norm"), node.ins[1:5], strict=True):
            take(f"const float* {name}", ctx.read(value))
        take(f"{held.element}* k_cache", ctx.in_place(node.outs[1], node.ins[5]))
        take(f"{held.element}* v_cache", ctx.in_place(node.outs[2], node.ins[6]))
        table_attrs = {key: value for key, value in node.attrs if key not in ("eps", "scale", "heads", "kv_heads")}
        take("const float2* rope", ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **table_attrs))
    else:
        take(f"const {held.element}* k_cache", ctx.read(node.ins[1]))
        take(f"const {held.element}* v_cache", ctx.read(node.ins[2]))
    take("const int* position", ctx.read(node.ins[-1]))
    result = node.outs[0]
    quantized = result.type.dtype == "i8x2"
    take("u8* y" if quantized else "float* y", ctx.write(result))
    mine = group * head_dim // splits if clusters else group * head_dim  # of the head's values, finished by a block
    touched = -(-mine // head_dim) + (head_dim % mine != 0 and mine % head_dim != 0)  # heads that those belong to
    if attend and not clusters:
        take("float* parts", ctx.scratch("parts", kv_heads * splits * group * head_dim * 4))
        take("float2* part_tops", ctx.scratch("part_tops", kv_heads * splits * group * 8))
        take("u32* arrived", ctx.scratch("arrived", kv_heads * 4, zeroed=True))
    take("int context", ctx.ctx)

    # Where its tiles were, a warp collects its part, and the last block has the shares of all blocks.
    warp_bytes = -(-max(held.tile_bytes(head_dim), group * (head_dim * 4 + 8)) // 16) * 16
    writer = Writer()
    with writer.block(signature(THREADS, parameters, ctx.target.attention_registers)):
        writer.lines(f"""
            constexpr int HEAD_DIM = {head_dim}, SPLITS = {splits};  // blocks of a key/value head
            constexpr int GROUP = {group};  // query heads that share a key/value head
            const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
            const int now = from_earlier_step(position);
        """)
        if attend:
            writer.lines(f"""
                constexpr int WARPS = {WARPS}, TILE = {TILE};  // positions
                constexpr int SLOTS = WARPS * SPLITS, WARP_BYTES = {warp_bytes};
                const int tiles = now / TILE + 1;
            """)
        writer.line("const int kv_head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;")
        writer.lines(held.step.head_start)
        if attend:
            writer.lines("""
                const int place = warp * SPLITS + split;
                const bool owner = (tiles - 1) % SPLITS == split;  // this block has the tile of the new position
                constexpr int SETS = (GROUP + 3) / 4;  // of four query heads, of each its high and its low halves
                __shared__ __align__(16) u16 queries[SETS * 8][HEAD_DIM + 16];
            """)
        else:
            writer.line("const bool owner = true;")
        if rotate:
            writer.lines(held.step.new_rows)
            writer.lines("""
                __shared__ float2 turn[HEAD_DIM / 2];  // cosine and sine of this position
                __shared__ float norm_weights[2][HEAD_DIM];
            """)
        if attend:
            _memory(writer, held, clusters, mine, touched)
            writer.lines(held.step.fetch.replace("SEEN", "now" if rotate else "now + 1"))
            if rotate:
                writer.line("// Keys and values of earlier positions were written by earlier steps: no need to wait.")
                writer.line("fetch_keys(place);")
                writer.line("fetch_values(place);")
                writer.lines(held.step.prefetch)
                writer.line(f"for (int i = 1; i <= {TILES_AHEAD}; i++) prefetch_tile(place + i * SLOTS);")
        writer.line("let_next_kernel_start();")
        _keep(writer, held.step, attend, group)
        if rotate:
            writer.lines(f"""
                for (int i = threadIdx.x; i < HEAD_DIM; i += {THREADS}) {{
                    norm_weights[0][i] = q_norm[i];
                    norm_weights[1][i] = k_norm[i];
                    if (i < HEAD_DIM / 2) turn[i] = rope[(u64)now * (HEAD_DIM / 2) + i];
                }}
                __syncthreads();
            """)
        if clusters:
            writer.lines("""
                const int count = tiles < SLOTS ? tiles : SLOTS;  // warps of the head that have a tile
                __shared__ u64 all_sent;
                if (threadIdx.x == 0) expect_bytes(&all_sent, count * (MINE * 4 + (LAST - FIRST + 1) * 8));
                cluster_barrier();  // all blocks have started: their shared memory may be written
            """)
        scale = float(node.attr("scale")) * math.log2(math.e) if attend else 1.0  # type: ignore[arg-type]
        writer.line("wait_for_previous_kernel();")
        if attend and not clusters:
            writer.line("if (split >= tiles) return;")
        if rotate:
            _rotate(writer, held.step, scale, float(node.attr("eps")))  # type: ignore[arg-type]
        else:
            writer.line("fetch_keys(place);")
            writer.line("fetch_values(place);")
            writer.lines(f"""
                for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += {THREADS})
                    keep(i / HEAD_DIM, i % HEAD_DIM, fresh(q + kv_head * GROUP * HEAD_DIM + i) * {c_float(scale)});
            """)
        if attend:
            writer.line("__syncthreads();")
            _attend(writer, held.step, rotate)
            gather(
                writer,
                threads=THREADS,
                mine=mine,
                clusters=clusters,
                quantized=quantized,
                size=heads * head_dim,
            )
    dynamic = WARPS * warp_bytes + (WARPS * splits * (mine * 4 + touched * 8) if clusters else 0)
    if attend and dynamic + _static_bytes(group, head_dim) > ctx.target.shared_bytes:
        what = f"head_dim {head_dim} with {group} query heads a key/value head"
        raise UnsupportedModelError(f"{what} needs more shared memory than {ctx.target.arch} has")
    return Emitted(
        stem=node.op,
        body=held.with_header(writer.text()),
        grid=kv_heads * splits,
        block=THREADS,
        args=tuple(args),
        shared_bytes=dynamic if attend else 0,
        cluster=splits if clusters else 1,
        cache_bytes_per_position=2 * kv_heads * held.position_bytes(head_dim) if attend else 0,
        describe=f"{kv_heads} key/value heads x {splits} blocks, {group} query heads share each read",
    )


def _static_bytes(group: int, head_dim: int) -> int:
    """Static shared memory of the kernel, at most: queries, the new rows in float32, norms, rotation, shares."""
    return -(-group // 4) * 8 * (head_dim + 16) * 2 + head_dim * (2 * 6 + 2 * 4 + 4) + 1024


def _splits(ctx: Context, kv_heads: int, values: int) -> int:
    """Blocks of a key/value head. In a cluster each finishes whole groups of 16 of the head's `values`."""
    if ctx.target.cluster == 1:
        return max(1, min(MAX_SPLITS, ctx.target.sm_count // kv_heads))
    splits = ctx.target.cluster
    while splits > 1 and (values % (16 * splits) or kv_heads * splits > max(ctx.target.sm_count, kv_heads * 2)):
        splits //= 2
    return splits


def _memory(writer: Writer, held: CacheType, clusters: bool, mine: int, touched: int) -> None:
    writer.line("extern __shared__ __align__(16) u8 shared_memory[];")
    writer.lines(held.step.tiles)
    if clusters:
        writer.lines(f"""
            constexpr int MINE = {mine};  // of the head's values, finished by this block
            float* gathered = (float*)(shared_memory + WARPS * WARP_BYTES);  // [place][MINE]
            constexpr int HEADS = {touched};  // that those belong to, at most
            const int FIRST = split * MINE / HEAD_DIM, LAST = ((split + 1) * MINE - 1) / HEAD_DIM;
            float2* tops = (float2*)(gathered + SLOTS * MINE);  // [place][head - FIRST]: maximum, sum of weights
        """)


def _keep(writer: Writer, cache: StepParts, attend: bool, group: int) -> None:
    """Where a query's elements go."""
    if not attend:
        writer.line("auto keep = [&](int head, int i, float x) { y[(kv_head * GROUP + head) * HEAD_DIM + i] = x; };")
        return
    writer.lines(f"""
        auto keep = [&](int head, int i, float x) {{
            u32 halves = both_halves(x);
            queries[2 * head][{cache.query_place}] = (u16)halves;
            queries[2 * head + 1][{cache.query_place}] = (u16)(halves >> 16);
        }};
    """)
    if group % 4:
        writer.lines(f"""
            for (int i = threadIdx.x; i < (SETS * 8 - 2 * GROUP) * HEAD_DIM; i += {THREADS})
                queries[2 * GROUP + i / HEAD_DIM][i % HEAD_DIM] = 0;  // heads that the last set lacks
        """)


def _rotate(writer: Writer, cache: StepParts, scale: float, eps: float) -> None:
    """q/k norm and RoPE, a warp a head; the block that owns the new position writes the cache."""
    append = "\n" + inset(cache.append, 12) if cache.append else ""
    writer.lines(f"""

        // q/k norm and RoPE: one warp a head. The new key and value belong to the block of the last position.
        #pragma unroll 1
        for (int head = warp; head < GROUP + (owner ? 2 : 0); head += {WARPS}) {{
            const float* source = (head == GROUP ? k : v) + kv_head * HEAD_DIM;
            if (head < GROUP) source = q + (kv_head * GROUP + head) * HEAD_DIM;
            constexpr int PAIRS = (HEAD_DIM + 63) / 64;
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
                        keep(head, i, a * {c_float(scale)});
                        keep(head, HEAD_DIM / 2 + i, b * {c_float(scale)});
                    }} else {{
{inset(cache.put, 24)}
                    }}
                }}
            }});{append}
        }}
    """)


def _attend(writer: Writer, cache: StepParts, rotate: bool) -> None:
    writer.lines("""

        // Columns of the products: of each query head its high and its low half, four heads a set.
        // Lane (g, t) = (lane / 4, lane % 4) owns positions g and g + 8 of a tile, and head t of each set.
        constexpr int STEPS = HEAD_DIM / 16;
        const int g = lane >> 2, t = lane & 3;
        float top[SETS], total[SETS], sum[SETS][STEPS][4];
        for_each<SETS>([&](auto set) {
            for_each<STEPS>([&](auto step) {
                for_each<4>([&](auto i) { sum[set.index][step.index][i.index] = 0.0f; });
            });
            top[set.index] = -1e30f;
            total[set.index] = 0.0f;
        });
        #pragma unroll 1
        for (int tile = place; tile < tiles; tile += SLOTS) {
            wait_for_copies_but_last();
    """)
    if rotate:
        writer.lines(_new_row(cache, "key"))
    later = f"prefetch_tile(tile + {TILES_AHEAD + 1} * SLOTS);" if rotate else ""
    writer.lines(
        """
            constexpr int CHAINS = SETS == 1 && STEPS % 2 == 0 ? 2 : 1;  // of sums, side by side
            float chains[SETS][CHAINS][4], scores[SETS][4];
            for_each<SETS>([&](auto set) {
                for_each<CHAINS * 4>([&](auto i) { chains[set.index][i.index / 4][i.index % 4] = 0.0f; });
            });
            #pragma unroll 2
            for (int first = 0; first < STEPS; first += CHAINS)
                for_each<CHAINS>([&](auto chain) {
                    const int step = first + chain.index;
LOAD_KEY
                    for_each<SETS>([&](auto set) {
                        uint2 both = *(const uint2*)(queries[set.index * 8 + g] + step * 16 + 4 * t);
                        const u32 query[2] = {both.x, both.y};
                        dot_halves(chains[set.index][chain.index], key, query, lane);
                    });
                });
            for_each<SETS>([&](auto set) {
                for_each<4>([&](auto i) {
                    const float other = CHAINS > 1 ? chains[set.index][CHAINS - 1][i.index] : 0.0f;
                    scores[set.index][i.index] = chains[set.index][0][i.index] + other;
                });
            });
            __syncwarp();
            fetch_keys(tile + SLOTS);  // while the values are used
            PREFETCH_LATER
            u32 weights[SETS][2];
            for_each<SETS>([&](auto set) {
                const int p = tile * TILE + g;
                const float* score = scores[set.index];
                float low = p <= now ? score[0] + score[1] : -1e30f, high = p + 8 <= now ? score[2] + score[3] : -1e30f;
                float highest = fmaxf(top[set.index], rows_max(fmaxf(low, high)));
                float shrink = exp2_fast(top[set.index] - highest);
                top[set.index] = highest;
                // 2^14 times too large, all alike: small weights then have a low half too.
                low = p <= now ? exp2_fast(low - highest + 14.0f) : 0.0f;
                high = p + 8 <= now ? exp2_fast(high - highest + 14.0f) : 0.0f;
                total[set.index] = total[set.index] * shrink + (low + high);
                weights[set.index][0] = transposed(both_halves(low), lane);
                weights[set.index][1] = transposed(both_halves(high), lane);
                for_each<STEPS>([&](auto step) {
                    for_each<4>([&](auto i) { sum[set.index][step.index][i.index] *= shrink; });
                });
            });
            wait_for_copies_but_last();
    """.replace("LOAD_KEY", inset(cache.key, 20)).replace("PREFETCH_LATER", later)
    )
    if rotate:
        writer.lines(_new_row(cache, "value"))
    writer.lines(
        """
            for_each<STEPS>([&](auto step) {
LOAD_VALUE
                for_each<SETS>([&](auto set) {
                    dot_halves(sum[set.index][step.index], value, weights[set.index], lane);
                });
            });
            __syncwarp();
            fetch_values(tile + SLOTS);
        }
    """.replace("LOAD_VALUE", inset(cache.value, 16))
    )


def _new_row(cache: StepParts, what: str) -> str:
    return cache.new_row.replace("WHAT", what).replace("UPPER", what.upper())
