// Attention of one position over the KV cache: the ops `rope_attention` and `attention`.
//
// A *tile* is 16 positions of one key/value head, and belongs to one warp. A warp has a stretch of neighbouring tiles, so
// that a few large requests bring them into L2; stretches go round the head's blocks first and then round their warps, so
// that every SM has work early. All query heads of the group share each key and value read. Both products of a tile run on
// the tensor cores with float16 operands and float32 sums. Queries and softmax weights are cut in two halves each (`high +
// low`), which sit in columns that would be empty otherwise, so that nothing is lost beside the cache's own float16. How a
// tile becomes halves is the cache type's (cache.cuh). How many tiles there are depends on the position, read on the
// device, so that one captured graph serves every token.
//
// An instance says its sizes and what follows from them in a struct Shape, and with which structs it is put together: how
// queries come (`ReadyQueries`, `RotatedQueries`), how the parts that warps have found are added up (`CombineInCluster`,
// `CombineInMemory`), and what is asked for in L2 (`NoPrefetch`, `PrefetchNextLayer`).
#ifndef PSIGRAPH_ATTENTION_CUH
#define PSIGRAPH_ATTENTION_CUH

#include "cluster.cuh"
#include "quant.cuh"
#include "rows.cuh"

// The numbers of an instance, and those that follow from them. Facts on which code branches stand in the instance as well:
// tests compare the texts of instances without their numbers (tests/support/catalogue.py).
//   BLOCK_VALUES, BLOCK_HEADS   values of a key/value head's queries that a block finishes; heads they belong to, at most
//   COPIES, COPY_BYTES          of an i8x2 result
template <class S> struct AttentionShape : S {
    static constexpr int BLOCK_THREADS = 32 * S::WARPS, SLOTS = S::WARPS * S::SPLITS;  // warps of a key/value head
    static constexpr int VALUES = S::GROUP * S::HEAD_DIM;                              // of a key/value head's queries
    static constexpr int SETS = (S::GROUP + 3) / 4;  // of four query heads, of each its high and its low halves
    static constexpr int COLUMNS = SETS * 8;         // of the tensor cores' products
    static constexpr int STEPS = S::HEAD_DIM / 16;   // of those products
    static constexpr int QUERY = (S::HEAD_DIM + 31) / 64 * 64 + 32;  // whole 32 columns, rows in banks of their own
    static constexpr int SHARES = (SLOTS + 3) / 4 * 4;  // one a part, in whole fours
    static constexpr int TILES_AHEAD = 8;  // of a warp's stretch, that are in the ring, in L2, or on their way there
    static constexpr int TILES_A_REQUEST = 4;
    static_assert(S::SEVERAL_SETS == (SETS > 1) && S::LACKS_HEADS == (S::GROUP % 4 != 0), "facts about the group");
    static_assert(S::MORE_VALUES_THAN_THREADS == (S::BLOCK_VALUES > BLOCK_THREADS), "facts about a block's values");
    static_assert(S::ODD_STAGES == (S::STAGES % 2 == 1) && S::RAGGED_HEADS == (S::HEAD_DIM % 64 != 0), "facts about sizes");
};

// A warp's stretch of tiles, and its way into the warp's ring of stages. While a tile is used, those after it are on their
// way there, and what lies behind them is asked for in L2, a few tiles a request.

