// A token by chance: what `adjust` and `draw` are made of. The meaning is ir/sampling.py, bit for bit: weights are
// whole numbers, so that sums do not depend on their order and atomics do no harm, and the few operations on floats
// are single additions and multiplications that are never fused.
#ifndef PSIGRAPH_SAMPLING_CUH
#define PSIGRAPH_SAMPLING_CUH

#include "base.cuh"

constexpr int SPAN = 1024;  // threads of a block, logits of a peak, bins of the search
constexpr int SLOTS = 1024, BIAS_TOKENS = 16, BIAS_VALUES = BIAS_TOKENS + SLOTS;
enum Word { TOP_K, TOP_P, MIN_P, SHARPNESS, BINS_PER_UNIT, REPETITION, REPETITION_INVERSE, PRESENCE, FREQUENCY, WINDOW, SEED_LOW, SEED_HIGH, BIAS_COUNT };

#ifdef PSIGRAPH_HOST
DEVICE float rounded(float value) { volatile float kept = value; return kept; }
DEVICE float plus(float a, float b) { return rounded(a + b); }
DEVICE float times(float a, float b) { return rounded(a * b); }
#else
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
#endif
DEVICE float number_at(const int* sampler, int word) { return bits_to_float((u32)sampler[word]); }
DEVICE float minus_infinity() { return bits_to_float(0xff800000u); }

// A number's bits in an order of whole numbers, and back.
DEVICE u32 ordered(float value) { return (u32)(choice_key(value, 0) >> 32); }
DEVICE float value_of(u64 key) {
    u32 bits = (u32)(key >> 32);
    return bits_to_float((bits & 0x80000000u) ? bits ^ 0x80000000u : ~bits);
}

constexpr u32 MINUS_INFINITE = 0x007fffffu, INFINITE = 0xff800000u, NO_NUMBER = 0xffffffffu;  // as `ordered` has them

// == adjust

// One logit after its bias and the penalties for `count` times in the window.
DEVICE float adjusted_logit(float value, float bias, int count, const int* sampler) {
    value = plus(value, bias);
    if (count) {
        value = times(value, number_at(sampler, value <= 0.0f ? REPETITION : REPETITION_INVERSE));
        value = plus(value, -plus(times((float)count, number_at(sampler, FREQUENCY)), number_at(sampler, PRESENCE)));
    }
    return value == value ? plus(value, 0.0f) : minus_infinity();  // -0 becomes 0
}

// The largest of the block's keys; all threads call it, all get it.
DEVICE u32 block_max(u32 key, u32* of_warps) {
    for (int d = 16; d; d >>= 1) {
        u32 other = __shfl_xor_sync(FULL_WARP, key, d);
        key = other > key ? other : key;
    }
    if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = key;
    __syncthreads();
    for (int w = 0; w < SPAN / 32; w++) key = of_warps[w] > key ? of_warps[w] : key;
    return key;
}

// One block a span. history takes `token` at its place; the window is read up to there. A span in which a logit is no
// number or infinite has a peak that is no number: `draw_token` chooses nothing then.
DEVICE void adjust_span(const float* logits, const int* token, const int* sampler, const int* position, float* adjusted, float* peaks, int* history, int size, const Stamps& stamps) {
    __shared__ int counts[SPAN];
    __shared__ float biases[SPAN];
    __shared__ u32 of_warps[SPAN / 32];
    const int own = threadIdx.x, first = blockIdx.x * SPAN, at = first + own;
    counts[own] = 0;
    biases[own] = 0.0f;
    __syncthreads();
    if (own < sampler[BIAS_COUNT]) {
        u32 place = (u32)(sampler[BIAS_TOKENS + own] - first);
        if (place < SPAN) biases[place] = number_at(sampler, BIAS_VALUES + own);
    }
    wait_for_previous_kernel(stamps);
    const int here = fresh(position), now = fresh(token), window = sampler[WINDOW];
    for (int i = own; i < window && i <= here; i += SPAN) {
        u32 place = (u32)((i == 0 ? now : fresh((const int*)history + here - i)) - first);
        if (place < SPAN) atomicAdd(counts + place, 1);
    }
    if (at == 0) history[here] = now;  // nobody reads this place in this step
    __syncthreads();
    const float logit = at < size ? fresh(logits + at) : minus_infinity();
    const float value = adjusted_logit(logit, biases[own], counts[own], sampler);
    if (at < size) adjusted[at] = value;
    const u32 top = block_max(ordered(logit) < INFINITE ? ordered(value) : NO_NUMBER, of_warps);
    if (own == 0) peaks[blockIdx.x] = value_of((u64)top << 32);
}

