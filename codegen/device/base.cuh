// What every kernel uses and CUDA C does not have by itself.
//
// Machine instructions (inline PTX) live here and in the other device headers, each behind a name. With PSIGRAPH_HOST
// defined, g++ compiles the same kernels for a CPU: every name then has a plain C++ twin that means the
// same, built on `host::` (runtime/host/cuda_on_cpu.h). No CUDA or standard header is included: the NVRTC
// wheel carries none.
#ifndef PSIGRAPH_BASE_CUH
#define PSIGRAPH_BASE_CUH

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define FULL_WARP 0xffffffffu
// A kernel's bounds: blocks of `threads`, each of which may use `most` registers, or as many as the block's size allows.
// Where the assembler spills, runtime/cuda/nvrtc.py compiles again with MORE_REGISTERS, and at last with ONE_BLOCK: one block
// a multiprocessor is enough then.
#ifndef MORE_REGISTERS
#define MORE_REGISTERS 0
#endif
#if defined(PSIGRAPH_HOST)
#define THREADS(threads)
#define REGISTERS(threads, most)
#elif defined(ONE_BLOCK)
#define THREADS(threads) __launch_bounds__(threads, 1)
#define REGISTERS(threads, most) __launch_bounds__(threads, 1)
#else
#define THREADS(threads) __launch_bounds__(threads)
#define REGISTERS(threads, most) __maxnreg__(most + MORE_REGISTERS)
#endif

// Shared memory whose size a launch says, inside a kernel.
#ifdef PSIGRAPH_HOST
#define DYNAMIC_SHARED(name) u8* const name = host::dynamic_shared<u8>()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]
#endif

// == Numbers

#ifdef PSIGRAPH_HOST
DEVICE float half_to_float(u16 bits) { return host::half_to_float(bits); }
DEVICE u16 float_to_half(float value) { return host::float_to_half(value); }
DEVICE float exp2_fast(float x) { return host::exp2(x); }
DEVICE float bits_to_float(u32 bits) { return host::bit_cast<float>(bits); }
DEVICE u32 float_to_bits(float value) { return host::bit_cast<u32>(value); }
DEVICE int round_to_int(float value) { return host::round_to_int(value); }
DEVICE float divide(float a, float b) { return a / b; }
#else
DEVICE float half_to_float(u16 bits) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f; }
DEVICE u16 float_to_half(float value) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(value)); return h; }
DEVICE float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float bits_to_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_to_bits(float value) { return __float_as_uint(value); }
DEVICE int round_to_int(float value) { return __float2int_rn(value); }
// Within 2 units in the last place over the whole range, without the slow path of a correctly rounded division.
DEVICE float divide(float a, float b) { float q; asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(a), "f"(b)); return q; }
#endif

DEVICE float2 halves_to_floats(u32 pair) { return make_float2(half_to_float((u16)pair), half_to_float((u16)(pair >> 16))); }
// Two floats as halves, the first in the low bits.
#ifdef PSIGRAPH_HOST
DEVICE u32 halves_from(float first, float second) { return (u32)float_to_half(first) | (u32)float_to_half(second) << 16; }
#else
DEVICE u32 halves_from(float first, float second) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
#endif

