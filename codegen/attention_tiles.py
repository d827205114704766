"""Attention's way through a warp's tiles: into its ring and through the tensor cores.

While a tile is used, those after it are on their way into the ring's stages, and what lies behind them is asked for in
L2, a few tiles a request. A stretch's first tiles were asked for there by the layer before: once a warp has sent its
part it names them, since the memory has nothing else to do while parts are added up and the output's product works.
Earlier such a request holds up the warps that are still reading (docs/performance.md, version 14).
"""

from __future__ import annotations

from .writer import Writer

UNROLLED = 4  # steps of a tile's keys in one stretch of code, by chains
TILES_AHEAD = 8  # of a warp's stretch, that are in the ring, in L2, or on their way there
TILES_A_REQUEST = 4

# A tile of keys or values into a stage.
FETCH = """
    auto fetch = [&](int stage, const u8* cache, int tile) {
        const u8* const from = cache + head_start + (u64)tile * Cache::BYTES;
        if (tile < last) fetch_tile<Cache>(ring + stage * Cache::BYTES, from, SEEN - tile * TILE, lane);
        end_of_copies();
    };
"""

FIRST_TILES = """
    #pragma unroll 1
    for (int i = 0; i < STAGES; i++) fetch(i, i & 1 ? v_cache : k_cache, first + i / 2);
"""

# Of this warp's tiles, those from `from` and before `to` into L2.
PREFETCH = """
    auto prefetch_tiles = [&](const u8* keys, const u8* values, int from, int to) {
        const int bytes = ((to < last ? to : last) - from) * Cache::BYTES;
        if (lane == 0 && bytes > 0) {
            prefetch(keys + head_start + (u64)from * Cache::BYTES, bytes);
            prefetch(values + head_start + (u64)from * Cache::BYTES, bytes);
        }
    };
"""

_LATER = f"""
    if ((tile - first) % {TILES_A_REQUEST} == 0)
        prefetch_tiles(k_cache, v_cache, tile + {TILES_AHEAD}, tile + {TILES_AHEAD + TILES_A_REQUEST});
"""
NEXT_LAYER = f"prefetch_tiles(next_k, next_v, first + (STAGES + 1) / 2, first + {TILES_AHEAD});"


def attend(writer: Writer, *, rotate: bool, ahead: bool) -> None:
    """The loop. rotate: the position's own rows are not in the cache yet; ahead: L2 takes requests (`PREFETCH`)."""
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
        int stage = 0;  // what comes next there: keys of a tile, then its values
        auto next_stage = [&] { stage = stage + 1 == STAGES ? 0 : stage + 1; };
    """)
    writer.line("#pragma unroll 1")
    with writer.block("for (int tile = first; tile < last; tile++)"):
        writer.lines("""
            wait_for_copies_but_last<STAGES - 1>();
            u8* const keys = ring + stage * Cache::BYTES;
        """)
        if rotate:
            writer.lines(_NEW_ROW.format(what="key"))
        writer.lines(_SCORES)
        writer.lines(_WEIGHTS)
        if rotate:
            writer.lines(_NEW_ROW.format(what="value"))
        writer.lines(_VALUES)
        if ahead:
            writer.lines(_LATER)


_SCORES = f"""
    constexpr int CHAINS = SETS == 1 ? 2 : 1;  // of sums, side by side
    float chains[SETS][CHAINS][4], scores[SETS][2];
    for_each<SETS>([&](auto set) {{
        for_each<CHAINS * 4>([&](auto i) {{ chains[set.index][i.index / 4][i.index % 4] = 0.0f; }});
    }});
    #pragma unroll {UNROLLED}
    for (int step = 0; step < STEPS; step += 2) {{
        uint4 query[SETS];  // of two steps
        for_each<SETS>([&](auto set) {{
            query[set.index] = *(const uint4*)(queries[set.index * 8 + g] + step * 16 + 8 * t);
        }});
        for_each<2>([&](auto second) {{
            if (STEPS % 2 && step + second.index == STEPS) return;
            u32 key[4];
            Cache::key(key, keys, step + second.index, lane);
            for_each<SETS>([&](auto set) {{
                const uint4& four = query[set.index];
                const u32 two[2] = {{second.index ? four.z : four.x, second.index ? four.w : four.y}};
                dot_halves(chains[set.index][second.index % CHAINS], key, two, lane);
            }});
        }});
    }}
    __syncwarp();
    fetch(stage, STAGES % 2 ? v_cache : k_cache, tile + STAGES / 2);
    next_stage();
"""

_WEIGHTS = """
    bool grows = false;  // a score beyond what its weight may be as a half, seen from the largest so far
    for_each<SETS>([&](auto set) {
        for_each<2>([&](auto half) {
            auto both = [&](int chain) {
                return chains[set.index][chain][2 * half.index] + chains[set.index][chain][2 * half.index + 1];
            };
            const float score = CHAINS == 1 ? both(0) : both(0) + both(CHAINS - 1);
            scores[set.index][half.index] = tile * TILE + g + 8 * half.index <= now ? score : -1e30f;
            grows = grows || scores[set.index][half.index] > top[set.index] + 7.0f;
        });
    });
    if (__any_sync(FULL_WARP, grows))
        for_each<SETS>([&](auto set) {
            float highest = fmaxf(top[set.index], rows_max(fmaxf(scores[set.index][0], scores[set.index][1])));
            float shrink = exp2_fast(top[set.index] - highest);
            top[set.index] = highest;
            total[set.index] *= shrink;
            for_each<STEPS>([&](auto step) {
                for_each<4>([&](auto i) { sum[set.index][step.index][i.index] *= shrink; });
            });
        });
    u32 weights[SETS][2];
    for_each<SETS>([&](auto set) {
        for_each<2>([&](auto half) {
            // 2^8 times too large, all alike: small weights then have a low half too, and the largest is 2^15.
            const float weight = exp2_fast(scores[set.index][half.index] - top[set.index] + 8.0f);
            total[set.index] += weight;
            weights[set.index][half.index] = transposed(both_halves(weight), lane);
        });
    });
    wait_for_copies_but_last<STAGES - 1>();
    u8* const values = ring + stage * Cache::BYTES;
"""

_VALUES = """
    for_each<STEPS>([&](auto step) {
        u32 value[4];
        Cache::value(value, values, step.index, lane);
        for_each<SETS>([&](auto set) {
            dot_halves(sum[set.index][step.index], value, weights[set.index], lane);
        });
    });
    __syncwarp();
    fetch(stage, STAGES % 2 ? k_cache : v_cache, tile + (STAGES + 1) / 2);
    next_stage();
"""

_NEW_ROW = """
    if (tile == tiles - 1) {{  // the new {what} is not in the cache yet
        Cache::set({what}s, now % TILE, new_{what}, lane);
        __syncwarp();
    }}
"""