// == draw

// Philox4x32-10 (Salmon et al., SC11) at counter (position, 0, 0, 0): its first two words.
DEVICE u64 random_word(u32 position, u32 k0, u32 k1) {
    u32 c0 = position, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; round++) {
        u64 first = (u64)0xD2511F53u * c0, second = (u64)0xCD9E8D57u * c2;
        c0 = (u32)(second >> 32) ^ c1 ^ k0;
        c1 = (u32)second;
        c2 = (u32)(first >> 32) ^ c3 ^ k1;
        c3 = (u32)first;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return (u64)c1 << 32 | c0;
}

// The upper half of a product of 128 bits.
DEVICE u64 upper_product(u64 a, u64 b) {
    u64 al = (u32)a, ah = a >> 32, bl = (u32)b, bh = b >> 32;
    u64 cross = al * bh + (al * bl >> 32);
    return ah * bh + (cross >> 32) + ((ah * bl + (u32)cross) >> 32);
}

// floor(2^39 * 2^-(distance * sharpness)): `weights_of` in ir/sampling.py.
DEVICE u64 weight_of(float distance, float sharpness) {
    constexpr u32 SERIES[8] = {5676u, 65510u, 661577u, 5726720u, 41309550u, 238388332u, 1031764991u, 2977044472u};
    float exponent = times(distance, sharpness);
    if (!(exponent < 40.0f)) return 0;
    u32 fixed = (u32)times(exponent, 16777216.0f), fraction = fixed << 8;
    u64 sum = 437;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = SERIES[i] - (sum * fraction >> 32);
    return ((1ull << 32) - (sum * fraction >> 32)) << 7 >> (fixed >> 24);
}

// Sums over the tokens from the likeliest down to some token, it included.
enum Measure { COUNT, PLAIN, TEMPERED };  // how many; weights at temperature 1; weights to draw by
struct Sums {
    u64 of[3];
    METHOD void add(const Sums& other) {
#pragma unroll
        for (int m = 0; m < 3; m++) of[m] += other.of[m];
    }
};

struct Shared {
    u64 keys[SPAN], plain[SPAN], tempered[SPAN];
    u64 of_warps[3][SPAN / 32];
    u32 top_of_warps[SPAN / 32];
    u64 key;
    Sums base, found;
    u32 bound, count;
    int bin;
    bool last;
};

// Memory that all blocks share; all zero between steps.
struct Tally {
    u32 finished, count;
    u64 bins[3][SPAN];
};

DEVICE u64 fresh_key(const u64* p) { return (u64)fresh((const u32*)p + 1) << 32 | fresh((const u32*)p); }

struct Draw {
    const float* logits;
    const int* sampler;
    u64* list;
    Shared& shared;
    int size;
    float top;             // the largest logit
    Sums before, own_bin;  // of the bins before this thread's, and of its own
    int count;             // keys in the list
    int bin;               // the bin that they are of; -1: all that matter

    METHOD float distance(u64 key) const {
        float value = value_of(key);
        return value == top ? 0.0f : plus(top, -value);
    }
    METHOD int bin_of(u64 key) const {
        float place = times(distance(key), number_at(sampler, BINS_PER_UNIT));
        return place < (float)(SPAN - 1) ? (int)place : SPAN - 1;
    }
    METHOD Sums measures(u64 key) const {
        float far = distance(key);
        return {{1, weight_of(far, 1.4426950408889634f), far <= number_at(sampler, MIN_P) ? weight_of(far, number_at(sampler, SHARPNESS)) : 0}};
    }

    // The sum of the block's values, known to all threads.
    METHOD Sums block_sum(Sums sums) {
#pragma unroll
        for (int m = 0; m < 3; m++) {
            for (int d = 16; d; d >>= 1) sums.of[m] += __shfl_xor_sync(FULL_WARP, sums.of[m], d);
            if ((threadIdx.x & 31) == 0) shared.of_warps[m][threadIdx.x >> 5] = sums.of[m];
        }
        __syncthreads();
        Sums total = {{0, 0, 0}};
        for (int w = 0; w < SPAN / 32; w++) total.add({{shared.of_warps[0][w], shared.of_warps[1][w], shared.of_warps[2][w]}});
        __syncthreads();
        return total;
    }

