// Watches every load and store of one launch: the hooks of ThreadSanitizer's instrumentation, with rules of our
// own in place of its runtime. Compiled without that instrumentation, linked into kernels of the `watch` build.
//
// Rules, by the kind that a report names:
//   write to input    a buffer was written that the launch does not list as written
//   early write       a global write before the programmatic wait
//   early read        a buffer that an earlier kernel of the step writes was read before the wait
//   stale read        such a buffer was read by a load that may come from a stale line (not `fresh`), unless the
//                     same block had written the bytes
//   race              two threads touch the same bytes, one of them writes, and no barrier lies between; or two
//                     blocks do, and neither fence nor atomic orders them
#include "watch.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

namespace {

// One access, as much of it as later ones need. Barriers and warp barriers count epochs.
struct Access {
    unsigned block = 0, thread = 0;  // thread + 1; 0: none
    unsigned block_epoch = 0, warp_epoch = 0;
};
struct Cell {
    Access write, first_read, last_read;  // reads since the write: the first, and the last by somebody else
    bool in_flight = false;                // a bulk copy is on its way here
};

struct BlockState {
    const char *dynamic = nullptr, *statics = nullptr;
    size_t dynamic_bytes = 0, static_bytes = 0;
    std::vector<Cell> dynamic_cells, static_cells;
    std::vector<std::vector<void*>> stacks;  // of calls, one a thread
    unsigned epoch = 1;
    unsigned warp_epochs[32] = {};
    bool acquired = false;  // has executed a fence or an atomic: it may know of other blocks' writes
};

const host_launch* launch;
std::map<unsigned, BlockState> blocks;
std::vector<std::vector<Cell>> region_cells;
BlockState* here;
unsigned block_now, thread_now;
bool waited_now, reporting;

std::string where(void* pc) {
    std::string text;
    std::vector<void*> chain = {pc};
    const auto& stack = here->stacks[thread_now];
    for (size_t i = stack.size(); i-- && chain.size() < 8;) chain.push_back(stack[i]);
    for (void* one : chain) {
        Dl_info info;
        if (!one || !dladdr(one, &info)) continue;
        char part[32];
        snprintf(part, sizeof part, "%s+0x%zx", text.empty() ? "" : ",", (size_t)((char*)one - (char*)info.dli_fbase - 1));
        text += part;
    }
    return text;
}

// check.py turns the places after "@" into lines of the kernel's text.
__attribute__((format(printf, 3, 4))) void report(const char* kind, void* pc, const char* format, ...) {
    if (reporting) return;
    reporting = true;
    char text[400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    host_watch_failed(kind, (std::string(text) + " @" + where(pc)).c_str());
}

Access now() { return {block_now, thread_now + 1, here->epoch, here->warp_epochs[thread_now >> 5]}; }

// Whether `before` is known to have happened before what the running thread does now.
bool ordered(const Access& before) {
    if (!before.thread) return true;
    if (before.block != block_now) return here->acquired;
    if (before.thread == thread_now + 1 || here->epoch > before.block_epoch) return true;
    unsigned warp = (before.thread - 1) >> 5;
    return warp == thread_now >> 5 && here->warp_epochs[warp] > before.warp_epoch;
}

void touch(Cell& cell, bool write, const char* what, size_t at, void* pc) {
    const Access* other = nullptr;
    if (cell.in_flight)
        return report("bulk copy", pc, "%s byte %zu of %s before the bulk copy to it was waited for", write ? "writes" : "reads", at, what);
    if (!ordered(cell.write)) other = &cell.write;
    else if (write && !ordered(cell.first_read)) other = &cell.first_read;
    else if (write && !ordered(cell.last_read)) other = &cell.last_read;
    if (other) {
        const char* theirs = other == &cell.write ? "wrote" : "read";
        return report("race", pc, "%s byte %zu of %s, which block %u thread %u %s with no barrier between", write ? "writes" : "reads", at, what,
                      other->block, other->thread - 1, theirs);
    }
    Access mine = now();
    if (write) cell = {mine, {}, {}, false};
    else if (!cell.first_read.thread || cell.first_read.thread == mine.thread) cell.first_read = mine;
    else cell.last_read = mine;
}

void in_region(unsigned index, const char* from, size_t size, bool write, watch_how how, void* pc) {
    const host_region& region = launch->regions[index];
    size_t at = from - region.base;
    bool early = launch->programmatic && !waited_now;
    if (write && !region.writable) return report("write to input", pc, "writes byte %zu of argument %u", at, region.argument);
    if (write && early) return report("early write", pc, "writes byte %zu of argument %u before the programmatic wait", at, region.argument);
    if (!write && early && region.produced && how != WATCH_EARLIER)
        return report("early read", pc, "reads byte %zu of argument %u, which an earlier kernel writes, before the programmatic wait", at,
                      region.argument);
    auto& cells = region_cells[index];
    char what[32];
    snprintf(what, sizeof what, "argument %u", region.argument);
    for (size_t i = at; i < at + size && i < region.bytes; i++) {
        if (!write && region.produced && (how == WATCH_PLAIN || how == WATCH_NON_COHERENT)) {
            bool own = region.writable && cells[i].write.thread && cells[i].write.block == block_now;
            if (!own) return report("stale read", pc, "reads byte %zu of %s, which an earlier kernel writes, by a load that is not `fresh`", i, what);
        }
        if (!region.writable) continue;
        if (how == WATCH_ATOMIC) cells[i] = Cell{};  // ordered by itself; what it orders is not followed
        else touch(cells[i], write, what, i, pc);
        if (reporting) return;
    }
}

void access(const void* address, size_t size, bool write, watch_how how, void* pc) {
    if (!launch || !here || reporting) return;
    const char* from = (const char*)address;
    for (auto& [linear, block] : blocks) {  // more than one only in a cluster
        if (from < block.dynamic || from >= block.dynamic + block.dynamic_bytes) continue;
        size_t at = from - block.dynamic;
        for (size_t i = at; i < at + size && i < block.dynamic_bytes && !reporting; i++)
            if (how != WATCH_ATOMIC) touch(block.dynamic_cells[i], write, "dynamic shared memory", i, pc);
        return;
    }
    if (from >= here->statics && from < here->statics + here->static_bytes) {
        size_t at = from - here->statics;
        for (size_t i = at; i < at + size && i < here->static_bytes && !reporting; i++)
            if (how != WATCH_ATOMIC) touch(here->static_cells[i], write, "static shared memory", i, pc);
        return;
    }
    for (unsigned i = 0; i < launch->region_count; i++)
        if (from >= launch->regions[i].base && from < launch->regions[i].base + launch->regions[i].bytes)
            return in_region(i, from, size, write, how, pc);
}

}  // namespace

watch_how watch_access = WATCH_PLAIN;

void watch_launch(const host_launch* what) {
    launch = what;
    blocks.clear();
    here = nullptr;
    reporting = false;
    watch_access = WATCH_PLAIN;
    region_cells.assign(what->region_count, {});
    for (unsigned i = 0; i < what->region_count; i++)
        if (what->regions[i].writable) region_cells[i].resize(what->regions[i].bytes);
}
void watch_block(unsigned block, unsigned threads, const char* dynamic, size_t dynamic_bytes, const char* statics, size_t static_bytes) {
    for (auto one = blocks.begin(); one != blocks.end();) one = one->second.dynamic == dynamic ? blocks.erase(one) : ++one;
    BlockState& state = blocks[block];
    state.dynamic = dynamic;
    state.dynamic_bytes = dynamic_bytes;
    state.statics = statics;
    state.static_bytes = static_bytes;
    state.dynamic_cells.resize(dynamic_bytes);
    state.static_cells.resize(static_bytes);
    state.stacks.resize(threads);
    here = nullptr;
}
void watch_thread(unsigned block, unsigned thread, bool, bool waited) {
    here = &blocks[block];
    block_now = block;
    thread_now = thread;
    waited_now = waited;
}
void watch_barrier(unsigned block) {
    blocks[block].epoch++;
    if (launch->together > 1) blocks[block].acquired = true;
}
void watch_warp(unsigned block, unsigned warp) { blocks[block].warp_epochs[warp]++; }
void watch_fence() { here->acquired = true; }

static void mark(const void* to, size_t bytes, bool in_flight) {
    Cell cell;
    cell.in_flight = in_flight;
    size_t at = (const char*)to - here->dynamic;
    for (size_t i = at; i < at + bytes && i < here->dynamic_bytes; i++) here->dynamic_cells[i] = cell;
}
void watch_issued(const void* to, const void* from, size_t bytes) {
    access(from, bytes, false, WATCH_FRESH, __builtin_return_address(0));
    access(to, bytes, true, WATCH_PLAIN, __builtin_return_address(0));
    mark(to, bytes, true);
}
void watch_arrived(const void* to, size_t bytes) { mark(to, bytes, false); }

#define HOOK extern "C" __attribute__((visibility("hidden"), noinline))
#define HERE __builtin_return_address(0)
#define SIZES(of) of(1) of(2) of(4) of(8) of(16)
#define HOOKS(n)                                                                                           \
    HOOK void __tsan_read##n(void* at) { access(at, n, false, watch_access, HERE); }                       \
    HOOK void __tsan_write##n(void* at) { access(at, n, true, watch_access, HERE); }                       \
    HOOK void __tsan_unaligned_read##n(void* at) { access(at, n, false, watch_access, HERE); }             \
    HOOK void __tsan_unaligned_write##n(void* at) { access(at, n, true, watch_access, HERE); }
SIZES(HOOKS)
HOOK void __tsan_read_range(void* at, size_t size) { access(at, size, false, watch_access, HERE); }
HOOK void __tsan_write_range(void* at, size_t size) { access(at, size, true, watch_access, HERE); }
HOOK void __tsan_init() {}
HOOK void __tsan_vptr_update(void*, void*) {}
HOOK void __tsan_func_entry(void* caller) {
    if (here) here->stacks[thread_now].push_back(caller);
}
HOOK void __tsan_func_exit() {
    if (here && !here->stacks[thread_now].empty()) here->stacks[thread_now].pop_back();
}
// One host thread runs all of it, so that plain operations are atomic enough.
template <class T> static T atomic(volatile T* at, bool write, void* pc) {
    access((const void*)at, sizeof(T), write, WATCH_ATOMIC, pc);
    if (here) here->acquired = true;
    return *at;
}
#define ATOMICS(bits, type)                                                                                \
    HOOK type __tsan_atomic##bits##_load(const volatile type* at, int) { return atomic((volatile type*)at, false, HERE); } \
    HOOK void __tsan_atomic##bits##_store(volatile type* at, type value, int) {                            \
        atomic(at, true, HERE);                                                                            \
        *at = value;                                                                                       \
    }                                                                                                      \
    HOOK type __tsan_atomic##bits##_fetch_add(volatile type* at, type value, int) {                        \
        type seen = atomic(at, true, HERE);                                                                \
        *at = seen + value;                                                                                \
        return seen;                                                                                       \
    }                                                                                                      \
    HOOK type __tsan_atomic##bits##_exchange(volatile type* at, type value, int) {                         \
        type seen = atomic(at, true, HERE);                                                                \
        *at = value;                                                                                       \
        return seen;                                                                                       \
    }                                                                                                      \
    HOOK type __tsan_atomic##bits##_compare_exchange_val(volatile type* at, type expected, type value, int, int) { \
        type seen = atomic(at, true, HERE);                                                                \
        if (seen == expected) *at = value;                                                                 \
        return seen;                                                                                       \
    }                                                                                                      \
    HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile type* at, type* expected, type value, int, int) { \
        type seen = atomic(at, true, HERE);                                                                \
        if (seen == *expected) {                                                                           \
            *at = value;                                                                                   \
            return 1;                                                                                      \
        }                                                                                                  \
        *expected = seen;                                                                                  \
        return 0;                                                                                          \
    }
ATOMICS(8, char)
ATOMICS(16, short)
ATOMICS(32, int)
ATOMICS(64, long)
