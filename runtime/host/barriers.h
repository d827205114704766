// Barriers of a block, a cluster and a grid; named barriers; shared memory of other blocks.
#ifndef PSIGRAPH_HOST_BARRIERS_H
#define PSIGRAPH_HOST_BARRIERS_H
#include "fibers.h"

namespace host {

// Everyone who meets at a barrier has seen what anyone of them has waited for.
static void share_wait(Block* block) {
    bool any = false;
    Fiber* of_block = fibers + block->rank * threads_each;
    for (unsigned i = 0; i < threads_each; i++) any |= of_block[i].waited;
    for (unsigned i = 0; any && i < threads_each; i++) of_block[i].waited = true;
}
static void release_block(Block* block) {
    for (unsigned w = block->rank * warps_each, end = w + warps_each; w < end; w++) warps[w].ready = warps[w].lanes & ~warps[w].done;
    HOST_WATCH(share_wait(block); watch_barrier(block->linear); watch_thread(self->block->linear, self->index, self->block->waited, self->waited));
}

static void block_barrier(unsigned line) {
    Block* block = self->block;
    if (!block->arrived) block->arrived_line = line;
    if (block->arrived_line != line)
        fail("divergent barrier", "the thread is at __syncthreads in line %u while others wait in line %u", line, block->arrived_line);
    if (block->done) fail("divergent barrier", "__syncthreads (line %u) after %u threads have returned", line, block->done);
    leave_ready();
    if (++block->arrived == threads_each) {
        block->arrived = 0;
        release_block(block);
    }
    advance();
}

// Of the cluster, or of the grid where all blocks run together.
static void group_barrier() {
    leave_ready();
    if (++group_arrived == fiber_count) {
        group_arrived = 0;
        for (unsigned b = 0; b < fiber_count / threads_each; b++) release_block(&blocks[b]);
    }
    advance();
}
static inline void cluster_barrier() { group_barrier(); }
static inline void grid_barrier() {
    if (fiber_count / threads_each != grid_size.x * grid_size.y * grid_size.z) fail("launch", "a grid barrier needs a cooperative launch");
    group_barrier();
}

// bar.sync id, threads (wait) and bar.arrive id, threads (no wait).
static void named_barrier(unsigned id, unsigned threads, bool wait = true) {
    Block* block = self->block;
    if (id >= NAMED_BARRIERS) fail("launch", "named barrier %u does not exist", id);
    if (threads == 0 || threads % 32 || threads > (threads_each + 31) / 32 * 32) fail("launch", "a named barrier for %u threads", threads);
    bool last = ++block->named_arrived[id] == threads;
    if (wait) {
        leave_ready();
        self->named = id;
    }
    if (last) {
        block->named_arrived[id] = 0;
        Fiber* of_block = fibers + block->rank * threads_each;
        for (unsigned i = 0; i < threads_each; i++) {
            if (of_block[i].named != id) continue;
            of_block[i].named = NOT_NAMED;
            of_block[i].warp->ready |= 1u << of_block[i].lane;
        }
        // The watch knows barriers of the whole block only: it takes a named one for such, and so sees less.
        HOST_WATCH(watch_barrier(block->linear));
    }
    if (wait) advance();
}

static inline unsigned cluster_rank() { return self->block->rank; }
static inline unsigned cluster_size() { return fiber_count / threads_each; }
// Where a piece of this block's dynamic shared memory lies in the block of another rank.
template <class T> static T* map_shared(T* mine, unsigned rank) {
    if (rank >= cluster_size()) fail("launch", "rank %u in a cluster of %u blocks", rank, cluster_size());
    size_t at = (char*)mine - self->block->dynamic;
    if (at >= launch->shared_bytes) fail("launch", "only dynamic shared memory can be reached in another block");
    return (T*)(blocks[rank].dynamic + at);
}
template <class T> static inline T* dynamic_shared() { return (T*)self->block->dynamic; }

}  // namespace host

#endif