    // Takes the bins over from the tally, leaves them zero, and finds what lies before each.
    METHOD Sums take_bins(Tally* tally) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        Sums up_to;
#pragma unroll
        for (int m = 0; m < 3; m++) {
            own_bin.of[m] = up_to.of[m] = atomicExch(&tally->bins[m][threadIdx.x], 0ull);
            for (int d = 1; d < 32; d <<= 1) {
                u64 other = __shfl_up_sync(FULL_WARP, up_to.of[m], d);
                if (lane >= d) up_to.of[m] += other;
            }
            if (lane == 31) shared.of_warps[m][warp] = up_to.of[m];
        }
        __syncthreads();
        Sums total = {{0, 0, 0}};
        for (int w = 0; w < SPAN / 32; w++) {
            if (w == warp) before = total;
            total.add({{shared.of_warps[0][w], shared.of_warps[1][w], shared.of_warps[2][w]}});
        }
#pragma unroll
        for (int m = 0; m < 3; m++) before.of[m] += up_to.of[m] - own_bin.of[m];
        if (threadIdx.x == SPAN - 1) own_bin.of[COUNT] = (u64)size - before.of[COUNT];
        __syncthreads();
        return total;
    }

    // Puts the keys of a bin into the list.
    METHOD void collect() {
        if (threadIdx.x == 0) shared.count = 0;
        __syncthreads();
        constexpr int AT_ONCE = 4;
#pragma unroll 1
        for (int base = threadIdx.x; base < size; base += AT_ONCE * SPAN) {
            float values[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) values[i] = base + i * SPAN < size ? fresh(logits + base + i * SPAN) : 0.0f;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                u64 key = choice_key(values[i], base + i * SPAN);
                if (base + i * SPAN < size && bin_of(key) == bin) list[atomicAdd(&shared.count, 1u)] = key;
            }
        }
        __syncthreads();
        count = (int)shared.count;
    }

    // Keys and measures of the list's first part, side by side for all threads.
    METHOD void cache_list() {
        if ((int)threadIdx.x < count) {
            u64 key = fresh_key(list + threadIdx.x);
            Sums of_key = measures(key);
            shared.keys[threadIdx.x] = key;
            shared.plain[threadIdx.x] = of_key.of[PLAIN];
            shared.tempered[threadIdx.x] = of_key.of[TEMPERED];
        }
        __syncthreads();
    }

    // The token at which a measure reaches `target` (at least 1, at most what there is): its key, and the sums down to it.
    METHOD Sums reach(Measure measure, u64 target) {
        Sums base = {{0, 0, 0}};
        if (bin >= 0) {
            if (before.of[measure] < target && target <= before.of[measure] + own_bin.of[measure]) {
                shared.bin = threadIdx.x;
                shared.base = before;
            }
            __syncthreads();
            base = shared.base;
            if (shared.bin != bin) {
                bin = shared.bin;
                collect();
                cache_list();
            }
        }
        if (count <= SPAN) {
            if ((int)threadIdx.x < count) {
                const u64 key = shared.keys[threadIdx.x];
                Sums sums = base;
                for (int i = 0; i < count; i++)
                    if (shared.keys[i] >= key) sums.add({{1, shared.plain[i], shared.tempered[i]}});
                u64 own = measure == COUNT ? 1 : measure == PLAIN ? shared.plain[threadIdx.x] : shared.tempered[threadIdx.x];
                if (sums.of[measure] >= target && sums.of[measure] - own < target) {
                    shared.key = key;
                    shared.found = sums;
                }
            }
        } else {
            // Rarely: bit by bit, the largest key whose sum reaches the target.
            u64 key = 0;
#pragma unroll 1
            for (int bit = 63; bit >= 0; bit--) {
                Sums sums = listed(key | 1ull << bit);
                sums.add(base);
                if (sums.of[measure] >= target) key |= 1ull << bit;
            }
            Sums sums = listed(key);
            sums.add(base);
            shared.key = key;
            shared.found = sums;
        }
        __syncthreads();
        Sums found = shared.found;
        __syncthreads();
        return found;
    }

    // Sums over the list's keys from `least` on.
    METHOD Sums listed(u64 least) {
        Sums sums = {{0, 0, 0}};
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += SPAN) {
            u64 key = fresh_key(list + i);
            if (key >= least) sums.add(measures(key));
        }
        return block_sum(sums);
    }
};

