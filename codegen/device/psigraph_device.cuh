// The device header: everything that a generated kernel uses and CUDA C does not have by itself.
//
// Machine instructions (inline PTX) live here and in the other device headers, each behind a name. With PSIGRAPH_HOST
// defined, g++ compiles the same kernels for a CPU: every name then has a plain C++ twin that means the
// same, built on `host::` (runtime/host/cuda_on_cpu.h). No CUDA or standard header is included: the NVRTC
// wheel carries none.
#ifndef PSIGRAPH_DEVICE_CUH
#define PSIGRAPH_DEVICE_CUH

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define FULL_WARP 0xffffffffu
// A kernel of blocks of `threads`, each of which may use `most` registers. If those do not suffice, runtime/nvrtc.py
// compiles the kernel again without that bound.
#ifdef PSIGRAPH_HOST
#define REGISTERS(threads, most)
#else
#define REGISTERS(threads, most) __maxnreg__(most)
#endif

// ---------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------
// Order between kernels: programmatic launch (sm_90 and later; elsewhere plain edges order the step).
// The trigger only lets the next kernel start; the wait gives completion and visibility of the one before.
// Rules (docs/layout.md, "Rules that kernels keep"): every kernel waits, nothing global is written before the wait, and
// memory that a kernel of the step writes is read with `fresh`, never through the non-coherent path.
// ---------------------------------------------------------------------------------------------------------

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

// When a kernel was let through its wait and when its last warp ended, nanoseconds of the GPU's clock, for
// `codegen.profile`. Of each launch there are two rows of STAMP_PLACES words: complements of the earliest releases, and the
// latest ends, so that both are maxima over blocks and start from zero. Blocks take turns with the places: all of them at
// one word would wait for each other, and the next kernel for them.
#define STAMP_PLACES 64
#ifdef PSIGRAPH_HOST
DEVICE u64 clock_ns() { return host::clock_ns(); }
#else
DEVICE u64 clock_ns() { u64 t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)::"memory"); return t; }
#endif
struct Traced {
    u64* times;
    METHOD Traced(u64* trace, int slot) : times(trace + 2 * STAMP_PLACES * slot + blockIdx.x % STAMP_PLACES) {
        if (threadIdx.x == 0) atomicMax(times, ~clock_ns());
    }
    METHOD ~Traced() {
        if ((threadIdx.x & 31) == 0) atomicMax(times + STAMP_PLACES, clock_ns());
    }
};

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

// ---------------------------------------------------------------------------------------------------------
// A ring of stages in shared memory for the weights of the warps that share a tile (READERS): a stage holds as many
// superblocks as there are warps, one each. On sm_90 and later one thread of the block fills it by one bulk copy;
// elsewhere each warp fetches its own superblock by 16-byte asynchronous copies, and bytes = 0 keeps the count
// of copies in step where there is nothing left to copy.
// barriers: 2 * DEPTH words of shared memory, DEPTH for stages that have arrived and DEPTH for those that were read.
// ---------------------------------------------------------------------------------------------------------