template <class SHAPE> struct Stretch {
    typedef AttentionShape<SHAPE> S;
    typedef typename S::Cache Cache;
    const int lane, warp, now, tiles, kv_head, split;
    const u64 head_start;  // of the key/value head, in the cache
    const int slot, busy;  // of SLOTS; warps that have tiles
    const int newest_split;  // the block that has the tile of the new position
    const int first, last;   // this warp's tiles: from `first`, before `last`
    u8 *const shared_memory, *const ring;
    const int first_head, last_head;  // in a cluster: query heads of which this block finishes values

    METHOD Stretch(const int* position, int context, u8* shared_memory)
        : lane(threadIdx.x & 31), warp(threadIdx.x >> 5), now(from_earlier_step(position)), tiles(now / Cache::POSITIONS + 1),
          kv_head(blockIdx.x / S::SPLITS), split(blockIdx.x % S::SPLITS), head_start(kv_head * Cache::head_bytes(context)),
          slot(warp * S::SPLITS + split), busy(min(tiles, S::SLOTS)), newest_split((busy - 1) % S::SPLITS),
          first(start(slot)), last(start(slot + 1)), shared_memory(shared_memory), ring(shared_memory + warp * S::WARP_BYTES),
          first_head(split * S::BLOCK_VALUES / S::HEAD_DIM), last_head(((split + 1) * S::BLOCK_VALUES - 1) / S::HEAD_DIM) {}
    // The first tile of a slot. The last slot never has one more than others.
    METHOD int start(int of) const {
        if (tiles < S::SLOTS) return of < tiles ? of : tiles;
        return (of * tiles + S::SLOTS - 1) / S::SLOTS;
    }
    METHOD u8* stage(int index) const { return ring + index * Cache::BYTES; }
    // A tile of keys or values into a stage; the positions below `seen` are in the cache.
    METHOD void fetch(int stage, const u8* cache, int tile, int seen) const {
        const u8* const from = cache + head_start + (u64)tile * Cache::BYTES;
        if (tile < last) fetch_tile<Cache>(ring + stage * Cache::BYTES, from, seen - tile * Cache::POSITIONS, lane);
        end_of_copies();
    }
    // Keys and values of the first tiles.
    METHOD void fill_ring(const u8* k_cache, const u8* v_cache, int seen) const {
        #pragma unroll 1
        for (int i = 0; i < S::STAGES; i++) fetch(i, i & 1 ? v_cache : k_cache, first + i / 2, seen);
    }
    // Of this warp's tiles, those from `from` and before `to` into L2.
    METHOD void prefetch_tiles(const u8* k_cache, const u8* v_cache, int from, int to) const {
        const int bytes = ((to < last ? to : last) - from) * Cache::BYTES;
        if (lane == 0 && bytes > 0) {
            prefetch(k_cache + head_start + (u64)from * Cache::BYTES, bytes);
            prefetch(v_cache + head_start + (u64)from * Cache::BYTES, bytes);
        }
    }
};

// A stretch's first tiles are asked for by the layer before: once a warp has sent its part it names them, since the memory
// has nothing else to do while parts are added up and the output's product works. Earlier such a request holds up the
// warps that are still reading (docs/performance-log.md, version 14).
struct PrefetchNextLayer {
    const u8 *next_k, *next_v;
    template <class S> METHOD void behind(const Stretch<S>& stretch, const u8* k_cache, const u8* v_cache, int tile) const {
        typedef AttentionShape<S> A;
        if ((tile - stretch.first) % A::TILES_A_REQUEST == 0)
            stretch.prefetch_tiles(k_cache, v_cache, tile + A::TILES_AHEAD, tile + A::TILES_AHEAD + A::TILES_A_REQUEST);
    }
    template <class S> METHOD void next_layer(const Stretch<S>& stretch) const {
        stretch.prefetch_tiles(next_k, next_v, stretch.first + (S::STAGES + 1) / 2, stretch.first + AttentionShape<S>::TILES_AHEAD);
    }
};
struct NoPrefetch {
    template <class S> METHOD void behind(const Stretch<S>&, const u8*, const u8*, int) const {}
    template <class S> METHOD void next_layer(const Stretch<S>&) const {}
};

// Queries: in shared memory, as the tensor cores take them.

// A block's static shared memory. A kernel has it itself, since g++ leaves the statics of templates out of the section in
// which the CPU target keeps shared memory; the compiler leaves out what an instance does not use.
#define ATTENTION_SHARED(SHAPE) \
    typedef AttentionShape<SHAPE> Sizes; \
    __shared__ __align__(16) u16 queries[Sizes::COLUMNS][Sizes::QUERY]; \
    __shared__ Sizes::Cache::Row new_key, new_value; \
    __shared__ float2 cos_sin[Sizes::HEAD_DIM / 2]; \
    __shared__ float norm_weights[2][Sizes::HEAD_DIM]; \
    __shared__ u64 all_sent; \
    __shared__ __align__(16) float shares[Sizes::BLOCK_HEADS][Sizes::SHARES], weights_of_head[Sizes::BLOCK_HEADS]; \
    __shared__ u32 finished; \
    const AttentionMemory<SHAPE> shared = {queries, new_key, new_value, cos_sin, norm_weights, all_sent, shares, weights_of_head, finished}
