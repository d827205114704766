// Small kernels over any number of rows: embedding, norms, elementwise ops, rotation, cache append, token choice.
//
// A row is a token. SHAPE::THREADS are a block's threads; BLOCKS the blocks of a row, or of all rows, as each says.
// Kernels have the names of their ops; the templates that they call end in `_kernel`.
#ifndef PSIGRAPH_ROWS_CUH
#define PSIGRAPH_ROWS_CUH

#include "cache.cuh"
#include "functions.cuh"
#include "quant.cuh"

// == Which rows there are, what they read, and where results go

// The row of a decode step. It reads what kernels of the same step wrote.
struct OneRow {
    METHOD void begin(const Stamps& stamps) const {
        let_next_kernel_start();
        wait_for_previous_kernel(stamps);
    }
    METHOD bool has(int) const { return true; }
    template <class T> METHOD T load(const T* p) const { return fresh(p); }
    METHOD int position(const int* positions, int) const { return from_earlier_step(positions); }
};
// The first `*count` of many. Their kernels are launched one behind the other: a wait on nothing made an elementwise kernel
// of 12,288 blocks take 15.5 us instead of 9.2 (docs/performance-log.md, version 15).
struct ManyRows {
    const int* count;
    METHOD void begin(const Stamps& stamps) const { stamps.released(); }
    METHOD bool has(int row) const { return row < *count; }
    template <class T> METHOD T load(const T* p) const { return *p; }
    METHOD int position(const int* positions, int row) const { return positions[row]; }
};

// An operand, whose row t begins at OFFSET + t * STRIDE. A vector that all rows share has STRIDE 0.
template <int STRIDE, int OFFSET> struct Operand {
    const float* from;
    METHOD const float* row(int row) const { return from + (u64)row * STRIDE + OFFSET; }
    template <class ROWS> METHOD float at(const ROWS& rows, int row, int i) const { return rows.load(this->row(row) + i); }
};

// A result: value `at` of a row goes there where it is inside the row.
template <int STRIDE> struct FloatRows {
    float* to;
    METHOD void store(int row, int at, float value, bool inside) const {
        if (inside) to[(u64)row * STRIDE + at] = value;
    }
};
// Halves, stored times 2^-UP.
template <int STRIDE, int UP> struct HalfRows {
    u16* to;
    METHOD void store(int row, int at, float value, bool inside) const {
        if (inside) to[(u64)row * STRIDE + at] = float_to_half(value * (1.0f / (1 << UP)));
    }
};
// The same, and of some of the rows the largest magnitude goes to largest[slot], as a float's bits: `tell`.
template <int STRIDE, int UP> struct SampledHalfRows : HalfRows<STRIDE, UP> {
    u32* largest;
    int slot;
    METHOD SampledHalfRows(u16* to, u32* largest_, int slot_) : HalfRows<STRIDE, UP>{to}, largest(largest_), slot(slot_) {}
    // All lanes of a warp give theirs.
    METHOD void tell(float magnitude) const {
        magnitude = warp_max(magnitude);
        if ((threadIdx.x & 31) == 0 && magnitude > 0.0f) atomicMax(largest + slot, float_to_bits(magnitude));
    }
};
template <class OUT> constexpr bool IS_SAMPLED = false;
template <int STRIDE, int UP> constexpr bool IS_SAMPLED<SampledHalfRows<STRIDE, UP>> = true;
// Halves of a norm: *beyond becomes 1 where one is infinite or none, here or in what was added up before the norm.
template <int STRIDE> struct WatchedHalfRows {
    u16* to;
    u32* beyond;
    METHOD void store(int row, int at, float value, bool inside) const {
        if (!inside) return;
        to[(u64)row * STRIDE + at] = float_to_half(value);
        if ((float_to_bits(value) & 0x7fffffffu) >= float_to_bits(65520.0f)) atomicExch(beyond, 1u);
    }
};
// The activation block of one row: whole warps store it.
template <int COPIES, int COPY_BYTES> struct ActivationRow {
    u8* to;
    METHOD void store(int, int at, float value, bool inside) const { store_activations<COPIES, COPY_BYTES>(to, at, value, inside); }
};

