"""How the warps and blocks of a key/value head add up what each of them has found.

Every warp has a running softmax over its tiles (Milakov and Gimelshein 2018); the results are added up as in
FlashDecoding, in a fixed order. Two ways:

- **in the cluster**: each warp sends its part into the shared memory of the cluster's blocks, each of which finishes
  a part of the head's values;
- **in memory**: each block adds its warps up, and the last block of a head to come adds the blocks up.
"""

from __future__ import annotations

from .digits import store_digits
from .writer import Writer


def gather(
    writer: Writer, *, threads: int, mine: int, clusters: bool, quantized: bool, size: int, meanwhile: str
) -> None:
    """From the warps' sums to the result, a vector of `size` values, which is i8x2 if `quantized`.

    mine: values that a block finishes in a cluster, where there are `clusters`; meanwhile: what a warp does once its
    part is on its way.
    """
    send = """for (int b = head * HEAD_DIM / MINE + g; b <= ((head + 1) * HEAD_DIM - 1) / MINE; b += 8)
                        send_to_block(tops + place * HEADS + head - b * MINE / HEAD_DIM, b, mine, &all_sent);"""
    keep = "if (g == 0) tops_of_warp[head] = mine;"
    writer.lines(f"""

        // This warp's part of each head, where its tiles were: weighted values, maximum and sum of weights.
        float* const outbox = (float*)(shared_memory + warp * WARP_BYTES);  // [query head][HEAD_DIM]
        {"" if clusters else "float2* const tops_of_warp = (float2*)(outbox + GROUP * HEAD_DIM);"}
        if (place < busy) {{
            for_each<SETS>([&](auto set) {{
                const int head = set.index * 4 + t;
                const float2 mine = make_float2(top[set.index], rows_sum(total[set.index]));
                if (head < GROUP) {{
                    for_each<STEPS>([&](auto step) {{
                        const float* pairs = sum[set.index][step.index];
                        const int o = head * HEAD_DIM + step.index * 16 + g;
                        outbox[o] = pairs[0] + pairs[1];
                        outbox[o + 8] = pairs[2] + pairs[3];
                    }});
                    {send if clusters else keep}
                }}
            }});
        }}
    """)
    if clusters:
        _in_cluster(writer, threads, mine, quantized, size, meanwhile)
    else:
        _in_memory(writer, threads, quantized, size)


_SHARES = """
        // What each part counts for in the softmax over all of them.
        #pragma unroll 1
        for (int head = FIRST + warp; head <= LAST; head += WARPS) {{
            float highest = -1e30f, weights = 0.0f;
            for (int s = lane; s < count; s += 32) highest = fmaxf(highest, {top}.x);
            highest = warp_max(highest);
            for (int s = lane; s < PARTS; s += 32) {{
                const float2 theirs = s < count ? {top} : make_float2(highest, 0.0f);
                const float share = s < count ? exp2_fast(theirs.x - highest) : 0.0f;
                shares[head - FIRST][s] = share;
                weights += share * theirs.y;
            }}
            weights = lanes_sum(weights, 32);
            if (lane == 0) weights_of_head[head - FIRST] = weights;
        }}
        __syncthreads();
"""

_ADD_UP = """
            const int head = o / HEAD_DIM - FIRST;
            float value = 0.0f, odd = 0.0f;
            #pragma unroll 2
            for (int s = 0; s < count; s += 4) {
                const float4 share = *(const float4*)(shares[head] + s);
                value += share.x * part(s);
                odd += share.y * (s + 1 < count ? part(s + 1) : 0.0f);
                value += share.z * (s + 2 < count ? part(s + 2) : 0.0f);
                odd += share.w * (s + 3 < count ? part(s + 3) : 0.0f);
            }
            value = divide(value + odd, weights_of_head[head]);
"""