template <class SHAPE> struct AttentionMemory {
    typedef AttentionShape<SHAPE> S;
    u16 (&queries)[S::COLUMNS][S::QUERY];  // high and low halves of each head, as the tensor cores take them
    typename S::Cache::Row &new_key, &new_value;
    float2 (&cos_sin)[S::HEAD_DIM / 2];  // of this position
    float (&norm_weights)[2][S::HEAD_DIM];
    u64& all_sent;  // a barrier: parts from the cluster's blocks are here
    float (&shares)[S::BLOCK_HEADS][S::SHARES], (&weights_of_head)[S::BLOCK_HEADS];
    u32& finished;  // blocks of the key/value head, before this one

    METHOD void put_query(int head, int i, float value) const {
        u32 halves = both_halves(value);
        queries[2 * head][column_index(i)] = (u16)halves;
        queries[2 * head + 1][column_index(i)] = (u16)(halves >> 16);
    }
    // Heads that the last set lacks: their scores must not decide when the others' largest one is sought again.
    METHOD void clear_lacking_heads() const {
        if constexpr (S::LACKS_HEADS)
            for (int i = threadIdx.x; i < (S::COLUMNS - 2 * S::GROUP) * S::QUERY; i += S::BLOCK_THREADS)
                queries[2 * S::GROUP + i / S::QUERY][i % S::QUERY] = 0;
    }
};

// Op `attention`: queries are normed and rotated, the caches have the new position's rows.
struct ReadyQueries {
    const float* q;
    const u8 *k_cache, *v_cache;
    float scale;  // of scores, times log2(e)
    METHOD int seen(int now) const { return now + 1; }
    template <class S> METHOD void before_start(const Stretch<S>&) const {}
    template <class S> METHOD void before_wait(const AttentionMemory<S>&, int) const {}
    template <class S> METHOD void after_wait(const Stretch<S>& stretch, const AttentionMemory<S>& shared) const {
        typedef AttentionShape<S> A;
        stretch.fill_ring(k_cache, v_cache, seen(stretch.now));
        if (threadIdx.x >= A::BLOCK_THREADS) __builtin_unreachable();  // inlined code does not know launch bounds
        for (int i = threadIdx.x; i < A::VALUES; i += A::BLOCK_THREADS)
            shared.put_query(i / S::HEAD_DIM, i % S::HEAD_DIM, fresh(q + stretch.kv_head * A::VALUES + i) * scale);
    }
    template <class S, class ROW> METHOD void set_new_row(const Stretch<S>&, const ROW&, int, u8*) const {}
};