#ifdef PSIGRAPH_HOST
template <int DEPTH, int READERS> struct Ring {
    DEVICE void open(u64* barriers, int stage) { barriers[stage] = barriers[DEPTH + stage] = 0; }
    DEVICE void fill(u64* barriers, int stage, u8* target, const u8* source, int bytes, int) { host::bulk_issue(barriers + stage, target, source, bytes); }
    DEVICE void pace(u64*, int) {}
    DEVICE void wait(u64* barriers, int stage, int turn) { host::bulk_wait(barriers + stage, turn); }
    DEVICE void give_back(u64* barriers, int stage, int lane) {
        host::warp_barrier();
        if (lane == 0) host::stage_read(barriers + DEPTH + stage, READERS);
    }
    DEVICE void wait_until_read(u64* barriers, int stage, int turn, u8* target, int bytes) {
        host::stage_free(barriers + DEPTH + stage, turn, target, bytes);
    }
    DEVICE void fetch(u8* target, const u8* source, int bytes, int lane) {
        for (int at = lane * 16; at < bytes; at += 512) *(uint4*)(target + at) = *(const uint4*)(source + at);
    }
    DEVICE void wait_for_copies() { host::warp_barrier(); }
};
#elif __CUDA_ARCH__ >= 900
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void wait_at_barrier(const u64* barrier, int turn) {
    u32 address = shared_address(barrier), done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(turn & 1)
                     : "memory");
}
template <int DEPTH, int READERS> struct Ring {
    // By any thread, before a barrier of the block.
    DEVICE void open(u64* barriers, int stage) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barriers + stage)) : "memory");
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barriers + DEPTH + stage)), "n"(READERS) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    // In `pieces` copies: small ones of many multiprocessors take turns at the memory, large ones block each other.
    DEVICE void fill(u64* barriers, int stage, u8* target, const u8* source, int bytes, int pieces) {
        u32 barrier = shared_address(barriers + stage), to = shared_address(target);
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
        const int each = bytes / pieces;
        u64 policy;  // weights are read once a step: they must not push out of L2 what is read again and again, code above all
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        for (int i = 0; i < pieces; i++, to += each, source += each)
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
                         "l"(source), "r"(each), "r"(barrier), "l"(policy)
                         : "memory");
    }
    // Until the first copy to a stage has arrived, or a few microseconds have passed: whoever asks for more weights
    // waits so, because requests that crowd the memory hold up the activations of the kernel at work.
    DEVICE void pace(u64* barriers, int stage) {
        u32 barrier = shared_address(barriers + stage), done = 0;
        for (int tries = 0; !done && tries < 200; tries++)
            asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(barrier) : "memory");
    }
    DEVICE void wait(u64* barriers, int stage, int turn) { wait_at_barrier(barriers + stage, turn); }
    DEVICE void give_back(u64* barriers, int stage, int lane) {
        __syncwarp();
        if (lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barriers + DEPTH + stage)) : "memory");
    }
    DEVICE void wait_until_read(u64* barriers, int stage, int turn, u8*, int) { wait_at_barrier(barriers + DEPTH + stage, turn); }
};
#else
template <int DEPTH, int> struct Ring {
    DEVICE void fetch(u8* target, const u8* source, int bytes, int lane) {
        u32 to = (u32)__cvta_generic_to_shared(target);
        for (int at = lane * 16; at < bytes; at += 512)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(source + at) : "memory");
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    DEVICE void wait_for_copies() {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
        __syncwarp();
    }
};
#endif

// A kernel has the registers that its widest stretch of code needs, and this stretch, which never runs, needs COUNT and a
// few more: so blocks of all products fit a multiprocessor in the same number, whatever their own code needs. It belongs
// at a kernel's very beginning: elsewhere it cost a step 1 to 18 % (docs/performance.md, version 14).
template <int COUNT> DEVICE void hold_registers() {
#ifndef PSIGRAPH_HOST
    if (gridDim.z == 1) return;
    u32 held[COUNT];
    for_each<COUNT>([&](auto i) { asm volatile("mov.u32 %0, %%clock;" : "=r"(held[i.index])); });
    for_each<COUNT>([&](auto i) { asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(held[COUNT - 1 - i.index]), "r"(held[i.index]) : "memory"); });
#endif
}

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

// ---------------------------------------------------------------------------------------------------------
// Blocks of a cluster (sm_90 and later): a barrier of all their threads, and values sent to the same place of another
// block's dynamic shared memory. Who receives says how many bytes will come, before that barrier, and waits for them.
// ---------------------------------------------------------------------------------------------------------

