// Values sent between the blocks of a cluster.
#ifndef PSIGRAPH_CLUSTER_CUH
#define PSIGRAPH_CLUSTER_CUH

#include "ring.cuh"

// == Blocks of a cluster (sm_90 and later): a barrier of all their threads, and values sent to the same place of another
// block's dynamic shared memory. Who receives says how many bytes will come, before that barrier, and waits for them.

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

#endif