// Op `rope_attention`: q/k norm and RoPE, a warp a head. Every block works out the new rows, so that this code is near on
// every multiprocessor; the one that owns the new position writes them. Keys and values of earlier positions were written
// by earlier steps: their tiles need not wait.
struct RotatedQueries {
    const float *q, *k, *v, *q_norm, *k_norm;
    u8 *k_cache, *v_cache;
    const float2* rope;  // [context][HEAD_DIM / 2]: cosine, sine
    float eps, scale;    // of the norm; of scores, times log2(e)
    METHOD int seen(int now) const { return now; }
    template <class S> METHOD void before_start(const Stretch<S>& stretch) const { stretch.fill_ring(k_cache, v_cache, seen(stretch.now)); }
    template <class S> METHOD void before_wait(const AttentionMemory<S>& shared, int now) const {
        for (int i = threadIdx.x; i < S::HEAD_DIM; i += AttentionShape<S>::BLOCK_THREADS) {
            shared.norm_weights[0][i] = q_norm[i];
            shared.norm_weights[1][i] = k_norm[i];
            if (i < S::HEAD_DIM / 2) shared.cos_sin[i] = rope[(u64)now * (S::HEAD_DIM / 2) + i];
        }
        __syncthreads();
    }
    template <class S> METHOD void after_wait(const Stretch<S>& stretch, const AttentionMemory<S>& shared) const {
        typedef typename S::Cache Cache;
        const bool owns_now = stretch.newest_split == stretch.split;
        constexpr int KEY = S::GROUP, VALUE = S::GROUP + 1;  // behind the query heads
        #pragma unroll 1
        for (int head = stretch.warp; head <= VALUE; head += S::WARPS) {
            const float* source = (head == KEY ? k : v) + stretch.kv_head * S::HEAD_DIM;
            if (head < KEY) source = q + (stretch.kv_head * S::GROUP + head) * S::HEAD_DIM;
            HeadPairs<S::HEAD_DIM> pairs(OneRow{}, source, stretch.lane);
            const float factor = pairs.norm_factor(eps);
            pairs.for_each_pair(stretch.lane, [&](int i, float a, float b) {
                if (head <= KEY) rotate_pair<S::HEAD_DIM>(a, b, i, factor, shared.norm_weights[head == KEY], shared.cos_sin[i]);
                if (head < KEY) {
                    shared.put_query(head, i, a * scale);
                    shared.put_query(head, S::HEAD_DIM / 2 + i, b * scale);
                } else {
                    typename Cache::Row& row = head == KEY ? shared.new_key : shared.new_value;
                    Cache::put(row, i, a);
                    Cache::put(row, S::HEAD_DIM / 2 + i, b);
                }
            });
            if (head >= KEY) {
                typename Cache::Row& row = head == KEY ? shared.new_key : shared.new_value;
                Cache::finish(row, stretch.lane);
                if (owns_now) Cache::store((head == KEY ? k_cache : v_cache) + stretch.head_start, stretch.now, row, stretch.lane);
            }
        }
    }
    // The new position's row, of keys or of values, which its tile in the ring lacks.
    template <class S, class ROW> METHOD void set_new_row(const Stretch<S>& stretch, const ROW& row, int tile, u8* rows) const {
        if (tile == stretch.tiles - 1) {
            S::Cache::set(rows, stretch.now % S::Cache::POSITIONS, row, stretch.lane);
            __syncwarp();
        }
    }
};

// A warp's products with its tiles, and what they add up to: a running softmax (Milakov and Gimelshein 2018), of each query
// head the largest score so far, `top`, the weights' `total`, and the `sum` of weighted values.
// Columns of the products: of each query head its high and its low half, four heads a set.
// Lane (g, t) = (lane / 4, lane % 4) owns positions g and g + 8 of a tile, and head t of each set.