#ifdef PSIGRAPH_HOST
DEVICE void cluster_barrier() { host::cluster_barrier(); }
DEVICE void expect_bytes(u64*, int) {}
template <class T> DEVICE void send_to_block(T* mine, int rank, T value, u64*) { *host::map_shared(mine, rank) = value; }
DEVICE void wait_for_bytes(u64*) { host::cluster_barrier(); }
#elif __CUDA_ARCH__ >= 900
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void expect_bytes(u64* barrier, int bytes) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE u32 address_in_block(const void* mine, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
    return there;
}
DEVICE void send_to_block(float4* mine, int rank, float4 value, u64* barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(address_in_block(mine, rank)),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(address_in_block(barrier, rank))
                 : "memory");
}
DEVICE void send_to_block(float2* mine, int rank, float2 value, u64* barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(address_in_block(mine, rank)),
                 "f"(value.x), "f"(value.y), "r"(address_in_block(barrier, rank))
                 : "memory");
}
DEVICE void wait_for_bytes(u64* barrier) { wait_at_barrier(barrier, 0); }
#endif

// ---------------------------------------------------------------------------------------------------------
// Half-precision products of attention: 16 rows x 16 columns of float16 times 16 x 8, float32 sums. A number is cut
// into a high and a low half (float16 each), which stand in neighbouring columns.
// ---------------------------------------------------------------------------------------------------------

// Where column i of a vector stands, so that lane (g, t) reads what it gives to the products of 32 columns in one piece.
DEVICE int column_place(int i) { return (i & ~31) | (i & 6) << 2 | (i & 16) >> 2 | (i & 8) >> 2 | (i & 1); }

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

// ---------------------------------------------------------------------------------------------------------
// Integer products. A *tile* is 16 rows of a weight matrix; a superblock is 16 rows x 256 columns, a chunk 64
// columns of it, a group 16 columns. The activation of a group is scale * (254 * high + low), two signed bytes
// a value (layout `i8x2`): the tensor core multiplies both digits with the weights in one instruction, in
// columns that would be empty otherwise, so the second digit costs nothing.
//
// Lane (g, t) = (lane / 4, lane % 4) owns rows g and g + 8 and group t of every chunk.
// ---------------------------------------------------------------------------------------------------------

// sums[0..1]: row g, group t, times the high and the low digit; sums[2..3]: row g + 8.
// weights[2 j], weights[2 j + 1]: unsigned bytes of rows g and g + 8, columns 16 j + 4 t .. + 3.
// digits: for group lane / 8, digit (lane / 4) % 2, columns 4 t .. + 3.
#ifdef PSIGRAPH_HOST
DEVICE void dot_chunk(int sums[4], const u32 weights[8], u32 digits, int lane) { host::dot_chunk(sums, weights, digits, lane); }
#else
DEVICE void dot_groups(int sums[4], const u32* weights, u32 first_digits, u32 second_digits) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(weights[0]), "r"(weights[1]), "r"(weights[2]), "r"(weights[3]), "r"(first_digits), "r"(second_digits));
}
DEVICE void dot_chunk(int sums[4], const u32 weights[8], u32 digits, int lane) {
    int mine = lane >> 3;
    dot_groups(sums, weights, mine == 0 ? digits : 0u, mine == 1 ? digits : 0u);
    dot_groups(sums, weights + 4, mine == 2 ? digits : 0u, mine == 3 ? digits : 0u);
}
#endif

// The activations of 256 columns, held in registers as lane (g, t) needs them.
// Of group t in chunk c: digits, scale, and bias = scale * the group's integers summed.
// minimum_bias[k]: bias of the 32 columns that a 6-bit minimum covers, half t / 2 of chunk 2 (t % 2) + k.
struct Digits {
    u32 digits[4];
    float scale[4], bias[4], minimum_bias[2];
    u32 number;  // `bits_of_2_23`, for types with minima
    // words, factors: where this lane reads its block (`first_words`, `first_factors`).
    METHOD void load(const uint4* words, const float4* factors) {
        uint4 four = fresh(words);
        float4 a = fresh(factors), b = fresh(factors + 1);
        digits[0] = four.x; digits[1] = four.y; digits[2] = four.z; digits[3] = four.w;
        scale[0] = a.x; bias[0] = a.y; scale[1] = a.z; bias[1] = a.w;
        scale[2] = b.x; bias[2] = b.y; scale[3] = b.z; bias[3] = b.w;
    }
    // Only Q4_K and Q5_K need it.
    METHOD void find_minimum_bias(int lane) {
        number = bits_of_2_23();
        float of_half[4];
#pragma unroll
        for (int c = 0; c < 4; c++) of_half[c] = bias[c] + __shfl_xor_sync(FULL_WARP, bias[c], 1);
        minimum_bias[0] = (lane & 1) ? of_half[2] : of_half[0];
        minimum_bias[1] = (lane & 1) ? of_half[3] : of_half[1];
    }
};

