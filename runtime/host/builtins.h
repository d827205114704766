// Built-in names of CUDA C.
#ifndef PSIGRAPH_HOST_BUILTINS_H
#define PSIGRAPH_HOST_BUILTINS_H
#include "barriers.h"
#include "collectives.h"
#include "device_memory.h"
#include "halves.h"
#include "numbers.h"

#define threadIdx (host::self->thread)
#define blockIdx (host::self->block->index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)
#define warpSize 32

#define __syncthreads() host::block_barrier(__LINE__)
static inline void __syncwarp(unsigned mask = 0xffffffffu) { host::warp_barrier(mask); }
#define __threadfence() HOST_WATCH(watch_fence())
#define __threadfence_block() ((void)0)
#define __threadfence_system() HOST_WATCH(watch_fence())

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    return host::shuffle(mask, value, (host::self->lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32) {
    unsigned lane = host::self->lane, source = lane ^ with;
    return host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = host::self->lane;
    return host::shuffle(mask, value, (lane & (width - 1)) + by < (unsigned)width ? lane + by : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = host::self->lane;
    return host::shuffle(mask, value, (lane & (width - 1)) >= by ? lane - by : lane);
}
static inline unsigned __ballot_sync(unsigned mask, int value) { return host::vote(mask, value) & mask; }
static inline int __any_sync(unsigned mask, int value) { return (host::vote(mask, value) & mask) != 0; }
static inline int __all_sync(unsigned mask, int value) { return (host::vote(mask, value) & mask) == mask; }
static inline unsigned __activemask() { return host::self->warp->lanes & ~host::self->warp->done; }

#define HOST_ATOMIC(name, type, update)                                                                \
    static inline type name(type* at, type value) {                                                    \
        HOST_WATCH(WatchAs as(WATCH_ATOMIC));                                                          \
        type seen, next;                                                                               \
        __atomic_load(at, &seen, __ATOMIC_SEQ_CST);                                                    \
        do next = update;                                                                              \
        while (!__atomic_compare_exchange(at, &seen, &next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)); \
        return seen;                                                                                   \
    }
#define HOST_ATOMIC_INTEGERS(name, update)        \
    HOST_ATOMIC(name, int, update)                \
    HOST_ATOMIC(name, unsigned, update)           \
    HOST_ATOMIC(name, unsigned long long, update)
HOST_ATOMIC_INTEGERS(atomicAdd, seen + value)
HOST_ATOMIC(atomicAdd, float, seen + value)
HOST_ATOMIC_INTEGERS(atomicMax, seen > value ? seen : value)
HOST_ATOMIC_INTEGERS(atomicMin, seen < value ? seen : value)
HOST_ATOMIC_INTEGERS(atomicExch, value)
HOST_ATOMIC(atomicExch, float, value)
HOST_ATOMIC_INTEGERS(atomicAnd, seen & value)
HOST_ATOMIC_INTEGERS(atomicOr, seen | value)
HOST_ATOMIC(atomicInc, unsigned, seen >= value ? 0 : seen + 1)
#undef HOST_ATOMIC_INTEGERS
#undef HOST_ATOMIC
template <class T> static inline T atomicCAS(T* at, T compare, T value) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    __atomic_compare_exchange(at, &compare, &value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return compare;
}

#define __ldg(p) host::non_coherent(p)
#define __ldcg(p) host::fresh(p)
#define rsqrtf(x) host::rsqrt(x)
#define __expf(x) expf(x)
#define __logf(x) logf(x)
#define __fdividef(x, y) ((x) / (y))
#define __fmaf_rn(x, y, z) fmaf(x, y, z)
#define __float2int_rn(x) host::round_to_int(x)
#define __float_as_uint(x) host::bit_cast<unsigned>((float)(x))
#define __float_as_int(x) host::bit_cast<int>((float)(x))
#define __uint_as_float(x) host::bit_cast<float>((unsigned)(x))
#define __int_as_float(x) host::bit_cast<float>((int)(x))
#define __popc(x) __builtin_popcount(x)
#define __clz(x) ((x) ? __builtin_clz(x) : 32)
#define __ffs(x) __builtin_ffs(x)
#define __trap() host::fail("trap", "the kernel trapped in line %d", __LINE__)
#define HOST_TWO(name, type, sign) \
    static inline type name(type a, type b) { return a sign b ? a : b; }
HOST_TWO(min, int, <)
HOST_TWO(min, unsigned, <)
HOST_TWO(min, long long, <)
HOST_TWO(min, float, <)
HOST_TWO(max, int, >)
HOST_TWO(max, unsigned, >)
HOST_TWO(max, long long, >)
HOST_TWO(max, float, >)
#undef HOST_TWO
static inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; i++) sum += (int8_t)(a >> 8 * i) * (int8_t)(b >> 8 * i);
    return sum;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned sum) {
    for (int i = 0; i < 4; i++) sum += (uint8_t)(a >> 8 * i) * (uint8_t)(b >> 8 * i);
    return sum;
}

#endif
