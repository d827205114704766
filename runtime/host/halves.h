// Products of halves on the tensor cores.
#ifndef PSIGRAPH_HOST_HALVES_H
#define PSIGRAPH_HOST_HALVES_H
#include "collectives.h"

namespace host {

// mma.m16n8k16 of halves, several times: see multiply_rows and multiply_columns in many_rows.cuh. Every lane
// brings its four words of the tile; the last one reads the other matrix where it lies and computes. Products of halves
// are exact in float32, and their sum is taken in the order of the columns.
static void halves_all(Warp& warp) {
    const HalvesTimes& with = warp.halves;
    const int width = 8 * with.blocks;
    alignas(64) _Float16 tile[16][16];
    alignas(64) float rows[16][256], sums[256];
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane >> 2, t = lane & 3;
        const _Float16* mine = (const _Float16*)warp.weights[lane];
        for (unsigned i = 0; i < 8; i++) {
            unsigned half = i >> 2, column = with.columns ? 2 * t + 8 * half + (i & 1) : 4 * t + 2 * half + (i & 1);
            tile[g + 8 * (i >> 1 & 1)][column] = mine[i];
        }
    }
    const _Float16* from = (const _Float16*)with.rows;
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < width; n++) rows[k][n] = (float)(with.columns ? from[k * with.stride + n] : from[n * with.stride + k]);
    for (unsigned row = 0; row < 16; row++) {
        for (int n = 0; n < width; n++) sums[n] = 0.0f;
        for (int k = 0; k < 16; k++) {
            const float weight = (float)tile[row][k];
            for (int n = 0; n < width; n++) sums[n] += weight * rows[k][n];
        }
        for (int n = 0; n < width; n++) warp.totals[(row & 7) * 4 + (n >> 1 & 3)][(n >> 3) * 4 + (row >> 3) * 2 + (n & 1)] += sums[n];
    }
}
// sums: this lane's 4 numbers of each block of 8; tile: its 4 words; rows: the first of 8 * blocks rows of 16 halves, or,
// where `columns` is true, of 16 rows of 8 * blocks halves; stride: halves from row to row.
static inline void multiply_halves(float* sums, const unsigned tile[4], const uint16_t* rows, int stride, int blocks, bool columns, int lane) {
    if ((unsigned)lane != self->lane) fail("partial warp", "multiply_halves was told lane %d", lane);
    Warp& warp = *self->warp;
    warp.weights[lane] = tile;
    warp.totals[lane] = sums;
    warp.halves = {rows, stride, blocks, columns};
    meet(HALVES, 0xffffffffu);
}

}  // namespace host

#endif