// An i8x2 vector in memory: of every 256 columns 32 lanes x 4 chunks x 4 digits, then 4 groups x 4 chunks x (scale, bias).
#define DIGITS_BLOCK 640
#define DIGITS_STRIDE 40  // words of 16 bytes
// Where lane (g, t) reads the block of a superblock.
DEVICE const uint4* first_words(const u8* vector, int superblock, int lane) { return (const uint4*)(vector + superblock * DIGITS_BLOCK) + lane; }
DEVICE const float4* first_factors(const u8* vector, int superblock, int lane) {
    return (const float4*)(vector + superblock * DIGITS_BLOCK + 512) + 2 * (lane & 3);
}

// The activations of a warp's slice for weights that are floating-point numbers: float32 in shared memory.
struct Floats {
    const float* values;
};

DEVICE int integer_sum(const int* sums) { return 254 * sums[0] + sums[1]; }

// Low nibbles: a chunk is 32 lanes x 16 bytes; word j holds rows g (low nibbles) and g + 8 (high nibbles).
DEVICE int nibble_at(const u8* plane, int row, int column) {
    int lane = (row & 7) * 4 + ((column >> 2) & 3);
    int byte = plane[((column >> 6) * 32 + lane) * 16 + ((column >> 4) & 3) * 4 + (column & 3)];
    return row < 8 ? byte & 15 : byte >> 4;
}
// weights[2 j]: row g; weights[2 j + 1]: 16 times row g + 8, which saves the shift.
DEVICE void spread_nibbles(u32 weights[8], uint4 packed) {
    const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        weights[2 * j] = words[j] & 0x0f0f0f0fu;
        weights[2 * j + 1] = words[j] & 0xf0f0f0f0u;
    }
}

// The 6-bit scales and minima of Q4_K and Q5_K, 256 bytes: three planes of 16 words and 8 pairs of (d, dmin).
// Word 8 h + g serves rows g and g + 8; its byte c serves columns 64 c + 32 h .. + 31:
//   plane 0: scale of row g, and bits 4 and 5 of its minimum above it; plane 1: the same for row g + 8;
//   plane 2: low 4 bits of the minima of rows g and g + 8.
struct SixBit {
    u32 low_scales, high_scales, low_minima, high_minima;  // one byte a chunk
    float2 low_d, high_d;                                  // (d, dmin)
    METHOD void load(const u8* header, int g, int half) {
        const u32* planes = (const u32*)header + half * 8 + g;
        u32 a = planes[0], b = planes[16], c = planes[32];
        low_scales = a & 0x3f3f3f3fu;
        high_scales = b & 0x3f3f3f3fu;
        low_minima = (c & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
        high_minima = ((c >> 4) & 0x0f0f0f0fu) | ((b >> 2) & 0x30303030u);
        uint2 d = ((const uint2*)(header + 192))[g];
        low_d = halves_to_floats(d.x);
        high_d = halves_to_floats(d.y);
    }
};

// What Q4_K and Q5_K share: value = d * scale * quant - dmin * minimum. QUANTS::HIGH: what its high rows are multiplied with.
template <class QUANTS>
DEVICE void dot_with_minimum(const u8* superblock, const u8* header, const Digits& x, int lane, float& low_row, float& high_row) {
    SixBit six;
    six.load(header, lane >> 2, (lane >> 1) & 1);
    float low = 0.0f, high = 0.0f;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        u32 weights[8];
        QUANTS::unpack(weights, superblock, c, lane);
        int sums[4] = {0, 0, 0, 0};
        dot_chunk(sums, weights, x.digits[c], lane);
        low += x.scale[c] * byte_to_float(six.low_scales, c, x.number) * (float)integer_sum(sums);
        high += x.scale[c] * byte_to_float(six.high_scales, c, x.number) * (float)integer_sum(sums + 2);
    }
    const int at = 2 * (lane & 1);
    float first = x.minimum_bias[0], second = x.minimum_bias[1];
    low_row += six.low_d.x * low - six.low_d.y * (byte_to_float(six.low_minima, at, x.number) * first + byte_to_float(six.low_minima, at + 1, x.number) * second);
    high_row += six.high_d.x * (1.0f / QUANTS::HIGH) * high -
                six.high_d.y * (byte_to_float(six.high_minima, at, x.number) * first + byte_to_float(six.high_minima, at + 1, x.number) * second);
}
DEVICE float value_with_minimum(const u8* header, int quant, int row, int column) {
    SixBit six;
    six.load(header, row & 7, (column >> 5) & 1);
    float2 d = row < 8 ? six.low_d : six.high_d;
    int chunk = column >> 6;
    float scale = byte_to_float(row < 8 ? six.low_scales : six.high_scales, chunk);
    return d.x * scale * (float)quant - d.y * byte_to_float(row < 8 ? six.low_minima : six.high_minima, chunk);
}