// The sum of `value` over a block's threads, known to all of them.
template <int THREADS> DEVICE float block_sum(float value) {
    __shared__ float warp_sums[THREADS / 32];
    value = lanes_sum(value, 32);
    if ((threadIdx.x & 31) == 0) warp_sums[threadIdx.x >> 5] = value;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < THREADS / 32; w++) sum += warp_sums[w];
    return sum;
}

// A head's columns i and i + HEAD_DIM / 2, which RoPE rotates together, in the registers of a warp.
template <int HEAD_DIM> struct HeadPairs {
    static constexpr int PAIRS = (HEAD_DIM + 63) / 64;  // of a lane
    float low[PAIRS], high[PAIRS], squares = 0.0f;

    template <class ROWS> METHOD HeadPairs(const ROWS& rows, const float* source, int lane) {
        for_each<PAIRS>([&](auto u) {
            int i = u.index * 32 + lane;
            bool inside = i < HEAD_DIM / 2;
            low[u.index] = inside ? rows.load(source + i) : 0.0f;
            high[u.index] = inside ? rows.load(source + HEAD_DIM / 2 + i) : 0.0f;
            squares += low[u.index] * low[u.index] + high[u.index] * high[u.index];
        });
    }
    // By which the RMS norm multiplies.
    METHOD float norm_factor(float eps) const { return rsqrtf(lanes_sum(squares, 32) * (1.0f / HEAD_DIM) + eps); }
    // body(i, low, high) for each pair of this lane.
    template <class BODY> METHOD void for_each_pair(int lane, BODY&& body) const {
        for_each<PAIRS>([&](auto u) {
            int i = u.index * 32 + lane;
            if (i < HEAD_DIM / 2) body(i, low[u.index], high[u.index]);
        });
    }
};

// Norm and rotation of pair i of a head.
template <int HEAD_DIM> DEVICE void rotate_pair(float& a, float& b, int i, float factor, const float* norm_weights, const float2& cos_sin) {
    float x = a * factor * norm_weights[i], y = b * factor * norm_weights[HEAD_DIM / 2 + i];
    a = x * cos_sin.x - y * cos_sin.y;
    b = y * cos_sin.x + x * cos_sin.y;
}

// == Kernels

// What happens to a column of an embedded row: nothing more, or the two halves of a deferred norm.
struct NoNorm {
    template <class SHAPE> METHOD void finish(int, int, float) const {}
};
template <class OUT> struct DeferredNorm {
    const float* norm_weight;
    OUT scaled;
    float* squares;  // [block of the row]
    template <class SHAPE> METHOD void finish(int row, int at, float value) const {
        float weighted = at < SHAPE::COLUMNS ? value * norm_weight[at] : 0.0f;
        scaled.store(row, at, weighted, at < SHAPE::WHOLE_GROUPS);
        const float sum = block_sum<SHAPE::THREADS>(value * value);
        if (threadIdx.x == 0) squares[blockIdx.x] = sum;
    }
};

// One thread a column, BLOCKS blocks a row.
template <class SHAPE, class TYPE, class ROWS, class NORM>
DEVICE void embed_kernel(const u8* table, const int* tokens, float* x, const ROWS& rows, const NORM& norm, const Stamps& stamps) {
    rows.begin(stamps);
    const int row = SHAPE::ROWS == 1 ? 0 : blockIdx.x / SHAPE::BLOCKS;
    if (!rows.has(row)) return;
    const int block = SHAPE::ROWS == 1 ? blockIdx.x : blockIdx.x % SHAPE::BLOCKS;
    const int given = rows.load(tokens + row), token = given < 0 ? 0 : given, at = block * SHAPE::THREADS + threadIdx.x;
    float value = 0.0f;
    if (at < SHAPE::COLUMNS) {
        const u8* superblock = table + ((u64)(token >> 4) * SHAPE::SUPERBLOCKS + (at >> 8)) * TYPE::BYTES;
        value = TYPE::element(superblock, token & 15, at & 255);
        x[(u64)row * SHAPE::COLUMNS + at] = value;
    }
    norm.template finish<SHAPE>(row, at, value);
}