// Sum, product, and product and sum of pairs of halves.
#ifdef PSIGRAPH_HOST
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) {
    float2 x = halves_to_floats(a), y = halves_to_floats(b), z = halves_to_floats(c);
    return halves_from(x.x * y.x + z.x, x.y * y.y + z.y);
}
DEVICE u32 add_halves(u32 a, u32 b) { return fma_halves(a, 0x3c003c00u, b); }
DEVICE u32 multiply_halves(u32 a, u32 b) { return fma_halves(a, b, 0x80008000u); }
#else
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) { u32 d; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
DEVICE u32 add_halves(u32 a, u32 b) { u32 d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE u32 multiply_halves(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
#endif

DEVICE u32 byte_of_word(u32 word, int index) { return (word >> (8 * index)) & 0xffu; }
DEVICE float byte_to_float(u32 word, int index) { return (float)byte_of_word(word, index); }
// The same without a conversion, which would share its pipe with everything that is integer: a float of 2^23 and more has
// an integer in its last bits. `bits`: `bits_of_2_23()`, in a register.
#ifdef PSIGRAPH_HOST
DEVICE u32 bits_of_2_23() { return 0x4b000000u; }
DEVICE float byte_to_float(u32 word, int index, u32 bits) { return bits_to_float(bits | byte_of_word(word, index)) - 8388608.0f; }
#else
DEVICE u32 bits_of_2_23() { return __shfl_sync(FULL_WARP, 0x4b000000u, 0); }  // a constant would be set again at each use
DEVICE float byte_to_float(u32 word, int index, u32 bits) { return bits_to_float(__byte_perm(word, bits, 0x7440 | index)) - 8388608.0f; }
#endif
DEVICE float signed_byte_to_float(u32 word, int index) { return (float)(s8)(word >> (8 * index)); }
DEVICE float silu(float x) { return divide(x, 1.0f + exp2_fast(-1.4426950408889634f * x)); }

// == Order between kernels: programmatic launch (sm_90 and later; elsewhere plain edges order the step).
// The trigger only lets the next kernel start; the wait gives completion and visibility of the one before.
// Rules (docs/layout.md, "Rules that kernels keep"): every kernel waits, nothing global is written before the wait, and
// memory that a kernel of the step writes is read with `fresh`, never through the non-coherent path.

#ifdef PSIGRAPH_HOST
DEVICE void let_next_kernel_start() { host::grid_trigger(); }
DEVICE void wait_for_previous_kernel() { host::grid_wait(); }
#else
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

// Time stamps, for `psigraph.bench.stamps`: every kernel has STAMP_PARAMETERS behind its own, an object `stamps` from its
// beginning to its end (STAMPS), and waits with it. Without PSIGRAPH_STAMPS nothing is left of all that.
// With it each launch notes when it was let through its wait and when its last warp ended, nanoseconds of the GPU's clock:
// two rows of STAMP_PLACES words, complements of the earliest releases, and the latest ends, so that both are maxima over
// blocks and start from zero. Blocks take turns with the places: all of them at one word would wait for each other, and
// the next kernel for them.
#define STAMP_PLACES 64
#ifdef PSIGRAPH_HOST
DEVICE u64 clock_ns() { return host::clock_ns(); }
#else
DEVICE u64 clock_ns() { u64 t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory"); return t; }
#endif
#ifdef PSIGRAPH_STAMPS
#define STAMP_PARAMETERS , u64* trace, int slot
#define STAMPS const Stamps stamps(trace, slot)
struct Stamps {
    u64* times;
    METHOD Stamps(u64* trace, int slot) : times(trace + 2 * STAMP_PLACES * slot + blockIdx.x % STAMP_PLACES) {}
    METHOD void released() const {
        if (threadIdx.x == 0) atomicMax(times, ~clock_ns());
    }
    METHOD ~Stamps() {
        if ((threadIdx.x & 31) == 0) atomicMax(times + STAMP_PLACES, clock_ns());
    }
};
#else
#define STAMP_PARAMETERS
#define STAMPS const Stamps stamps = {}
struct Stamps {
    METHOD void released() const {}
};
#endif
DEVICE void wait_for_previous_kernel(const Stamps& stamps) {
    wait_for_previous_kernel();
    stamps.released();
}

// A barrier of the block's first `threads` threads, whole warps.
#ifdef PSIGRAPH_HOST
DEVICE void first_threads_barrier(int threads) { host::named_barrier(1, threads); }
#else
DEVICE void first_threads_barrier(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }
#endif

// Loads that go to L2: what another SM wrote must not come from a stale line of this SM's L1.
#ifdef PSIGRAPH_HOST
template <class T> DEVICE T fresh(const T* p) { return host::fresh(p); }
#else
DEVICE float fresh(const float* p) { float v; asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory"); return v; }
DEVICE u32 fresh(const u32* p) { u32 v; asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE int fresh(const int* p) { int v; asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory"); return v; }
DEVICE float2 fresh(const float2* p) { float2 v; asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory"); return v; }
DEVICE float4 fresh(const float4* p) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
    return v;
}
DEVICE uint4 fresh(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
#endif

// An address that is worked out here and not later: before the wait, not on the way from it to the first load.
template <class T> DEVICE const T* ready(const T* address) {
#ifdef PSIGRAPH_HOST
    return address;
#else
    asm volatile("" : "+l"(address));
    return address;
#endif
}

// Memory that only earlier steps wrote (the cache's older rows, the position before it moves): a step starts
// after the one before it has ended, so it may be read before the wait.
#ifdef PSIGRAPH_HOST
template <class T> DEVICE T from_earlier_step(const T* p) { return host::from_earlier_step(p); }
#else
template <class T> DEVICE T from_earlier_step(const T* p) { return fresh(p); }
#endif

// A loop whose index is a compile-time constant, so that arrays stay in registers.
template <int I> struct Index {
    static constexpr int index = I;
};
template <int FROM, int TO, class BODY> DEVICE void for_range(BODY&& body) {
    if constexpr (FROM < TO) {
        body(Index<FROM>());
        for_range<FROM + 1, TO>(body);
    }
}
template <int COUNT, class BODY> DEVICE void for_each(BODY&& body) { for_range<0, COUNT>(body); }

// A kernel has the registers that its widest stretch of code needs, and this stretch, which never runs, needs COUNT and a
// few more: so blocks of all products fit a multiprocessor in the same number, whatever their own code needs. It belongs
// at a kernel's very beginning: elsewhere it cost a step 1 to 18 % (docs/performance-log.md, version 14).
template <int COUNT> DEVICE void hold_registers() {
#ifndef PSIGRAPH_HOST
    if (gridDim.z == 1) return;
    u32 held[COUNT];
    for_each<COUNT>([&](auto i) { asm volatile("mov.u32 %0, %%clock;" : "=r"(held[i.index])); });
    for_each<COUNT>([&](auto i) { asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(held[COUNT - 1 - i.index]), "r"(held[i.index]) : "memory"); });
#endif
}

// == Sums within a warp, in a fixed order, so that two runs give the same bits.

// Sum over `width` neighbouring lanes (a power of two); every lane gets it.
DEVICE float lanes_sum(float value, int width) {
    for (int d = width >> 1; d; d >>= 1) value += __shfl_xor_sync(FULL_WARP, value, d);
    return value;
}
// Over the eight lanes with the same lane % 4; every lane gets it.
DEVICE float rows_sum(float value) {
    for (int d = 16; d >= 4; d >>= 1) value += __shfl_xor_sync(FULL_WARP, value, d);
    return value;
}
DEVICE float rows_max(float value) {
    for (int d = 16; d >= 4; d >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, d));
    return value;
}
DEVICE int lanes_sum(int value, int width) {
    for (int d = width >> 1; d; d >>= 1) value += __shfl_xor_sync(FULL_WARP, value, d);
    return value;
}
DEVICE float lanes_max(float value, int width) {
    for (int d = width >> 1; d; d >>= 1) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, d));
    return value;
}

// Largest of a warp. As integers, floats below zero order the other way round, and what is no number is larger than all.
#ifdef PSIGRAPH_HOST
DEVICE int lanes_max(int value, int width) {
    for (int d = width >> 1; d; d >>= 1) {
        const int other = __shfl_xor_sync(FULL_WARP, value, d);
        value = other > value ? other : value;
    }
    return value;
}
DEVICE int warp_max(int value) { return lanes_max(value, 32); }
#else
DEVICE int warp_max(int value) {
    int largest;
    asm("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(value));
    return largest;
}
#endif
DEVICE float warp_max(float value) {
    const int bits = (int)float_to_bits(value), largest = warp_max(bits ^ ((bits >> 31) & 0x7fffffff));
    return bits_to_float((u32)(largest ^ ((largest >> 31) & 0x7fffffff)));
}
// Over each half of the warp; no float below zero. Two instructions of the whole warp take less time than four shuffles.
#ifdef PSIGRAPH_HOST
DEVICE float half_warp_max(float value) { return bits_to_float((u32)lanes_max((int)float_to_bits(value), 16)); }
DEVICE int half_warp_sum(int value) { return lanes_sum(value, 16); }
#else
DEVICE float half_warp_max(float value) {
    u32 bits = float_to_bits(value), first, second;
    bool upper = threadIdx.x & 16;
    asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(first) : "r"(upper ? 0u : bits));
    asm("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(second) : "r"(upper ? bits : 0u));
    return bits_to_float(upper ? second : first);
}
DEVICE int half_warp_sum(int value) {
    int first, second;
    bool upper = threadIdx.x & 16;
    asm("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(first) : "r"(upper ? 0 : value));
    asm("redux.sync.add.s32 %0, %1, 0xffffffff;" : "=r"(second) : "r"(upper ? value : 0));
    return upper ? second : first;
}
#endif

// A key that orders by value, then by lowest index. A number that is not one counts as highest of all, so that it is
// noticed wherever it stands.
DEVICE u64 choice_key(float value, int index) {
    u32 bits = float_to_bits(value);
    bits = value == value ? ((bits & 0x80000000u) ? ~bits : bits | 0x80000000u) : 0xffffffffu;
    return ((u64)bits << 32) | (0xffffffffu - (u32)index);
}
DEVICE int choice_index(u64 key) { return (int)(0xffffffffu - (u32)key); }
// Whether the number of a key is finite: 0x007fffff is minus infinity, 0xff800000 infinity.
DEVICE bool choice_is_finite(u64 key) { return (u32)(key >> 32) - 0x00800000u < 0xff000000u; }
// The token of the largest key; -1 where its number is not finite: an embedding takes that for token 0, so that steps
// that are queued already do no harm, and the host makes an error of it.
DEVICE int chosen_token(u64 key) { return choice_is_finite(key) ? choice_index(key) : -1; }

// The state moves on by one token; one thread of the step calls it.
DEVICE void move_on(int chosen, int* token, int* log, const int* end_tokens, int* stop, int* position) {
    int at = fresh((const int*)position), stopped = fresh((const int*)stop);
    for (int i = 0; i < 8; i++) stopped |= end_tokens[i] == chosen;
    *token = chosen;
    log[at] = chosen;
    *stop = stopped;
    *position = at + 1;
}

#endif