// Q4_K: 4 chunks of nibbles (2,048 bytes), then scales and minima.
struct Q4K {
    static constexpr int BYTES = 2304, HIGH = 16;
    DEVICE void unpack(u32 weights[8], const u8* superblock, int chunk, int lane) { spread_nibbles(weights, ((const uint4*)superblock)[chunk * 32 + lane]); }
    DEVICE void dot(const u8* superblock, const Digits& x, int lane, float& low_row, float& high_row) {
        dot_with_minimum<Q4K>(superblock, superblock + 2048, x, lane, low_row, high_row);
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        return value_with_minimum(superblock + 2048, nibble_at(superblock, row, column), row, column);
    }
};

// Q5_K: nibbles, then 4 chunks of fifth bits (32 lanes x 4 bytes; bit 2 j + (row >= 8) of a byte), then scales and minima.
struct Q5K {
    static constexpr int BYTES = 2816, HIGH = 1;
    DEVICE void unpack(u32 weights[8], const u8* superblock, int chunk, int lane) {
        uint4 packed = ((const uint4*)superblock)[chunk * 32 + lane];
        const u32 words[4] = {packed.x, packed.y, packed.z, packed.w};
        u32 bits = ((const u32*)(superblock + 2048))[chunk * 32 + lane];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 nibbles = (i & 1) ? words[i >> 1] >> 4 : words[i >> 1];
            weights[i] = (nibbles & 0x0f0f0f0fu) | ((i < 4 ? bits << (4 - i) : bits >> (i - 4)) & 0x10101010u);
        }
    }
    DEVICE void dot(const u8* superblock, const Digits& x, int lane, float& low_row, float& high_row) {
        dot_with_minimum<Q5K>(superblock, superblock + 2560, x, lane, low_row, high_row);
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3);
        int byte = superblock[2048 + ((column >> 6) * 32 + lane) * 4 + (column & 3)];
        int fifth = (byte >> (((column >> 4) & 3) * 2 + (row >= 8))) & 1;
        return value_with_minimum(superblock + 2560, nibble_at(superblock, row, column) + 16 * fifth, row, column);
    }
};