// Over the last axis, which has WIDTH values, HEADS times a row: a block each.
template <class SHAPE, class OPERAND, class ROWS, class OUT>
DEVICE void rms_norm_kernel(const OPERAND& x, const float* weight, const OUT& out, float eps, const ROWS& rows, const Stamps& stamps) {
    rows.begin(stamps);
    const int row = blockIdx.x / SHAPE::HEADS, first = blockIdx.x % SHAPE::HEADS * SHAPE::WIDTH;
    if (!rows.has(row)) return;
    float square = 0.0f;
    for (int i = threadIdx.x; i < SHAPE::WIDTH; i += SHAPE::THREADS) {
        float value = x.at(rows, row, first + i);
        square += value * value;
    }
    const float squares = block_sum<SHAPE::THREADS>(square);
    const float factor = rsqrtf(squares * (1.0f / SHAPE::WIDTH) + eps);
    for (int base = 0; base < SHAPE::WIDTH; base += SHAPE::THREADS) {
        const int i = base + threadIdx.x;
        const float value = i < SHAPE::WIDTH ? x.at(rows, row, first + i) * factor * weight[i] : 0.0f;
        out.store(row, first + i, value, i < SHAPE::WHOLE_GROUPS);
    }
}

// The sum of squares of one row, by one block; each reader finishes the factor.
template <class SHAPE> DEVICE void rms_factor_kernel(const float* x, float* squares, const Stamps& stamps) {
    let_next_kernel_start();
    wait_for_previous_kernel(stamps);
    float square = 0.0f;
    for (int i = threadIdx.x; i < SHAPE::COLUMNS; i += SHAPE::THREADS) {
        float value = fresh(x + i);
        square += value * value;
    }
    const float sum = block_sum<SHAPE::THREADS>(square);
    if (threadIdx.x == 0) squares[0] = sum;
}

// One thread a value, BLOCKS blocks a row.
template <class SHAPE, class FUNCTION, class OUT, class ROWS, class... OPERANDS>
DEVICE void elementwise(const FUNCTION& function, const OUT& out, const ROWS& rows, const Stamps& stamps, const OPERANDS&... operands) {
    rows.begin(stamps);
    const int row = blockIdx.x / SHAPE::BLOCKS, at = blockIdx.x % SHAPE::BLOCKS * SHAPE::THREADS + threadIdx.x;
    if (!rows.has(row)) return;
    const float value = at < SHAPE::COLUMNS ? function(operands.at(rows, row, at)...) : 0.0f;
    out.store(row, at, value, at < SHAPE::WHOLE_GROUPS);
    if constexpr (IS_SAMPLED<OUT>)
        if (row % 8 == 0 && blockIdx.x % SHAPE::BLOCKS == 0) out.tell(fabsf(value));
}

// One thread a pair of a head, over all rows.
template <class SHAPE, class OPERAND, class ROWS, class OUT>
DEVICE void rope_kernel(const OPERAND& x, const int* positions, const float2* table, const OUT& out, const ROWS& rows, const Stamps& stamps) {
    rows.begin(stamps);
    constexpr int HALF = SHAPE::HEAD_DIM / 2;
    const int pair = blockIdx.x * SHAPE::THREADS + threadIdx.x, row = pair / (SHAPE::HEADS * HALF);
    if (row >= SHAPE::ROWS || !rows.has(row)) return;
    const int i = pair % HALF, at = pair / HALF % SHAPE::HEADS * SHAPE::HEAD_DIM + i;
    const float2 cos_sin = table[(u64)rows.position(positions, row) * HALF + i];
    const float a = x.at(rows, row, at), b = x.at(rows, row, at + HALF);
    out.store(row, at, a * cos_sin.x - b * cos_sin.y, true);
    out.store(row, at + HALF, b * cos_sin.x + a * cos_sin.y, true);
}

// A warp a row and head.
template <class SHAPE, class CACHE, class OPERAND, class ROWS>
DEVICE void cache_append_kernel(u8* cache, const OPERAND& x, const int* positions, int context, const ROWS& rows, const Stamps& stamps) {
    rows.begin(stamps);
    __shared__ typename CACHE::Row held[SHAPE::THREADS / 32];
    const int lane = threadIdx.x & 31, which = (blockIdx.x * SHAPE::THREADS + threadIdx.x) / 32;
    const int row = which / SHAPE::HEADS, head = which % SHAPE::HEADS;
    if (row >= SHAPE::ROWS || !rows.has(row)) return;
    typename CACHE::Row& mine = held[threadIdx.x / 32];
    for (int i = lane; i < SHAPE::HEAD_DIM; i += 32) CACHE::put(mine, i, x.at(rows, row, head * SHAPE::HEAD_DIM + i));
    CACHE::finish(mine, lane);
    CACHE::store(cache + head * CACHE::head_bytes(context), rows.position(positions, row), mine, lane);
}

