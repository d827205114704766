// Weights on their way into shared memory.
#ifndef PSIGRAPH_RING_CUH
#define PSIGRAPH_RING_CUH

#include "base.cuh"

// == A ring of stages in shared memory for the weights of the warps that share a tile (READERS): a stage holds as many
// superblocks as there are warps, one each. On sm_90 and later one thread of the block fills it by one bulk copy;
// elsewhere each warp fetches its own superblock by 16-byte asynchronous copies, and bytes = 0 keeps the count
// of copies in step where there is nothing left to copy.
// barriers: 2 * DEPTH words of shared memory, DEPTH for stages that have arrived and DEPTH for those that were read.

#ifdef PSIGRAPH_HOST
template <int DEPTH, int READERS> struct Ring {
    DEVICE void open(u64* barriers, int stage) { barriers[stage] = barriers[DEPTH + stage] = 0; }
    DEVICE void fill(u64* barriers, int stage, u8* target, const u8* source, int bytes, int) { host::bulk_issue(barriers + stage, target, source, bytes); }
    DEVICE void pace(u64*, int) {}
    DEVICE void wait(u64* barriers, int stage, int phase) { host::bulk_wait(barriers + stage, phase); }
    DEVICE void give_back(u64* barriers, int stage, int lane) {
        host::warp_barrier();
        if (lane == 0) host::stage_read(barriers + DEPTH + stage, READERS);
    }
    DEVICE void wait_until_read(u64* barriers, int stage, int phase, u8* target, int bytes) {
        host::stage_free(barriers + DEPTH + stage, phase, target, bytes);
    }
    DEVICE void fetch(u8* target, const u8* source, int bytes, int lane) {
        for (int at = lane * 16; at < bytes; at += 512) *(uint4*)(target + at) = *(const uint4*)(source + at);
    }
    DEVICE void wait_for_copies() { host::warp_barrier(); }
};
#elif __CUDA_ARCH__ >= 900
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void wait_at_barrier(const u64* barrier, int phase) {
    u32 address = shared_address(barrier), done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(address), "r"(phase & 1)
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
    DEVICE void wait(u64* barriers, int stage, int phase) { wait_at_barrier(barriers + stage, phase); }
    DEVICE void give_back(u64* barriers, int stage, int lane) {
        __syncwarp();
        if (lane == 0) asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barriers + DEPTH + stage)) : "memory");
    }
    DEVICE void wait_until_read(u64* barriers, int stage, int phase, u8*, int) { wait_at_barrier(barriers + DEPTH + stage, phase); }
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

#endif