// A block takes every gridDim-th span; true, and the token in `chosen`, for one thread of the last block that finishes
// (of the first one where there is nothing to choose from).
// With a top_k of at most one a peak, nothing below the top_k-th peak can be among the top_k tokens: the few that
// are not below it go into the list. Otherwise all tokens are counted and weighed in bins of their distance to the
// largest, and of the bins in which a filter or the draw ends, the last block makes a list.
template <int SIZE> DEVICE bool draw_token(const float* logits, const float* peaks, const int* sampler, const int* position, Tally* tally, u64* list, int& chosen, const Stamps& stamps) {
    constexpr int PEAKS = (SIZE + SPAN - 1) / SPAN;
    __shared__ Shared shared;
    const int own = threadIdx.x, top_k = sampler[TOP_K];
    const u32 top_p = (u32)sampler[TOP_P];
    const bool listed = PEAKS <= SPAN && top_k > 0 && top_k <= PEAKS;
    wait_for_previous_kernel(stamps);
    u32 peak = 0;
    for (int i = own; i < PEAKS; i += SPAN) {
        u32 other = ordered(fresh(peaks + i));
        peak = other > peak ? other : peak;
    }
    const u32 top = block_max(peak, shared.top_of_warps);
    if (top == NO_NUMBER || top <= MINUS_INFINITE) {  // as `chosen_token`
        chosen = -1;
        return blockIdx.x == 0 && own == 0;
    }
    if (listed) {
        const u64 key = (u64)peak << 32 | (u32)~own;
        shared.keys[own] = key;
        __syncthreads();
        if (own < PEAKS) {
            int larger = 0;
            for (int i = 0; i < PEAKS; i++) larger += shared.keys[i] > key;
            if (larger == top_k - 1) shared.bound = peak;
        }
        __syncthreads();
    }
    Draw draw = {logits, sampler, list, shared, SIZE, value_of((u64)top << 32), {{0, 0, 0}}, {{0, 0, 0}}, 0, -1};
    for (int at = blockIdx.x * SPAN + own; at < SIZE; at += gridDim.x * SPAN) {
        const u64 key = choice_key(fresh(logits + at), at);
        if (listed) {
            if ((u32)(key >> 32) >= shared.bound) list[atomicAdd(&tally->count, 1u)] = key;
        } else {
            Sums sums = draw.measures(key);
            int bin = draw.bin_of(key);
            if (bin == SPAN - 1) continue;  // what is so far away weighs nothing, and can be counted by what is not
            if (top_k > 0) atomicAdd(&tally->bins[COUNT][bin], 1ull);
            if (top_p && sums.of[PLAIN]) atomicAdd(&tally->bins[PLAIN][bin], sums.of[PLAIN]);
            if (sums.of[TEMPERED]) atomicAdd(&tally->bins[TEMPERED][bin], sums.of[TEMPERED]);
        }
    }
    __threadfence();
    __syncthreads();
    if (own == 0) shared.last = atomicAdd(&tally->finished, 1u) == gridDim.x - 1;
    __syncthreads();
    if (!shared.last) return false;
    __threadfence();

    Sums kept;
    if (listed) {
        if (own == 0) shared.count = atomicExch(&tally->count, 0u);
        __syncthreads();
        draw.count = (int)shared.count;
        draw.cache_list();
    } else {
        draw.bin = SPAN;  // none yet
        kept = draw.take_bins(tally);
    }
    if (own == 0) tally->finished = 0;
    if (top_k > 0 && top_k <= SIZE) kept = draw.reach(COUNT, (u64)top_k);
    if (top_p) {
        u64 target = (kept.of[PLAIN] >> 32) * top_p + ((kept.of[PLAIN] & 0xffffffffu) * top_p >> 32);
        kept = draw.reach(PLAIN, target ? target : 1);
    }
    u64 random = random_word((u32)fresh(position), (u32)sampler[SEED_LOW], (u32)sampler[SEED_HIGH]);
    draw.reach(TEMPERED, upper_product(random, kept.of[TEMPERED]) + 1);
    chosen = choice_index(shared.key);
    return own == 0;
}

#endif
