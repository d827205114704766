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

// cp.async.bulk with an mbarrier that belongs to one warp. The bytes arrive as late as they may: when somebody
// waits. Until then the target holds NaN, so that a read before the wait shows. The barrier's word counts its
// completed phases; its upper half names the copy under way.
static inline void bulk_open(unsigned long long* barriers, int lane, int depth) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    if (lane < depth) barriers[lane] = 0;
    warp_barrier();
}
static inline void bulk_issue(unsigned long long* barrier, void* to, const void* from, int bytes) {
    if (bytes <= 0 || ((uintptr_t)to | (uintptr_t)from | (unsigned)bytes) & 15) fail("misaligned", "a bulk copy of %d bytes from %p to %p", bytes, from, to);
    Warp& warp = *self->warp;
    if (warp.copying == ~0u) fail("bulk copy", "a warp has more than 32 under way");
    unsigned slot = __builtin_ctz(~warp.copying);
    HOST_WATCH(watch_issued(to, from, bytes); WatchAs as(WATCH_ATOMIC));
    memset(to, 0xFF, bytes);
    if (*barrier >> 32) fail("bulk copy", "it was issued to a stage that nobody has waited for since the last one");
    warp.copying |= 1u << slot;
    warp.copies[slot] = {(char*)to, (const char*)from, bytes};
    *barrier |= (unsigned long long)(slot + 1) << 32;
    warp.ready |= warp.polling;
    warp.polling = 0;
}
// mbarrier.try_wait.parity until it succeeds: phase `turn` of this barrier has completed.
static inline void bulk_wait(unsigned long long* barrier, int turn) {
    HOST_WATCH(WatchAs as(WATCH_ATOMIC));
    unsigned phases, slot;
    for (;;) {
        phases = (unsigned)*barrier;
        slot = (unsigned)(*barrier >> 32);
        if ((phases ^ turn) & 1) return;
        if (slot) break;
        self->warp->polling |= 1u << self->lane;  // until the next bulk_issue of this warp
        leave_ready();
        advance();
    }
    Warp& warp = *self->warp;
    BulkCopy& copy = warp.copies[slot - 1];
    memcpy(copy.to, copy.from, copy.bytes);
    HOST_WATCH(watch_arrived(copy.to, copy.bytes));
    warp.copying &= ~(1u << (slot - 1));
    *barrier = phases + 1;
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