// Queries and keys normalised per head and rotated, new keys and values into their caches: a warp a row and head, heads
// of q first, then of k, then of v.
template <class SHAPE, class CACHE, class Q, class K, class V, class ROWS, class OUT>
DEVICE void rope_append_kernel(const Q& q, const K& k, const V& v, const float* q_norm, const float* k_norm, u8* k_cache, u8* v_cache,
                               const float2* table, const int* positions, const OUT& rotated, int context, float eps, const ROWS& rows,
                               const Stamps& stamps) {
    rows.begin(stamps);
    constexpr int KEYS = SHAPE::HEADS, VALUES = KEYS + SHAPE::KV_HEADS, ALL = VALUES + SHAPE::KV_HEADS, HEAD_DIM = SHAPE::HEAD_DIM;
    const int lane = threadIdx.x & 31, which = blockIdx.x * (SHAPE::THREADS / 32) + (threadIdx.x >> 5);
    const int row = which / ALL, head = which % ALL;
    if (row >= SHAPE::ROWS || !rows.has(row)) return;
    const int position = rows.position(positions, row), own = head < KEYS ? head : (head - KEYS) % SHAPE::KV_HEADS;
    const float* source = head < KEYS ? q.row(row) : head < VALUES ? k.row(row) : v.row(row);
    const HeadPairs<HEAD_DIM> pairs(rows, source + own * HEAD_DIM, lane);
    const float factor = pairs.norm_factor(eps);
    const float* weights = head < KEYS ? q_norm : k_norm;
    __shared__ typename CACHE::Row new_rows[SHAPE::THREADS / 32];
    typename CACHE::Row& new_row = new_rows[threadIdx.x >> 5];
    pairs.for_each_pair(lane, [&](int i, float a, float b) {
        if (head < VALUES) rotate_pair<HEAD_DIM>(a, b, i, factor, weights, table[(u64)position * (HEAD_DIM / 2) + i]);
        if (head < KEYS) {
            rotated.store(row, head * HEAD_DIM + i, a, true);
            rotated.store(row, head * HEAD_DIM + HEAD_DIM / 2 + i, b, true);
        } else {
            CACHE::put(new_row, i, a);
            CACHE::put(new_row, HEAD_DIM / 2 + i, b);
        }
    });
    if (head < KEYS) return;
    CACHE::finish(new_row, lane);
    CACHE::store((head < VALUES ? k_cache : v_cache) + own * CACHE::head_bytes(context), position, new_row, lane);
}

// The likeliest token, by one block over the logits of one row: moved(token) is what happens then.
template <class SHAPE, class MOVED> DEVICE void argmax_kernel(const float* logits, const MOVED& moved, const Stamps& stamps) {
    let_next_kernel_start();
    wait_for_previous_kernel(stamps);
    u64 key = 0;
    for (int i = threadIdx.x; i < SHAPE::COLUMNS; i += SHAPE::THREADS) {
        u64 candidate = choice_key(fresh(logits + i), i);
        key = candidate > key ? candidate : key;
    }
    for (int d = 16; d; d >>= 1) {
        u64 other = __shfl_xor_sync(FULL_WARP, key, d);
        key = other > key ? other : key;
    }
    __shared__ u64 warp_best[SHAPE::THREADS / 32];
    if ((threadIdx.x & 31) == 0) warp_best[threadIdx.x >> 5] = key;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < SHAPE::THREADS / 32; w++) key = warp_best[w] > key ? warp_best[w] : key;
        moved(chosen_token(key));
    }
}

// Each row's token at its position of the log.
template <class SHAPE, class ROWS> DEVICE void record_kernel(int* log, const int* tokens, const int* positions, const ROWS& rows, const Stamps& stamps) {
    rows.begin(stamps);
    const int row = blockIdx.x * SHAPE::THREADS + threadIdx.x;
    if (row < SHAPE::ROWS && rows.has(row)) log[rows.load(positions + row)] = rows.load(tokens + row);
}

#endif