// Q6_K: nibbles, then bits 4 and 5 (2 x 32 lanes x 16 bytes: word i = 2 j + (row >= 8), bits 2 c and 2 c + 1 of a byte
// for chunk c), then int8 scales as lane (g, t) reads them (row g chunks 0..3, row g + 8 chunks 0..3), then d of 16 rows.
// value = d * scale * (quant - 32). Nibbles and high bits go through the tensor core apart, each masked in place:
// that is one instruction a word instead of three.
struct Q6K {
    static constexpr int BYTES = 3360;
    DEVICE void dot(const u8* superblock, const Digits& x, int lane, float& low_row, float& high_row) {
        uint4 first = ((const uint4*)(superblock + 2048))[lane], second = ((const uint4*)(superblock + 2560))[lane];
        const u32 bits[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
        uint2 scales = ((const uint2*)(superblock + 3072))[lane];
        const u16* d = (const u16*)(superblock + 3328);
        float low = 0.0f, high = 0.0f;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            u32 weights[8];
            spread_nibbles(weights, ((const uint4*)superblock)[c * 32 + lane]);
            int nibbles[4] = {0, 0, 0, 0}, highs[4] = {0, 0, 0, 0};
            u32 digits = x.digits[c];
            dot_chunk(nibbles, weights, digits, lane);
#pragma unroll
            for (int i = 0; i < 8; i++) weights[i] = bits[i] & (0x03030303u << (2 * c));
            dot_chunk(highs, weights, digits, lane);
            // highs are 4^c times the two bits, and stand 16 times higher; the nibbles of row g + 8 are 16 times theirs.
            constexpr int UP[4] = {16, 4, 1, 1}, DOWN[4] = {1, 1, 1, 4};
            int low_sum = DOWN[c] * integer_sum(nibbles) + UP[c] * integer_sum(highs);
            int high_sum = integer_sum(nibbles + 2) + (256 >> (2 * c)) * integer_sum(highs + 2);
            float scale = x.scale[c], zero = 32.0f * x.bias[c];
            low += signed_byte_to_float(scales.x, c) * (scale * (1.0f / DOWN[c]) * (float)low_sum - zero);
            high += signed_byte_to_float(scales.y, c) * (scale * (1.0f / 16.0f) * (float)high_sum - zero);
        }
        low_row += half_to_float(d[lane >> 2]) * low;
        high_row += half_to_float(d[(lane >> 2) + 8]) * high;
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int g = row & 7, lane = g * 4 + ((column >> 2) & 3), chunk = column >> 6, group = (column >> 4) & 3, i = 2 * group + (row >= 8);
        int byte = superblock[2048 + (i >> 2) * 512 + lane * 16 + (i & 3) * 4 + (column & 3)];
        int high_bits = (byte >> (2 * chunk)) & 3;
        int scale = ((const s8*)superblock)[3072 + (g * 4 + group) * 8 + (row >= 8) * 4 + chunk];
        return half_to_float(((const u16*)(superblock + 3328))[row]) * (float)scale * (float)(nibble_at(superblock, row, column) + 16 * high_bits - 32);
    }
};

// Q8_0: bytes + 128 so that they are unsigned (4 chunks x 2 halves x 32 lanes x 16 bytes; word 2 (j % 2) + (row >= 8)
// of half j / 2), then 8 halves of scales a row. value = d * (quant - 128).
struct Q80 {
    static constexpr int BYTES = 4352;
    DEVICE void dot(const u8* superblock, const Digits& x, int lane, float& low_row, float& high_row) {
        const uint4* scales = (const uint4*)(superblock + 4096);
        uint4 low_scales = scales[lane >> 2], high_scales = scales[(lane >> 2) + 8];
        const u32 low_words[4] = {low_scales.x, low_scales.y, low_scales.z, low_scales.w};
        const u32 high_words[4] = {high_scales.x, high_scales.y, high_scales.z, high_scales.w};
        int shift = ((lane >> 1) & 1) * 16;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            uint4 a = ((const uint4*)superblock)[(c * 2) * 32 + lane], b = ((const uint4*)superblock)[(c * 2 + 1) * 32 + lane];
            const u32 weights[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
            int sums[4] = {0, 0, 0, 0};
            dot_chunk(sums, weights, x.digits[c], lane);
            float scale = x.scale[c], zero = 128.0f * x.bias[c];
            low_row += half_to_float((u16)(low_words[c] >> shift)) * (scale * (float)integer_sum(sums) - zero);
            high_row += half_to_float((u16)(high_words[c] >> shift)) * (scale * (float)integer_sum(sums + 2) - zero);
        }
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3), group = (column >> 4) & 3;
        int quant = superblock[(((column >> 6) * 2 + (group >> 1)) * 32 + lane) * 16 + ((group & 1) * 2 + (row >= 8)) * 4 + (column & 3)];
        return half_to_float(((const u16*)(superblock + 4096))[row * 8 + (column >> 5)]) * (float)(quant - 128);
    }
};

