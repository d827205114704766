// Collectives of a warp. The lane that completes one computes everybody's result.
#ifndef PSIGRAPH_HOST_COLLECTIVES_H
#define PSIGRAPH_HOST_COLLECTIVES_H
#include "fibers.h"
#include "numbers.h"

namespace host {

static void dot_all(Warp& warp);
static void dot_halves_all(Warp& warp);

static void combine(Warp& warp, unsigned mask, Collective kind) {
    if (kind == WARP_BARRIER) {
        HOST_WATCH(watch_warp(self->block->linear, self->index >> 5));
        return;
    }
    if (kind == DOT) return dot_all(warp);
    if (kind == DOT_HALVES) return dot_halves_all(warp);
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        unsigned source = warp.source[lane];
        if (kind == VOTE) {
            votes |= (uint64_t)(warp.value[lane] != 0) << lane;
            continue;
        }
        if (!(mask >> source & 1)) fail("partial warp", "lane %u shuffles from lane %u, which mask 0x%08x leaves out", lane, source, mask);
        warp.result[lane] = warp.value[source];
    }
    if (kind == VOTE)
        for (unsigned lane = 0; lane < 32; lane++) warp.result[lane] = votes;
}

static void meet(Collective kind, unsigned mask) {
    Warp& warp = *self->warp;
    unsigned lane = self->lane, bit = 1u << lane;
    if (!(mask & bit)) fail("partial warp", "the lane calls a collective with mask 0x%08x, which leaves it out", mask);
    if (mask & warp.done) fail("partial warp", "a warp collective names lanes 0x%08x, but of these 0x%08x have returned", mask, mask & warp.done);
    warp.ready &= ~bit;
    warp.meeting |= bit;
    warp.mask[lane] = mask;
    warp.kind[lane] = kind;
    if ((warp.meeting & mask) == mask) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            unsigned other = __builtin_ctz(rest);
            if (warp.kind[other] != kind || warp.mask[other] != mask)
                fail("partial warp", "lanes %u and %u meet in different collectives (masks 0x%08x and 0x%08x)", lane, other, mask, warp.mask[other]);
        }
        kind == HALVES ? halves_all(warp) : combine(warp, mask, kind);
        warp.meeting &= ~mask;
        warp.ready |= mask;
    }
    advance();
}

static inline void warp_barrier(unsigned mask = 0xffffffffu) { meet(WARP_BARRIER, mask & self->warp->lanes); }

template <class T> static T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    unsigned lane = self->lane;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    self->warp->value[lane] = bits;
    self->warp->source[lane] = (uint8_t)source;
    meet(SHUFFLE, mask);
    T result;
    memcpy(&result, &self->warp->result[lane], sizeof(T));
    return result;
}
static inline unsigned vote(unsigned mask, bool value) {
    self->warp->value[self->lane] = value;
    meet(VOTE, mask);
    return (unsigned)self->warp->result[self->lane];
}

// Four mma.m16n8k16 (u8 x s8): see dot_chunk in quant.cuh. Every lane brings its words, the last one
// computes: row g + 8 h, group t, digit d = sum over 16 bytes.
static void dot_all(Warp& warp) {
    alignas(64) unsigned digits[32], rows[16][4][4];
    for (unsigned lane = 0; lane < 32; lane++) {
        digits[lane] = (unsigned)warp.value[lane];
        for (unsigned j = 0; j < 8; j++) rows[(lane >> 2) + 8 * (j & 1)][j >> 1][lane & 3] = warp.weights[lane][j];
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane >> 2, t = lane & 3;
        for (unsigned h = 0; h < 2; h++) {
            const uint8_t* weights = (const uint8_t*)rows[g + 8 * h][t];
            for (unsigned d = 0; d < 2; d++) {
                const int8_t* values = (const int8_t*)&digits[8 * t + 4 * d];
                int sum = 0;
                for (int i = 0; i < 16; i++) sum += (int16_t)weights[i] * (int16_t)values[i];
                warp.sums[lane][2 * h + d] += sum;
            }
        }
    }
}
static inline void dot_chunk(int sums[4], const unsigned weights[8], unsigned digits, int lane) {
    if ((unsigned)lane != self->lane) fail("partial warp", "dot_chunk was told lane %d", lane);
    Warp& warp = *self->warp;
    warp.value[lane] = digits;
    warp.weights[lane] = weights;
    warp.sums[lane] = sums;
    meet(DOT, 0xffffffffu);
}

// mma.m16n8k16 (float16, float32 sums): see dot_halves in warp_copies.cuh. Sums are taken in float64 and rounded
// once: a tensor core is no more exact than that.
static void dot_halves_all(Warp& warp) {
    float a[16][16], b[8][16];
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane >> 2, t = lane & 3;
        for (unsigned i = 0; i < 4; i++)
            for (unsigned half = 0; half < 2; half++)
                a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + half] = half_to_float((uint16_t)(warp.weights[lane][i] >> 16 * half));
        for (unsigned i = 0; i < 2; i++)
            for (unsigned half = 0; half < 2; half++) b[g][2 * t + 8 * i + half] = half_to_float((uint16_t)(warp.other[lane][i] >> 16 * half));
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        for (unsigned i = 0; i < 4; i++) {
            const float *row = a[(lane >> 2) + 8 * (i >> 1)], *column = b[2 * (lane & 3) + (i & 1)];
            double sum = warp.float_sums[lane][i];
            for (int k = 0; k < 16; k++) sum += (double)row[k] * (double)column[k];
            warp.float_sums[lane][i] = (float)sum;
        }
    }
}
static inline void dot_halves(float sums[4], const unsigned a[4], const unsigned b[2], int lane) {
    if ((unsigned)lane != self->lane) fail("partial warp", "dot_halves was told lane %d", lane);
    Warp& warp = *self->warp;
    warp.weights[lane] = a;
    warp.other[lane] = b;
    warp.float_sums[lane] = sums;
    meet(DOT_HALVES, 0xffffffffu);
}

}  // namespace host

#endif
