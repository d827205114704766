"""Attention over the KV cache, with q/k norm, RoPE and the cache append in its prologue.

A *tile* is 16 positions of one key/value head, and belongs to one warp. A warp has a stretch of
neighbouring tiles, so that a few large requests bring them into L2; stretches go round the head's blocks
first and then round their warps, so that every SM has work early. All query heads of the
group share each key and value read. Both products of a tile run on the tensor cores with float16
operands and float32 sums. Queries and softmax weights are cut in two halves each (`high + low`), which
sit in columns that would be empty otherwise, so that nothing is lost beside the cache's own float16.
How a tile becomes halves is the cache type's (`device/psigraph_cache.cuh`).

How a warp goes through its tiles is in `attention_tiles.py`.

Results are added up in the cluster, or in memory (`attention_gather.py`).

How many tiles there are depends on the position, read on the device, so that one captured
graph serves every token.
"""

from __future__ import annotations

import math

from ..ir.errors import UnsupportedModelError
from ..ir.graph import Node
from .attention_gather import gather
from .attention_shape import WARPS, attention_shape
from .attention_tiles import FETCH, FIRST_TILES, NEXT_LAYER, PREFETCH, attend
from .cache_types import TILE
from .emission import Context, KernelSpec
from .target import RESERVED_BYTES
from .writer import Writer, c_float

ATTENTION_OPS = ("rope_append", "rope_attention", "attention")

THREADS = 32 * WARPS