// Floating-point weights: group by group (16 columns), 32 lanes x (4 values of row g, 4 of row g + 8).
template <class NUMBER> struct FloatTiles {
    static constexpr int LANE = 8 * NUMBER::BYTES_EACH;
    static constexpr int BYTES = 16 * 32 * LANE;
    DEVICE void dot(const u8* superblock, const Floats& x, int lane, float& low_row, float& high_row) {
#pragma unroll 4
        for (int group = 0; group < 16; group++) {
            float4 a = *(const float4*)(x.values + group * 16 + (lane & 3) * 4);
            float4 low, high;
            NUMBER::load(superblock, group * 32 + lane, low, high);
            low_row += low.x * a.x + low.y * a.y + (low.z * a.z + low.w * a.w);
            high_row += high.x * a.x + high.y * a.y + (high.z * a.z + high.w * a.w);
        }
    }
    DEVICE float element(const u8* superblock, int row, int column) {
        int lane = (row & 7) * 4 + ((column >> 2) & 3), index = column & 3;
        float4 low, high;
        NUMBER::load(superblock, (column >> 4) * 32 + lane, low, high);
        float4 four = row < 8 ? low : high;
        return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
    }
};
struct HalfNumber {
    static constexpr int BYTES_EACH = 2;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        uint4 v = ((const uint4*)superblock)[at];
        float2 a = halves_to_floats(v.x), b = halves_to_floats(v.y), c = halves_to_floats(v.z), d = halves_to_floats(v.w);
        low = make_float4(a.x, a.y, b.x, b.y);
        high = make_float4(c.x, c.y, d.x, d.y);
    }
};
struct BfloatNumber {
    static constexpr int BYTES_EACH = 2;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        uint4 v = ((const uint4*)superblock)[at];
        low = make_float4(bits_to_float(v.x << 16), bits_to_float(v.x & 0xffff0000u), bits_to_float(v.y << 16), bits_to_float(v.y & 0xffff0000u));
        high = make_float4(bits_to_float(v.z << 16), bits_to_float(v.z & 0xffff0000u), bits_to_float(v.w << 16), bits_to_float(v.w & 0xffff0000u));
    }
};
struct FloatNumber {
    static constexpr int BYTES_EACH = 4;
    DEVICE void load(const u8* superblock, int at, float4& low, float4& high) {
        low = ((const float4*)superblock)[2 * at];
        high = ((const float4*)superblock)[2 * at + 1];
    }
};
typedef FloatTiles<HalfNumber> F16;
typedef FloatTiles<BfloatNumber> BF16;
typedef FloatTiles<FloatNumber> F32;

// ---------------------------------------------------------------------------------------------------------
// Sums within a warp, in a fixed order, so that two runs give the same bits.
// ---------------------------------------------------------------------------------------------------------

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

