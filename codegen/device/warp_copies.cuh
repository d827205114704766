// What attention adds: copies that a warp asks for, and products of halves on the tensor cores.
#ifndef PSIGRAPH_WARP_COPIES_CUH
#define PSIGRAPH_WARP_COPIES_CUH

#include "base.cuh"

// Copies into shared memory, for the warp that asks for them: in sets, each closed by `end_of_copies`. (One bulk copy instead took longer: its request and the wait at its barrier are 100 clocks each.)
#ifdef PSIGRAPH_HOST
DEVICE void end_of_copies() {}
template <int SETS> DEVICE void wait_for_copies_but_last() { __syncwarp(); }
#else
DEVICE void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last SETS of them are there.
template <int SETS> DEVICE void wait_for_copies_but_last() {
    asm volatile("cp.async.wait_group %0;" ::"n"(SETS) : "memory");
    __syncwarp();
}
#endif

// Bytes that will be asked for later, into the L2 cache, by one lane: whole times 16, on a 16-byte boundary.
#if !defined(PSIGRAPH_HOST) && __CUDA_ARCH__ >= 900
DEVICE void prefetch(const void* source, int bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory"); }
#else
DEVICE void prefetch(const void*, int) {}
#endif

// == Half-precision products of attention: 16 rows x 16 columns of float16 times 16 x 8, float32 sums. A number is cut
// into a high and a low half (float16 each), which stand in neighbouring columns.

// Where column i of a vector stands, so that lane (g, t) reads what it gives to the products of 32 columns in one piece.
DEVICE int column_index(int i) { return (i & ~31) | (i & 6) << 2 | (i & 16) >> 2 | (i & 8) >> 2 | (i & 1); }

// Both halves of one number.
DEVICE u32 both_halves(float value) {
    u16 high = float_to_half(value);
    return (u32)high | ((u32)float_to_half(value - half_to_float(high)) << 16);
}

// sums: row g columns 2 t and 2 t + 1, then row g + 8; a: rows g and g + 8 at columns 2 t, 2 t + 1, then both at
// columns 2 t + 8, 2 t + 9; b: rows 2 t, 2 t + 1 of column g, then rows 2 t + 8, 2 t + 9.
// transposed: lane (g, t) gives row g, columns 2 t and 2 t + 1 of 8 x 8 halves and gets rows 2 t and 2 t + 1 of column g.
#ifdef PSIGRAPH_HOST
DEVICE void dot_halves(float sums[4], const u32 a[4], const u32 b[2], int lane) { host::dot_halves(sums, a, b, lane); }
DEVICE u32 transposed(u32 pair, int lane) {
    int from = 8 * (lane & 3) + (lane >> 3), shift = 16 * ((lane >> 2) & 1);
    u32 first = __shfl_sync(FULL_WARP, pair, from), second = __shfl_sync(FULL_WARP, pair, from + 4);
    return ((first >> shift) & 0xffffu) | ((second >> shift) << 16);
}
#else
DEVICE void dot_halves(float sums[4], const u32 a[4], const u32 b[2], int) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE u32 transposed(u32 pair, int) {
    u32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}
#endif

#endif