def _in_cluster(writer: Writer, threads: int, mine: int, quantized: bool, size: int, meanwhile: str) -> None:
    """Every block finishes MINE of the head's values; the others send it theirs."""
    with writer.block("if (place < busy)"):
        writer.lines("""
            __syncwarp();
            for (int o = 4 * lane; o < GROUP * HEAD_DIM; o += 128) {
                float4* there = (float4*)(gathered + place * MINE + o % MINE);
                send_to_block(there, o / MINE, *(const float4*)(outbox + o), &all_sent);
            }
        """)
    if meanwhile:
        writer.line(meanwhile)
    writer.lines("""
        wait_for_bytes(&all_sent);
        const int count = busy;
        constexpr int PARTS = (SLOTS + 3) / 4 * 4;
        __shared__ __align__(16) float shares[HEADS][PARTS], weights_of_head[HEADS];
    """)
    writer.lines(_SHARES.format(top="tops[s * HEADS + head - FIRST]"))
    padded = -(-mine // 32) * 32
    loop = f"for (int i = threadIdx.x; i < {padded}; i += {threads})"
    with writer.block(f"if (threadIdx.x < {padded})" if padded <= threads else loop):
        if padded <= threads:
            writer.line("const int i = threadIdx.x;")
        writer.lines("""
            const bool inside = i < MINE;
            const int o = split * MINE + (inside ? i : 0), at = kv_head * GROUP * HEAD_DIM + split * MINE + i;
            auto part = [&](int s) { return gathered[s * MINE + (inside ? i : 0)]; };
        """)
        writer.lines(_ADD_UP)
        _store(writer, quantized, size)


def _in_memory(writer: Writer, threads: int, quantized: bool, size: int) -> None:
    """A block's warps first; the last block of a head to come adds the blocks up."""
    writer.lines(f"""
        __syncthreads();
        {{
            const int used = (busy - split - 1) / SPLITS + 1;  // warps of this block
            const int block = kv_head * SPLITS + split;
            auto theirs = [&](int w) {{ return (const float*)(shared_memory + w * WARP_BYTES); }};
            for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += {threads}) {{
                auto top_of = [&](int w) {{ return ((const float2*)(theirs(w) + GROUP * HEAD_DIM))[i / HEAD_DIM]; }};
                float highest = -1e30f, weights = 0.0f, value = 0.0f;
                for (int w = 0; w < used; w++) highest = fmaxf(highest, top_of(w).x);
                for (int w = 0; w < used; w++) {{
                    const float share = exp2_fast(top_of(w).x - highest);
                    weights += share * top_of(w).y;
                    value += share * theirs(w)[i];
                }}
                parts[(u64)block * GROUP * HEAD_DIM + i] = value;
                if (i % HEAD_DIM == 0) part_tops[block * GROUP + i / HEAD_DIM] = make_float2(highest, weights);
            }}
        }}
        __shared__ u32 finished;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) finished = atomicAdd(arrived + kv_head, 1u);
        __syncthreads();
        const int count = busy < SPLITS ? busy : SPLITS;
        if (finished != (u32)count - 1) return;
        __threadfence();
        if (threadIdx.x == 0) arrived[kv_head] = 0u;
        constexpr int FIRST = 0, LAST = GROUP - 1, PARTS = (SPLITS + 3) / 4 * 4;
        float (*shares)[PARTS] = (float (*)[PARTS])shared_memory;  // [query head][block]
        float* weights_of_head = (float*)(shares + GROUP);
    """)
    writer.lines(_SHARES.format(top="fresh(part_tops + (kv_head * SPLITS + s) * GROUP + head)"))
    with writer.block(f"for (int i = threadIdx.x; i < (GROUP * HEAD_DIM + 31) / 32 * 32; i += {threads})"):
        writer.lines("""
            const bool inside = i < GROUP * HEAD_DIM;
            const int o = inside ? i : 0, at = kv_head * GROUP * HEAD_DIM + i;
            auto part = [&](int s) { return fresh(parts + ((u64)kv_head * SPLITS + s) * GROUP * HEAD_DIM + o); };
        """)
        writer.lines(_ADD_UP)
        _store(writer, quantized, size)


def _store(writer: Writer, quantized: bool, size: int) -> None:
    if quantized:
        writer.line(store_digits("y", "value", size, "inside"))
    else:
        writer.line("if (inside) y[at] = value;")