// Largest of a warp. As integers, floats below zero order the other way round.
#ifdef PSIGRAPH_HOST
DEVICE float warp_max(float value) { return lanes_max(value, 32); }
#else
DEVICE float warp_max(float value) {
    int bits = (int)float_to_bits(value), largest;
    asm("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(largest) : "r"(bits ^ ((bits >> 31) & 0x7fffffff)));
    return bits_to_float((u32)(largest ^ ((largest >> 31) & 0x7fffffff)));
}
#endif
// Over each half of the warp; no float below zero. Two instructions of the whole warp take less time than four shuffles.
#ifdef PSIGRAPH_HOST
DEVICE float half_warp_max(float value) { return lanes_max(value, 16); }
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

// Bytes `odd` and `odd` + 2 of both words.
#ifdef PSIGRAPH_HOST
DEVICE u32 every_other_byte(u32 first, u32 second, int odd) {
    first >>= 8 * odd, second >>= 8 * odd;
    return (first & 0xffu) | ((first >> 8) & 0xff00u) | ((second & 0xffu) << 16) | ((second << 8) & 0xff000000u);
}
#else
DEVICE u32 every_other_byte(u32 first, u32 second, int odd) { return __byte_perm(first, second, odd ? 0x7531 : 0x6420); }
#endif

// Write one value of an i8x2 vector, COPIES times at every COPY_BYTES. 16 neighbouring lanes hold one group; all 32 lanes
// call it, those with `inside` false write nothing (a whole group is inside or outside). index: the value's place.
template <int COPIES, int COPY_BYTES> DEVICE void store_digits(u8* vector, int index, float value, bool inside) {
    float amax = half_warp_max(fabsf(value));  // on a GPU what is no number is larger than all: its group becomes zeros
    bool alive = amax >= 1.50463277e-36f;  // 128 * smallest normal number: below, 127 / amax could overflow
    float inverse = divide(127.0f, alive ? amax : 1.0f);  // no branch around it, so that it overlaps with what is beside it
    float scaled = alive ? value * inverse : 0.0f;
    int high = round_to_int(scaled);
    int low = round_to_int((scaled - (float)high) * 254.0f);
    int sum = half_warp_sum(254 * high + low);
    // The four lanes of a word know all of it, and each of them writes other copies.
    const int quad = index & 3, chunk = (index >> 6) & 3, group = (index >> 4) & 3;
    u32 mine = ((u32)high & 0xffu) | (((u32)low & 0xffu) << 8), other = __shfl_xor_sync(FULL_WARP, mine, 1);
    mine = (quad & 1) ? other | (mine << 16) : mine | (other << 16);
    other = __shfl_xor_sync(FULL_WARP, mine, 2);
    u32 first = (quad & 2) ? other : mine, second = (quad & 2) ? mine : other;
    u8* const block = vector + (index >> 8) * DIGITS_BLOCK;
    u32* const words = (u32*)(block + (group * 8 + ((index >> 2) & 3)) * 16) + chunk;
    float2* const factor = (float2*)(block + 512) + group * 4 + chunk;
    float scale = alive ? amax * (1.0f / 32258.0f) : 0.0f;
#pragma unroll
    for (int copy = 0; copy < COPIES; copy += 4) {
        const int at = (copy + quad) * COPY_BYTES;
        if (!inside || copy + quad >= COPIES) continue;
        *(u32*)((u8*)words + at) = every_other_byte(first, second, 0);
        *(u32*)((u8*)words + at + 64) = every_other_byte(first, second, 1);
        if ((index & 12) == 0) *(float2*)((u8*)factor + at) = make_float2(scale, scale * (float)sum);
    }
}

// 1 / sqrt(mean of squares + eps) from at most 32 * TURNS partial sums of squares; all 32 lanes of one warp call it.
template <int TURNS> DEVICE float factor_from_parts(const float* parts, int count, float inverse_size, float eps, int lane) {
    float part[TURNS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < TURNS; i++) part[i] = i * 32 + lane < count ? fresh(parts + i * 32 + lane) : 0.0f;
#pragma unroll
    for (int i = 0; i < TURNS; i++) sum += part[i];
    return rsqrtf(lanes_sum(sum, 32) * inverse_size + eps);
}

// A key that orders by value, then by lowest index; a number that is not one counts as lowest of all.
DEVICE u64 choice_key(float value, int index) {
    u32 bits = float_to_bits(value);
    bits = value == value ? ((bits & 0x80000000u) ? ~bits : bits | 0x80000000u) : 0u;
    return ((u64)bits << 32) | (0xffffffffu - (u32)index);
}
DEVICE int choice_index(u64 key) { return (int)(0xffffffffu - (u32)key); }

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