template <class SHAPE> struct TileProducts {
    typedef AttentionShape<SHAPE> S;
    typedef typename S::Cache Cache;
    static constexpr int SETS = S::SETS, STEPS = S::STEPS;
    static constexpr int CHAINS = S::SEVERAL_SETS ? 1 : 2;  // of a score's sums, side by side
    typedef float PerHead[SETS], Sums[SETS][STEPS][4];
    const int lane, g, t;

    METHOD TileProducts(int lane) : lane(lane), g(lane >> 2), t(lane & 3) {}
    METHOD void clear(PerHead& top, PerHead& total, Sums& sum) const {
        for_each<SETS>([&](auto set) {
            for_each<STEPS>([&](auto step) {
                for_each<4>([&](auto i) { sum[set.index][step.index][i.index] = 0.0f; });
            });
            top[set.index] = -1e30f;
            total[set.index] = 0.0f;
        });
    }
    // chains: queries times a tile of keys.
    METHOD void multiply_keys(float (&chains)[SETS][CHAINS][4], const u16 (&queries)[S::COLUMNS][S::QUERY], const u8* keys) const {
        for_each<SETS>([&](auto set) {
            for_each<CHAINS * 4>([&](auto i) { chains[set.index][i.index / 4][i.index % 4] = 0.0f; });
        });
        #pragma unroll 4  // stretches of code without a branch
        for (int step = 0; step < STEPS; step += 2) {
            uint4 query[SETS];  // of two steps
            for_each<SETS>([&](auto set) { query[set.index] = *(const uint4*)(queries[set.index * 8 + g] + step * 16 + 8 * t); });
            for_each<2>([&](auto second) {
                if (STEPS % 2 && step + second.index == STEPS) return;
                u32 key[4];
                Cache::key(key, keys, step + second.index, lane);
                for_each<SETS>([&](auto set) {
                    const uint4& four = query[set.index];
                    const u32 two[2] = {second.index ? four.z : four.x, second.index ? four.w : four.y};
                    dot_halves(chains[set.index][second.index % CHAINS], key, two, lane);
                });
            });
        }
    }
    // weights: of the softmax, for a tile's positions; those behind `now` count nothing.
    // (`tile` is a reference: with a copy of it NVRTC chooses other loop counters.)
    METHOD void weigh(u32 (&weights)[SETS][2], PerHead& top, PerHead& total, Sums& sum, const float (&chains)[SETS][CHAINS][4], const int& tile,
                      int now) const {
        float scores[SETS][2];
        bool grows = false;  // a score beyond what its weight may be as a half, seen from the largest so far
        for_each<SETS>([&](auto set) {
            for_each<2>([&](auto half) {
                auto both = [&](int chain) {
                    return chains[set.index][chain][2 * half.index] + chains[set.index][chain][2 * half.index + 1];
                };
                const float score = CHAINS == 1 ? both(0) : both(0) + both(CHAINS - 1);
                scores[set.index][half.index] = tile * Cache::POSITIONS + g + 8 * half.index <= now ? score : -1e30f;
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
        for_each<SETS>([&](auto set) {
            for_each<2>([&](auto half) {
                // 2^8 times too large, all alike: small weights then have a low half too, and the largest is 2^15.
                const float weight = exp2_fast(scores[set.index][half.index] - top[set.index] + 8.0f);
                total[set.index] += weight;
                weights[set.index][half.index] = transposed(both_halves(weight), lane);
            });
        });
    }
    METHOD void add_values(Sums& sum, const u32 (&weights)[SETS][2], const u8* values) const {
        for_each<STEPS>([&](auto step) {
            u32 value[4];
            Cache::value(value, values, step.index, lane);
            for_each<SETS>([&](auto set) { dot_halves(sum[set.index][step.index], value, weights[set.index], lane); });
        });
    }
    // The warp's part: weighted values to outbox[query head][HEAD_DIM], and for each head that is this lane's
    // leave_top(head, g, its maximum and sum of weights).
    template <class LEAVE>
    METHOD void leave(float* outbox, const PerHead& top, const PerHead& total, const Sums& sum, LEAVE&& leave_top) const {
        for_each<SETS>([&](auto set) {
            const int head = set.index * 4 + t;
            const float2 mine = make_float2(top[set.index], rows_sum(total[set.index]));
            if (head < S::GROUP) {
                for_each<STEPS>([&](auto step) {
                    const float* pairs = sum[set.index][step.index];
                    const int o = head * S::HEAD_DIM + step.index * 16 + g;
                    outbox[o] = pairs[0] + pairs[1];
                    outbox[o + 8] = pairs[2] + pairs[3];
                });
                leave_top(head, g, mine);
            }
        });
    }
};

// A warp's way through its tiles.
template <class S, class QUERIES, class PREFETCH, class HEADS, class SUMS>
DEVICE void attend(const TileProducts<S>& products, HEADS& top, HEADS& total, SUMS& sum, const Stretch<S>& stretch, const QUERIES& operands,
                   const PREFETCH& prefetch, const AttentionMemory<S>& shared) {
    const u8 *const k_cache = operands.k_cache, *const v_cache = operands.v_cache;
    const int seen = operands.seen(stretch.now);
    int stage = 0;  // what comes next there: keys of a tile, then its values
    auto next_stage = [&] { stage = stage + 1 == S::STAGES ? 0 : stage + 1; };
    #pragma unroll 1
    for (int tile = stretch.first; tile < stretch.last; tile++) {
        wait_for_copies_but_last<S::STAGES - 1>();
        u8* const keys = stretch.stage(stage);
        operands.set_new_row(stretch, shared.new_key, tile, keys);
        float chains[TileProducts<S>::SETS][TileProducts<S>::CHAINS][4];
        products.multiply_keys(chains, shared.queries, keys);
        __syncwarp();
        stretch.fetch(stage, S::ODD_STAGES ? v_cache : k_cache, tile + S::STAGES / 2, seen);
        next_stage();

        u32 weights[TileProducts<S>::SETS][2];
        products.weigh(weights, top, total, sum, chains, tile, stretch.now);
        wait_for_copies_but_last<S::STAGES - 1>();
        u8* const values = stretch.stage(stage);
        operands.set_new_row(stretch, shared.new_value, tile, values);
        products.add_values(sum, weights, values);
        __syncwarp();
        stretch.fetch(stage, S::ODD_STAGES ? k_cache : v_cache, tile + (S::STAGES + 1) / 2, seen);
        next_stage();
        prefetch.behind(stretch, k_cache, v_cache, tile);
    }
}

// Combining: parts are added up as in FlashDecoding, in a fixed order.

// What each of `count` parts counts for in the softmax over all of them, of query heads first_head to last_head.
// top(part, head): its maximum and sum of weights.
template <int WARPS, int PARTS, class TOP>
DEVICE void find_shares(float (*shares)[PARTS], float* weights_of_head, int first_head, int last_head, int count, int warp, int lane, TOP&& top) {
    #pragma unroll 1
    for (int head = first_head + warp; head <= last_head; head += WARPS) {
        float highest = -1e30f, weights = 0.0f;
        for (int s = lane; s < count; s += 32) highest = fmaxf(highest, top(s, head).x);
        highest = warp_max(highest);
        for (int s = lane; s < PARTS; s += 32) {
            const float2 theirs = s < count ? top(s, head) : make_float2(highest, 0.0f);
            const float share = s < count ? exp2_fast(theirs.x - highest) : 0.0f;
            shares[head - first_head][s] = share;
            weights += share * theirs.y;
        }
        weights = lanes_sum(weights, 32);
        if (lane == 0) weights_of_head[head - first_head] = weights;
    }
    __syncthreads();
}

// One value of a head from all parts of it. shares: whole fours, zeros behind the last part.
template <class VALUE> DEVICE float add_parts(const float* shares, const float& weights, int count, VALUE&& part) {
    float value = 0.0f, odd = 0.0f;
    #pragma unroll 2
    for (int s = 0; s < count; s += 4) {
        const float4 share = *(const float4*)(shares + s);
        value += share.x * part(s);
        odd += share.y * (s + 1 < count ? part(s + 1) : 0.0f);
        value += share.z * (s + 2 < count ? part(s + 2) : 0.0f);
        odd += share.w * (s + 3 < count ? part(s + 3) : 0.0f);
    }
    return divide(value + odd, weights);
}

// Values of the result, where `inside` holds, by whole warps.
template <class S> DEVICE void store(float* y, int index, float value, bool inside) {
    static_assert(!S::QUANTIZED, "float32");
    if (inside) y[index] = value;
}
template <class S> DEVICE void store(u8* y, int index, float value, bool inside) {
    static_assert(S::QUANTIZED, "i8x2");
    store_activations<S::COPIES, S::COPY_BYTES>(y, index, value, inside);
}

// Each warp sends its part into the shared memory of the cluster's blocks, each of which finishes BLOCK_VALUES of the
// head's values, which belong to BLOCK_HEADS query heads at most.
struct CombineInCluster {
    static constexpr bool ALL_BLOCKS_FINISH = true;
    template <class S> METHOD void before_wait(const Stretch<S>& stretch, const AttentionMemory<S>& shared) const {
        static_assert(S::BLOCK_VALUES * S::SPLITS == AttentionShape<S>::VALUES, "blocks finish all values");
        const int heads = stretch.last_head - stretch.first_head + 1;
        if (threadIdx.x == 0) expect_bytes(&shared.all_sent, stretch.busy * (S::BLOCK_VALUES * 4 + heads * 8));
        cluster_barrier();  // all blocks have started: their shared memory may be written
    }
};
template <class S, class PREFETCH, class LEAVE, class Y>
DEVICE void combine(const CombineInCluster&, const Stretch<S>& stretch, const AttentionMemory<S>& shared, const PREFETCH& prefetch, LEAVE&& leave,
                    Y* y) {
    typedef AttentionShape<S> A;
    constexpr int BLOCK_VALUES = S::BLOCK_VALUES, BLOCK_HEADS = S::BLOCK_HEADS, HEAD_DIM = S::HEAD_DIM;
    const int lane = stretch.lane, slot = stretch.slot;
    // Behind the rings: values received [slot][BLOCK_VALUES]; [slot][head - first head] maximum, sum of weights.
    float* const received = (float*)(stretch.shared_memory + S::WARPS * S::WARP_BYTES);
    float2* const tops = (float2*)(received + A::SLOTS * BLOCK_VALUES);
    float* const outbox = (float*)(stretch.shared_memory + stretch.warp * S::WARP_BYTES);  // where this warp's tiles were
    if (slot < stretch.busy) {
        leave(outbox, [&](int head, int g, float2 mine) {
            for (int b = head * HEAD_DIM / BLOCK_VALUES + g; b <= ((head + 1) * HEAD_DIM - 1) / BLOCK_VALUES; b += 8)
                send_to_block(tops + slot * BLOCK_HEADS + head - b * BLOCK_VALUES / HEAD_DIM, b, mine, &shared.all_sent);
        });
    }
    if (slot < stretch.busy) {
        __syncwarp();
        for (int o = 4 * lane; o < A::VALUES; o += 128)
            send_to_block((float4*)(received + slot * BLOCK_VALUES + o % BLOCK_VALUES), o / BLOCK_VALUES, *(const float4*)(outbox + o),
                          &shared.all_sent);
    }
    prefetch.next_layer(stretch);
    wait_for_bytes(&shared.all_sent);
    const int count = stretch.busy, first = stretch.first_head;
    find_shares<S::WARPS>(shared.shares, shared.weights_of_head, first, stretch.last_head, count, stretch.warp, lane,
                          [&](int s, int head) { return tops[s * BLOCK_HEADS + head - first]; });
    auto finish = [&](int i) {
        const bool inside = i < BLOCK_VALUES;
        const int o = stretch.split * BLOCK_VALUES + (inside ? i : 0), index = stretch.kv_head * A::VALUES + stretch.split * BLOCK_VALUES + i;
        const int head = o / HEAD_DIM - first;
        auto part = [&](int s) { return received[s * BLOCK_VALUES + (inside ? i : 0)]; };
        const float value = add_parts(shared.shares[head], shared.weights_of_head[head], count, part);
        store<S>(y, index, value, inside);
    };
    constexpr int WHOLE_WARPS = (BLOCK_VALUES + 31) / 32 * 32;
    if constexpr (S::MORE_VALUES_THAN_THREADS) {
        for (int i = threadIdx.x; i < WHOLE_WARPS; i += A::BLOCK_THREADS) finish(i);
    } else if (threadIdx.x < WHOLE_WARPS) finish(threadIdx.x);
}

// Each block adds its warps up, and the last block of a head to come adds the blocks up.
struct CombineInMemory {
    static constexpr bool ALL_BLOCKS_FINISH = false;
    float* parts;       // [key/value head][block][query head][HEAD_DIM]
    float2* part_tops;  // [key/value head][block][query head]: maximum, sum of weights
    u32* arrived;       // [key/value head]: blocks that have come; zero before and after
    template <class S> METHOD void before_wait(const Stretch<S>&, const AttentionMemory<S>&) const {}
};
template <class S, class PREFETCH, class LEAVE, class Y>
DEVICE void combine(const CombineInMemory& memory, const Stretch<S>& stretch, const AttentionMemory<S>& shared, const PREFETCH&, LEAVE&& leave, Y* y) {
    typedef AttentionShape<S> A;
    constexpr int GROUP = S::GROUP, HEAD_DIM = S::HEAD_DIM, PARTS = (S::SPLITS + 3) / 4 * 4;
    const int kv_head = stretch.kv_head, block = kv_head * S::SPLITS + stretch.split;
    // Where its tiles were, a warp leaves values [query head][HEAD_DIM], then [query head] maximum, sum of weights.
    auto values_of = [&](int w) { return (float*)(stretch.shared_memory + w * S::WARP_BYTES); };
    if (stretch.slot < stretch.busy) {
        leave(values_of(stretch.warp), [&](int head, int g, float2 mine) {
            if (g == 0) ((float2*)(values_of(stretch.warp) + A::VALUES))[head] = mine;
        });
    }
    __syncthreads();
    const int used = (stretch.busy - stretch.split - 1) / S::SPLITS + 1;  // warps of this block
    for (int i = threadIdx.x; i < A::VALUES; i += A::BLOCK_THREADS) {
        auto top_of = [&](int w) { return ((const float2*)(values_of(w) + A::VALUES))[i / HEAD_DIM]; };
        float highest = -1e30f, weights = 0.0f, value = 0.0f;
        for (int w = 0; w < used; w++) highest = fmaxf(highest, top_of(w).x);
        for (int w = 0; w < used; w++) {
            const float share = exp2_fast(top_of(w).x - highest);
            weights += share * top_of(w).y;
            value += share * values_of(w)[i];
        }
        memory.parts[(u64)block * A::VALUES + i] = value;
        if (i % HEAD_DIM == 0) memory.part_tops[block * GROUP + i / HEAD_DIM] = make_float2(highest, weights);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) shared.finished = atomicAdd(memory.arrived + kv_head, 1u);
    __syncthreads();
    const int count = stretch.busy < S::SPLITS ? stretch.busy : S::SPLITS;
    if (shared.finished != (u32)count - 1) return;
    __threadfence();
    if (threadIdx.x == 0) memory.arrived[kv_head] = 0u;
    float(*shares)[PARTS] = (float(*)[PARTS])stretch.shared_memory;  // [query head][block]
    float* weights_of_head = (float*)(shares + GROUP);
    find_shares<S::WARPS>(shares, weights_of_head, 0, GROUP - 1, count, stretch.warp, stretch.lane,
                          [&](int s, int head) { return fresh(memory.part_tops + (kv_head * S::SPLITS + s) * GROUP + head); });
    for (int i = threadIdx.x; i < (A::VALUES + 31) / 32 * 32; i += A::BLOCK_THREADS) {
        const bool inside = i < A::VALUES;
        const int o = inside ? i : 0, index = kv_head * A::VALUES + i, head = o / HEAD_DIM;
        auto part = [&](int s) { return fresh(memory.parts + ((u64)kv_head * S::SPLITS + s) * A::VALUES + o); };
        const float value = add_parts(shares[head], weights_of_head[head], count, part);
        store<S>(y, index, value, inside);
    }
}

// The kernel.
template <class S, class QUERIES, class COMBINE, class PREFETCH, class Y>
DEVICE void attention_kernel(const AttentionMemory<S>& shared, const QUERIES& operands, const COMBINE& way, const PREFETCH& prefetch,
                             const int* position, Y* y, int context, const Stamps& stamps) {
    DYNAMIC_SHARED(shared_memory);
    const Stretch<S> stretch(position, context, shared_memory);

    operands.before_start(stretch);
    let_next_kernel_start();
    shared.clear_lacking_heads();
    operands.before_wait(shared, stretch.now);
    way.before_wait(stretch, shared);
    wait_for_previous_kernel(stamps);
    if (!COMBINE::ALL_BLOCKS_FINISH && stretch.split >= stretch.tiles) return;
    operands.after_wait(stretch, shared);
    __syncthreads();
    const TileProducts<S> products(stretch.lane);
    typename TileProducts<S>::PerHead top, total;  // no members: as such, NVRTC gives them other registers
    typename TileProducts<S>::Sums sum;
    products.clear(top, total, sum);
    attend(products, top, total, sum, stretch, operands, prefetch, shared);
    combine(way, stretch, shared, prefetch, [&](float* outbox, auto&& leave_top) { products.leave(outbox, top, total, sum, leave_top); }, y);
}

#endif
