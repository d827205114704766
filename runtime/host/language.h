// Words and vector types of CUDA C.
#ifndef PSIGRAPH_HOST_LANGUAGE_H
#define PSIGRAPH_HOST_LANGUAGE_H
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <utility>
#if !defined(__x86_64__)
#define PSIGRAPH_HOST_UCONTEXT 1
#endif
#ifdef PSIGRAPH_HOST_UCONTEXT
#include <ucontext.h>
#endif
#ifdef PSIGRAPH_HOST_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include "kernel_abi.h"
#ifdef PSIGRAPH_HOST_WATCH
#include "watch.h"
#define HOST_WATCH(...) __VA_ARGS__
#else
#define HOST_WATCH(...)
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#if defined(PSIGRAPH_HOST_ADDRESS) || defined(PSIGRAPH_HOST_WATCH) || defined(PSIGRAPH_HOST_STEP)
#define __forceinline__ inline
#else
#define __forceinline__ inline __attribute__((always_inline))
#endif
// One section holds them all, so that they can be poisoned. The compile driver turns the declaration of dynamic
// shared memory, which C++ cannot express, into a call of host::dynamic_shared.
#define __shared__ static __attribute__((section("psigraph_shared")))

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define HOST_VECTOR2(name, type, bytes) \
    struct alignas(bytes) name { type x, y; }; \
    static inline name make_##name(type x, type y) { return {x, y}; }
#define HOST_VECTOR4(name, type, bytes) \
    struct alignas(bytes) name { type x, y, z, w; }; \
    static inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
HOST_VECTOR2(float2, float, 8)
HOST_VECTOR4(float4, float, 16)
HOST_VECTOR2(int2, int, 8)
HOST_VECTOR4(int4, int, 16)
HOST_VECTOR2(uint2, unsigned, 8)
HOST_VECTOR4(uint4, unsigned, 16)
HOST_VECTOR2(ulonglong2, unsigned long long, 16)
HOST_VECTOR2(double2, double, 16)
HOST_VECTOR2(ushort2, unsigned short, 4)
HOST_VECTOR4(ushort4, unsigned short, 8)
HOST_VECTOR4(uchar4, unsigned char, 4)
HOST_VECTOR4(char4, signed char, 4)
#undef HOST_VECTOR2
#undef HOST_VECTOR4

#endif