def emit_attention(node: Node, ctx: Context) -> KernelSpec:
    """The kernel of one of `ATTENTION_OPS`."""
    rotate = node.op != "attention"
    attends = node.op != "rope_append"
    shape = attention_shape(node, ctx.target)
    held, head_dim, group, splits, clusters = shape.held, shape.head_dim, shape.group, shape.splits, shape.clusters
    kv_heads, mine = shape.kv_heads, shape.mine
    stages = ctx.attention_stages
    parameters: list[str] = []
    args: list[str | int] = []

    def take(declaration: str, arg: str | int) -> None:
        parameters.append(declaration)
        args.append(arg)

    take("const float* q", ctx.read(node.ins[0]))
    if rotate:
        for name, value in zip(("k", "v", "q_norm", "k_norm"), node.ins[1:5], strict=True):
            take(f"const float* {name}", ctx.read(value))
        take("u8* k_cache", ctx.in_place(node.outs[1], node.ins[5]))
        take("u8* v_cache", ctx.in_place(node.outs[2], node.ins[6]))
        table_attrs = {key: value for key, value in node.attrs if key not in ("eps", "scale", "heads", "kv_heads")}
        take("const float2* rope", ctx.table("rope", ctx.ctx * head_dim * 4, head_dim=head_dim, **table_attrs))
    else:
        take("const u8* k_cache", ctx.read(node.ins[1]))
        take("const u8* v_cache", ctx.read(node.ins[2]))
    take("const int* position", ctx.read(node.ins[-1]))
    result = node.outs[0]
    quantized = result.type.dtype == "i8x2"
    take("u8* y" if quantized else "float* y", ctx.write(result))
    if attends and not clusters:
        take("float* parts", ctx.scratch("parts", kv_heads * splits * group * head_dim * 4))
        take("float2* part_tops", ctx.scratch("part_tops", kv_heads * splits * group * 8))
        take("u32* arrived", ctx.scratch("arrived", kv_heads * 4, zeroed=True))
    take("int context", ctx.ctx)
    ahead = rotate and attends and ctx.target.programmatic  # requests for L2, which need bulk copies
    if ahead:
        after = ctx.attention_after(node)
        take("const u8* next_k", ctx.read(after.ins[5]))
        take("const u8* next_v", ctx.read(after.ins[6]))

    writer = Writer()
    writer.lines(f"""
        constexpr int HEAD_DIM = {head_dim}, SPLITS = {splits};  // blocks of a key/value head
        constexpr int GROUP = {group};  // query heads that share a key/value head
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        const int now = from_earlier_step(position);
    """)
    if attends:
        writer.lines(f"""
            constexpr int WARPS = {WARPS}, TILE = {TILE};  // positions
            constexpr int SLOTS = WARPS * SPLITS, WARP_BYTES = {shape.warp_bytes(stages)};
            constexpr int STAGES = {stages};  // of the warp's ring
            const int tiles = now / TILE + 1;
        """)
    writer.line("const int kv_head = blockIdx.x / SPLITS, split = blockIdx.x % SPLITS;")
    writer.line(held.typedef(head_dim))
    writer.line("const u64 head_start = kv_head * Cache::head_bytes(context);")
    if attends:
        writer.lines("""
            const int place = warp * SPLITS + split, busy = tiles < SLOTS ? tiles : SLOTS;  // warps that have tiles
            const bool owner = (busy - 1) % SPLITS == split;  // this block has the tile of the new position
            // This warp's tiles: from `first`, before `last`. The last place never has one more than others.
            auto start = [&](int which) {
                if (tiles < SLOTS) return which < tiles ? which : tiles;
                return (which * tiles + SLOTS - 1) / SLOTS;
            };
            const int first = start(place), last = start(place + 1);
            constexpr int SETS = (GROUP + 3) / 4;  // of four query heads, of each its high and its low halves
            constexpr int QUERY = (HEAD_DIM + 31) / 64 * 64 + 32;  // whole 32 columns, rows in banks of their own
            __shared__ __align__(16) u16 queries[SETS * 8][QUERY];
        """)
    else:
        writer.line("const bool owner = true;")
    if rotate:
        writer.lines("""
            __shared__ Cache::Row new_key, new_value;
            __shared__ float2 turn[HEAD_DIM / 2];  // cosine and sine of this position
            __shared__ float norm_weights[2][HEAD_DIM];
        """)
    if attends:
        _memory(writer, clusters, mine, shape.touched)
        writer.lines(FETCH.replace("SEEN", "now" if rotate else "now + 1"))
        if rotate:
            writer.line("// Keys and values of earlier positions were written by earlier steps: no need to wait.")
            writer.lines(FIRST_TILES)
        if ahead:
            writer.lines(PREFETCH)
    writer.line("let_next_kernel_start();")
    _keep(writer, attends, group)
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
            __shared__ u64 all_sent;
            if (threadIdx.x == 0) expect_bytes(&all_sent, busy * (MINE * 4 + (LAST - FIRST + 1) * 8));
            cluster_barrier();  // all blocks have started: their shared memory may be written
        """)
    scale = float(node.attr("scale")) * math.log2(math.e) if attends else 1.0  # type: ignore[arg-type]
    writer.line("wait_for_previous_kernel(stamps);")
    if attends and not clusters:
        writer.line("if (split >= tiles) return;")
    if rotate:
        _rotate(writer, scale, float(node.attr("eps")))  # type: ignore[arg-type]
    else:
        writer.lines(FIRST_TILES)
        writer.lines(f"""
            for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += {THREADS})
                keep(i / HEAD_DIM, i % HEAD_DIM, fresh(q + kv_head * GROUP * HEAD_DIM + i) * {c_float(scale)});
        """)
    if attends:
        writer.line("__syncthreads();")
        attend(writer, rotate=rotate, ahead=ahead)
        gather(
            writer,
            threads=THREADS,
            mine=mine,
            clusters=clusters,
            quantized=quantized,
            size=shape.heads * head_dim,
            meanwhile=NEXT_LAYER if ahead else "",
        )
    if attends and shape.block_bytes(stages) - RESERVED_BYTES > ctx.target.shared_bytes:
        what = f"head_dim {head_dim} with {group} query heads a key/value head"
        raise UnsupportedModelError(f"{what} needs more shared memory than {ctx.target.arch} has")
    return KernelSpec(
        stem=node.op,
        includes=("cache.cuh", "cluster.cuh", "quant.cuh"),
        threads=THREADS,
        registers=ctx.target.attention_registers,
        parameters=tuple(parameters),
        args=tuple(args),
        body=writer.text(),
        grid=kv_heads * splits,
        shared_bytes=shape.dynamic_bytes(stages) if attends else 0,
        cluster=splits if clusters else 1,
        cache_bytes_per_position=2 * kv_heads * held.position_bytes(head_dim) if attends else 0,
        describe=f"{kv_heads} key/value heads x {splits} blocks, {group} query heads share each read",
    )


def _memory(writer: Writer, clusters: bool, mine: int, touched: int) -> None:
    writer.lines("""
        DYNAMIC_SHARED(shared_memory);
        u8* const ring = shared_memory + warp * WARP_BYTES;
    """)
    if clusters:
        writer.lines(f"""
            constexpr int MINE = {mine};  // of the head's values, finished by this block
            float* gathered = (float*)(shared_memory + WARPS * WARP_BYTES);  // [place][MINE]
            constexpr int HEADS = {touched};  // that those belong to, at most
            const int FIRST = split * MINE / HEAD_DIM, LAST = ((split + 1) * MINE - 1) / HEAD_DIM;
            float2* tops = (float2*)(gathered + SLOTS * MINE);  // [place][head - FIRST]: maximum, sum of weights
        """)


def _keep(writer: Writer, attends: bool, group: int) -> None:
    """Where a query's elements go."""
    if not attends:
        writer.line("auto keep = [&](int head, int i, float x) { y[(kv_head * GROUP + head) * HEAD_DIM + i] = x; };")
        return
    writer.lines("""
        auto keep = [&](int head, int i, float x) {
            u32 halves = both_halves(x);
            queries[2 * head][column_place(i)] = (u16)halves;
            queries[2 * head + 1][column_place(i)] = (u16)(halves >> 16);
        };
    """)
    if group % 4:
        writer.lines(f"""
            // Heads that the last set lacks: their scores must not decide when the others' largest one is sought again.
            for (int i = threadIdx.x; i < (SETS * 8 - 2 * GROUP) * QUERY; i += {THREADS})
                queries[2 * GROUP + i / QUERY][i % QUERY] = 0;
        """)


def _rotate(writer: Writer, scale: float, eps: float) -> None:
    """q/k norm and RoPE, a warp a head. Every block works out the new rows, so that this code is near on every
    multiprocessor; the one that owns the new position writes them."""
    writer.lines(f"""

        // q/k norm and RoPE: one warp a head. The last two are the new key and value.
        #pragma unroll 1
        for (int head = warp; head < GROUP + 2; head += {WARPS}) {{
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
                        Cache::Row& row = head == GROUP ? new_key : new_value;
                        Cache::put(row, i, a);
                        Cache::put(row, HEAD_DIM / 2 + i, b);
                    }}
                }}
            }});
            if (head >= GROUP) {{
                Cache::Row& row = head == GROUP ? new_key : new_value;
                Cache::finish(row, lane);
                if (owner) Cache::store((head == GROUP ? k_cache : v_cache) + head_start, now, row, lane);
            }}
        }}
    """)
