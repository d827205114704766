// Loads that say how they are meant, bulk copies, the programmatic wait.
#ifndef PSIGRAPH_HOST_DEVICE_MEMORY_H
#define PSIGRAPH_HOST_DEVICE_MEMORY_H
#include "collectives.h"

namespace host {

template <class T> static inline T fresh(const T* p) {
    HOST_WATCH(WatchAs as(WATCH_FRESH));
    T value = *p;
    return value;
}
// Memory of the running step's buffers that only earlier steps wrote: it may be read before the wait.
template <class T> static inline T from_earlier_step(const T* p) {
    HOST_WATCH(WatchAs as(WATCH_EARLIER));
    T value = *p;
    return value;
}
template <class T> static inline T non_coherent(const T* p) {
    HOST_WATCH(WatchAs as(WATCH_NON_COHERENT));
    T value = *p;
    return value;
}

// cp.async.bulk with an mbarrier that one warp waits at. The bytes arrive as late as they may: when somebody
// waits. Until then the target holds NaN, so that a read before the wait shows. The barrier's word counts its
// completed phases; its upper half names the copy under way.
static inline void bulk_open(unsigned long long* barriers, int lane, int count) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    for (int i = lane; i < count; i += 32) barriers[i] = 0;
    warp_barrier();
}
static void wake_pollers(const Block& block) {
    for (unsigned w = block.rank * warps_each, end = w + warps_each; w < end; w++) {
        warps[w].ready |= warps[w].polling;
        warps[w].polling = 0;
    }
}
static void poll() {
    self->warp->polling |= 1u << self->lane;  // until the next event of this block
    leave_ready();
    advance();
}
static inline void bulk_issue(unsigned long long* barrier, void* to, const void* from, int bytes) {
    if (bytes <= 0 || ((uintptr_t)to | (uintptr_t)from | (unsigned)bytes) & 15) fail("misaligned", "a bulk copy of %d bytes from %p to %p", bytes, from, to);
    Block& block = *self->block;
    unsigned slot = 0;
    while (slot < MOST_COPIES && block.copies[slot].to) slot++;
    if (slot == MOST_COPIES) fail("bulk copy", "a block has more than %u under way", MOST_COPIES);
    HOST_WATCH(watch_issued(to, from, bytes); WatchAs as(WATCH_ATOMIC));
    memset(to, 0xFF, bytes);
    if (*barrier >> 32) fail("bulk copy", "it was issued to a stage that nobody has waited for since the last one");
    block.copying++;
    block.copies[slot] = {(char*)to, (const char*)from, bytes};
    *barrier |= (unsigned long long)(slot + 1) << 32;
    wake_pollers(block);
}
// mbarrier.try_wait.parity until it succeeds: `phase` of this barrier has completed.
static inline void bulk_wait(unsigned long long* barrier, int phase) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    unsigned phases, slot;
    for (;;) {
        phases = (unsigned)*barrier;
        slot = (unsigned)(*barrier >> 32);
        if ((phases ^ phase) & 1) return;
        if (slot) break;
        poll();
    }
    BulkCopy& copy = self->block->copies[slot - 1];
    memcpy(copy.to, copy.from, copy.bytes);
    HOST_WATCH(watch_arrived(copy.to, copy.bytes));
    copy.to = nullptr;
    self->block->copying--;
    *barrier = phases + 1;
}

// mbarrier.arrive at a barrier of `readers` arrivals a phase, and the wait for `phase` of it: a stage at `to` has
// been read by all of them. The barrier's upper half counts the arrivals.
static inline void stage_read(unsigned long long* barrier, unsigned readers) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    *barrier += 1ull << 32;
    if (*barrier >> 32 < readers) return;
    *barrier = (unsigned)*barrier + 1;
    wake_pollers(*self->block);
}
static inline void stage_free(unsigned long long* barrier, int phase, void* to, int bytes) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    while (!(((unsigned)*barrier ^ phase) & 1)) poll();
    HOST_WATCH(watch_arrived(to, bytes));
    (void)to, (void)bytes;
}

// %globaltimer
static inline unsigned long long clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

static inline void grid_trigger() {}
static inline void grid_wait() {
    self->waited = self->block->waited = true;
    HOST_WATCH(watch_thread(self->block->linear, self->index, true, true));
}

}  // namespace host

#endif
