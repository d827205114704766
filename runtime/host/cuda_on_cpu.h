// CUDA C on a CPU: what the generated kernels use of it, so that g++ compiles their text unchanged.
//
// Every thread of a block is a fiber on one host thread. A fiber runs until a barrier or a collective of its
// warp, then hands over to the next runnable fiber: in order, in reverse or shuffled, so that a missing barrier
// shows as a result that depends on the order. Shared memory is poisoned with 0xFF (a NaN) before each block.
// A kernel that gets stuck or breaks a rule ends with one line that says what happened; it never hangs, unless
// it spins on memory.
//
// A compiled kernel holds its scheduler in plain statics: whoever wants to run blocks on several host threads
// loads a copy of the shared object for each of them (libcuda.cpp does).
//
// Builds: the usual one; PSIGRAPH_HOST_ADDRESS, under AddressSanitizer; PSIGRAPH_HOST_WATCH, where every load
// and store of the kernel calls watch.cpp.
#ifndef PSIGRAPH_CUDA_ON_CPU_H
#define PSIGRAPH_CUDA_ON_CPU_H

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

// ---------------------------------------------------------------------------------------------------------
// Words of the language
// ---------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------
// Fibers
// ---------------------------------------------------------------------------------------------------------

namespace host {

enum Collective : uint8_t { SHUFFLE, VOTE, WARP_BARRIER, DOT };

constexpr unsigned NAMED_BARRIERS = 16;
constexpr unsigned NOT_NAMED = ~0u;
constexpr uint64_t CANARY = 0x5073696772617068ull;
#if defined(PSIGRAPH_HOST_ADDRESS) || defined(PSIGRAPH_HOST_WATCH) || defined(PSIGRAPH_HOST_STEP)
constexpr size_t STACK_BYTES = 256 << 10;  // unoptimised frames are larger
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

struct Block;

struct Fiber {
    dim3 thread;
    unsigned index, lane;
    struct Warp* warp;
    Block* block;
    bool waited;     // has executed the programmatic wait, or met at a barrier someone who has
    unsigned named;  // the named barrier it waits at
    char* stack;
#ifdef PSIGRAPH_HOST_UCONTEXT
    ucontext_t context;
#else
    void* stack_pointer;
#endif
    void* fake_stack;  // AddressSanitizer's
};

// An asynchronous copy that has been issued and nobody has waited for.
struct BulkCopy {
    char* to;
    const char* from;
    int bytes;
};

// Masks have one bit a lane. A lane is in `ready`, in `meeting` (at a collective), elsewhere waiting, or done.
struct Warp {
    unsigned ready, meeting, done, lanes;
    unsigned mask[32];
    Collective kind[32];
    uint8_t source[32];
    uint64_t value[32], result[32];
    const unsigned* weights[32];
    int* sums[32];
    BulkCopy copies[32];
    unsigned copying;  // which of them are under way
    unsigned polling;  // lanes that wait for one that has not been issued
};

struct Block {
    dim3 index;
    unsigned linear, rank;  // place in the grid, and among the blocks that run together
    unsigned arrived, done;
    unsigned arrived_line;  // where in the source the first of them reached the barrier
    unsigned named_arrived[NAMED_BARRIERS];
    bool waited;
    char* dynamic;
    char* statics;  // its static shared memory while a block of the same group runs
};

static host_launch* launch;
static Fiber* self;
static Fiber* fibers;
static Warp* warps;
static Block* blocks;
static Block* resident;  // whose static shared memory is in place
static unsigned fiber_count, fiber_room, warp_count, warps_each, threads_each, block_room, finished, group_arrived;
static dim3 grid_size, block_size;
static bool failed;
static uint64_t random_state;
static void (*body)(void**);
static size_t dynamic_room;
#ifdef PSIGRAPH_HOST_UCONTEXT
static ucontext_t main_context;
#else
static void* main_pointer;
#endif
#ifdef PSIGRAPH_HOST_ADDRESS
static void* main_fake;
static const void* main_bottom;
static size_t main_bytes;
#endif

extern "C" char __start_psigraph_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_psigraph_shared[] __attribute__((weak, visibility("hidden")));

#ifndef PSIGRAPH_HOST_UCONTEXT
extern "C" void psigraph_host_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
.text
.hidden psigraph_host_switch
.globl psigraph_host_switch
.type psigraph_host_switch, @function
psigraph_host_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size psigraph_host_switch, .-psigraph_host_switch
)");
#endif

// A loop of its own: memset is intercepted by AddressSanitizer, and the section contains its red zones.
__attribute__((no_sanitize("address"), no_sanitize("thread"))) static void copy_bytes(char* to, const char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) {
        to[i] = from ? from[i] : (char)0xFF;
        asm volatile("" ::: "memory");  // or it becomes a call of memset again
    }
}
static inline size_t static_shared_bytes() { return __start_psigraph_shared ? __stop_psigraph_shared - __start_psigraph_shared : 0; }

static void place_statics(Block* block) {
    if (resident == block) return;
    size_t bytes = static_shared_bytes();
    if (bytes && launch->together > 1) {
        if (resident) copy_bytes(resident->statics, __start_psigraph_shared, bytes);
        copy_bytes(__start_psigraph_shared, block->statics, bytes);
    }
    resident = block;
}

static void to_main(bool dying) {
    Fiber* from = self;
#ifdef PSIGRAPH_HOST_ADDRESS
    __sanitizer_start_switch_fiber(dying ? nullptr : &from->fake_stack, main_bottom, main_bytes);
#else
    (void)dying;
#endif
#ifdef PSIGRAPH_HOST_UCONTEXT
    swapcontext(&from->context, &main_context);
#else
    psigraph_host_switch(&from->stack_pointer, main_pointer);
#endif
    abort();  // main never comes back
}

static void switch_to(Fiber* to, bool dying = false) {
    Fiber* from = self;
    if (from == to) return;
    self = to;
    place_statics(to->block);
    HOST_WATCH(watch_thread(to->block->linear, to->index, to->block->waited, to->waited));
#ifdef PSIGRAPH_HOST_ADDRESS
    __sanitizer_start_switch_fiber(dying ? nullptr : &from->fake_stack, to->stack, STACK_BYTES);
#else
    (void)dying;
#endif
#ifdef PSIGRAPH_HOST_UCONTEXT
    swapcontext(&from->context, &to->context);
#else
    psigraph_host_switch(&from->stack_pointer, to->stack_pointer);
#endif
#ifdef PSIGRAPH_HOST_ADDRESS
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// End the launch: the message is "kind: sentence".
[[noreturn]] __attribute__((noinline, format(printf, 2, 3))) static void fail(const char* kind, const char* format, ...) {
    char text[768];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (!failed) {
        failed = true;
        unsigned block = self ? self->block->linear : 0, thread = self ? self->index : 0;
        snprintf(launch->message, sizeof launch->message, "%s: block %u, thread %u: %s", kind, block, thread, text);
    }
    to_main(true);
    abort();
}

#ifdef PSIGRAPH_HOST_WATCH
extern "C" __attribute__((visibility("hidden"))) void host_watch_failed(const char* kind, const char* text) { fail(kind, "%s", text); }
#endif

static unsigned random_below(unsigned bound) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)((random_state >> 33) % bound);
}

static Fiber* ready_in(unsigned w) {
    unsigned ready = warps[w].ready;
    if (!ready) return nullptr;
    unsigned lane;
    if (launch->order == HOST_FORWARD) {
        lane = __builtin_ctz(ready);
    } else if (launch->order == HOST_REVERSE) {
        lane = 31 - __builtin_clz(ready);
    } else {
        for (unsigned skip = random_below(__builtin_popcount(ready)); skip; skip--) ready &= ready - 1;
        lane = __builtin_ctz(ready);
    }
    return &fibers[w / warps_each * threads_each + w % warps_each * 32 + lane];
}

// Why nobody can run: the first cause found in the stuck group.
[[noreturn]] static void report_stuck() {
    for (unsigned w = 0; w < warp_count; w++) {
        Warp& warp = warps[w];
        if (!warp.meeting) continue;
        unsigned lane = __builtin_ctz(warp.meeting), missing = warp.mask[lane] & ~warp.meeting;
        self = &fibers[w / warps_each * threads_each + w % warps_each * 32 + lane];
        const char* where = missing & warp.done ? "have returned" : missing & ~warp.lanes ? "do not exist" : "wait elsewhere";
        fail("partial warp", "a warp collective names lanes 0x%08x, but of these 0x%08x %s", warp.mask[lane], missing, where);
    }
    for (unsigned w = 0; w < warp_count; w++) {
        if (!warps[w].polling) continue;
        self = &fibers[w / warps_each * threads_each + w % warps_each * 32 + __builtin_ctz(warps[w].polling)];
        fail("bulk copy", "lanes 0x%08x wait for one that nobody issues: on a GPU they never return", warps[w].polling);
    }
    for (unsigned i = 0; i < fiber_count; i++) {
        if (fibers[i].named == NOT_NAMED) continue;
        self = &fibers[i];
        fail("divergent barrier", "named barrier %u was reached by %u threads, fewer than it names", fibers[i].named,
             fibers[i].block->named_arrived[fibers[i].named]);
    }
    for (unsigned i = 0; i < fiber_count; i++) {
        Block* block = fibers[i].block;
        if (!block->arrived) continue;
        self = &fibers[i];
        fail("divergent barrier", "__syncthreads (line %u) was reached by %u of %u threads; %u have returned", block->arrived_line, block->arrived,
             threads_each, block->done);
    }
    fail("divergent barrier", "the barrier of the cluster or grid was reached by %u of %u threads", group_arrived, fiber_count);
}

static inline void leave_ready() { self->warp->ready &= ~(1u << self->lane); }

static void advance(bool dying = false) {
    unsigned here = (unsigned)(self->warp - warps);
    Fiber* next = nullptr;
    if (launch->order == HOST_SHUFFLE) {
        unsigned start = random_below(warp_count);
        for (unsigned i = 0; i < warp_count && !next; i++) next = ready_in((start + i) % warp_count);
    } else {
        next = ready_in(here);
        for (unsigned i = 0; i < warp_count && !next; i++) next = ready_in(launch->order == HOST_REVERSE ? warp_count - 1 - i : i);
    }
    if (!next) report_stuck();
    switch_to(next, dying);
}

static void fiber_entry() {
#ifdef PSIGRAPH_HOST_ADDRESS
    // Whoever switched here may be another fiber: the bounds of the main stack are taken once, by the first.
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (!main_bottom) main_bottom = bottom, main_bytes = bytes;
#endif
    body(launch->parameters);
    Fiber* me = self;
    unsigned bit = 1u << me->lane;
    if (*(uint64_t*)me->stack != CANARY) fail("stack overflow", "the thread used more than %zu bytes of stack", STACK_BYTES);
    me->warp->ready &= ~bit;
    me->warp->done |= bit;
    me->block->done++;
    finished++;
    if (me->block->done == threads_each && launch->programmatic && !me->block->waited)
        fail("missing wait", "the block returned without executing the programmatic wait");
    if (me->warp->copying && me->warp->done == me->warp->lanes) fail("bulk copy", "the warp returned while one was under way");
    if (me->block->arrived)
        fail("divergent barrier", "the thread returned while %u threads wait at __syncthreads (line %u)", me->block->arrived, me->block->arrived_line);
    if (finished == fiber_count) to_main(true);
    advance(true);
    abort();  // a finished fiber is never resumed
}

static void prepare(Fiber& fiber) {
#ifdef PSIGRAPH_HOST_ADDRESS
    __asan_unpoison_memory_region(fiber.stack, STACK_BYTES);  // its last owner never left its frames
#endif
    *(uint64_t*)fiber.stack = CANARY;
    fiber.waited = false;
    fiber.named = NOT_NAMED;
    fiber.fake_stack = nullptr;
#ifdef PSIGRAPH_HOST_UCONTEXT
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_entry, 0);
#else
    void** top = (void**)(fiber.stack + STACK_BYTES);
    *--top = nullptr;  // no caller: a debugger's backtrace ends here
    *--top = (void*)fiber_entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.stack_pointer = top;
#endif
}

// Memory for `count` blocks of the launch's size; kept from launch to launch.
static bool reserve(unsigned count) {
    unsigned threads = threads_each * count;
    if (threads > fiber_room) {
        if (fiber_room) munmap(fibers[0].stack, fiber_room * STACK_BYTES);
        free(fibers);
        free(warps);
        fibers = (Fiber*)calloc(threads, sizeof(Fiber));
        warps = (Warp*)calloc(threads, sizeof(Warp));  // blocks of fewer than 32 threads have a warp each
        void* stacks = mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        fiber_room = 0;
        if (!fibers || !warps || stacks == MAP_FAILED) return false;
        for (unsigned i = 0; i < threads; i++) fibers[i].stack = (char*)stacks + i * STACK_BYTES;
        fiber_room = threads;
    }
    size_t bytes = launch->shared_bytes;
#ifdef PSIGRAPH_HOST_ADDRESS
    bool again = true;  // a fresh piece of the exact size, so that its end is a red zone
#else
    bool again = bytes > dynamic_room;
#endif
    if (count > block_room || again) {
        for (unsigned i = 0; i < block_room; i++) {
            free(blocks[i].dynamic);
            free(blocks[i].statics);
        }
        free(blocks);
        if (count < block_room) count = block_room;
        if (bytes > dynamic_room || again) dynamic_room = bytes;
        blocks = (Block*)calloc(count, sizeof(Block));
        block_room = 0;
        if (!blocks) return false;
        for (unsigned i = 0; i < count; i++) {
            if (posix_memalign((void**)&blocks[i].dynamic, 1024, dynamic_room ? dynamic_room : 1)) return false;
            if (!(blocks[i].statics = (char*)malloc(static_shared_bytes() + 1))) return false;
        }
        block_room = count;
    }
    return true;
}

static void run_group(unsigned first, unsigned count) {
    fiber_count = threads_each * count;
    warp_count = warps_each * count;
    finished = group_arrived = 0;
    resident = nullptr;
    memset(warps, 0, warp_count * sizeof(Warp));
    for (unsigned b = 0; b < count; b++) {
        Block& block = blocks[b];
        unsigned linear = first + b;
        char *dynamic = block.dynamic, *statics = block.statics;
        block = Block{};
        block.dynamic = dynamic;
        block.statics = statics;
        block.linear = linear;
        block.rank = b;
        block.index = dim3(linear % grid_size.x, linear / grid_size.x % grid_size.y, linear / grid_size.x / grid_size.y);
        if (launch->shared_bytes) memset(dynamic, 0xFF, launch->shared_bytes);
        if (count > 1) copy_bytes(statics, nullptr, static_shared_bytes());
        for (unsigned i = 0; i < threads_each; i++) {
            Fiber& fiber = fibers[b * threads_each + i];
            fiber.thread = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
            fiber.index = i;
            fiber.lane = i & 31;
            fiber.block = &block;
            fiber.warp = &warps[b * warps_each + (i >> 5)];
            fiber.warp->lanes |= 1u << fiber.lane;
            fiber.warp->ready |= 1u << fiber.lane;
            prepare(fiber);
        }
        HOST_WATCH(watch_block(linear, threads_each, dynamic, launch->shared_bytes, __start_psigraph_shared, static_shared_bytes()));
    }
    if (count == 1) copy_bytes(__start_psigraph_shared, nullptr, static_shared_bytes());
    unsigned start = launch->order == HOST_SHUFFLE ? random_below(warp_count) : launch->order == HOST_REVERSE ? warp_count - 1 : 0;
    Fiber* to = ready_in(start);
    self = to;
    place_statics(to->block);
    HOST_WATCH(watch_thread(to->block->linear, to->index, false, false));
#ifdef PSIGRAPH_HOST_ADDRESS
    main_bottom = nullptr;
    __sanitizer_start_switch_fiber(&main_fake, to->stack, STACK_BYTES);
#endif
#ifdef PSIGRAPH_HOST_UCONTEXT
    swapcontext(&main_context, &to->context);
#else
    psigraph_host_switch(&main_pointer, to->stack_pointer);
#endif
#ifdef PSIGRAPH_HOST_ADDRESS
    __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
    self = nullptr;
}

// Group `place` of `count` in the launch's order. A shuffle is a walk with a step prime to the count.
static unsigned group_at(unsigned place, unsigned count) {
    if (launch->order == HOST_REVERSE) return count - 1 - place;
    if (launch->order == HOST_FORWARD || count < 3) return place;
    unsigned step = (unsigned)(launch->seed % count) | 1, a, b;
    do {
        step += 2;
        for (a = step, b = count; b;) {
            unsigned rest = a % b;
            a = b;
            b = rest;
        }
    } while (a != 1);
    return (unsigned)((launch->seed / 7 + (uint64_t)place * step) % count);
}

static int run(host_launch* what) {
    launch = what;
    grid_size = dim3(what->grid[0], what->grid[1], what->grid[2]);
    block_size = dim3(what->block[0], what->block[1], what->block[2]);
    threads_each = block_size.x * block_size.y * block_size.z;
    warps_each = (threads_each + 31) / 32;
    random_state = what->seed * 2 + 88172645463325253ull;
    failed = false;
    what->message[0] = 0;
    unsigned total = grid_size.x * grid_size.y * grid_size.z, together = what->together ? what->together : 1;
    if (!threads_each || !total || total % together) {
        snprintf(what->message, sizeof what->message, "launch: %u blocks of %u threads in groups of %u cannot be run", total, threads_each, together);
        return 1;
    }
    if (!reserve(together)) {
        snprintf(what->message, sizeof what->message, "launch: no memory for the stacks and shared memory of %u blocks", together);
        return 1;
    }
    HOST_WATCH(watch_launch(what));
    unsigned groups = total / together;
    while (!failed && !__atomic_load_n(what->stop, __ATOMIC_RELAXED)) {
        unsigned place = __atomic_fetch_add(what->next_group, 1, __ATOMIC_RELAXED);
        if (place >= groups) break;
        run_group(group_at(place, groups) * together, together);
    }
    if (failed) __atomic_store_n(what->stop, 1, __ATOMIC_RELAXED);
    return failed;
}

// ---------------------------------------------------------------------------------------------------------
// Barriers
// ---------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------
// Collectives of a warp. The lane that completes one computes everybody's result.
// ---------------------------------------------------------------------------------------------------------

static void dot_all(Warp& warp);

static void combine(Warp& warp, unsigned mask, Collective kind) {
    if (kind == WARP_BARRIER) {
        HOST_WATCH(watch_warp(self->block->linear, self->index >> 5));
        return;
    }
    if (kind == DOT) return dot_all(warp);
    uint64_t votes = 0;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        unsigned source = warp.source[lane];
        if (kind == VOTE) {
            votes |= (uint64_t)(warp.value[lane] != 0) << lane;
            continue;
        }
        if (!(mask >> source & 1)) fail("partial warp", "lane %u shuffles from lane %u, which mask 0x%08x leaves out", lane, source, mask);
        warp.result[lane] = warp.value[source];
    }
    if (kind == VOTE)
        for (unsigned lane = 0; lane < 32; lane++) warp.result[lane] = votes;
}

static void meet(Collective kind, unsigned mask) {
    Warp& warp = *self->warp;
    unsigned lane = self->lane, bit = 1u << lane;
    if (!(mask & bit)) fail("partial warp", "the lane calls a collective with mask 0x%08x, which leaves it out", mask);
    if (mask & warp.done) fail("partial warp", "a warp collective names lanes 0x%08x, but of these 0x%08x have returned", mask, mask & warp.done);
    warp.ready &= ~bit;
    warp.meeting |= bit;
    warp.mask[lane] = mask;
    warp.kind[lane] = kind;
    if ((warp.meeting & mask) == mask) {
        for (unsigned rest = mask; rest; rest &= rest - 1) {
            unsigned other = __builtin_ctz(rest);
            if (warp.kind[other] != kind || warp.mask[other] != mask)
                fail("partial warp", "lanes %u and %u meet in different collectives (masks 0x%08x and 0x%08x)", lane, other, mask, warp.mask[other]);
        }
        combine(warp, mask, kind);
        warp.meeting &= ~mask;
        warp.ready |= mask;
    }
    advance();
}

static inline void warp_barrier(unsigned mask = 0xffffffffu) { meet(WARP_BARRIER, mask & self->warp->lanes); }

template <class T> static T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most eight bytes");
    unsigned lane = self->lane;
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    self->warp->value[lane] = bits;
    self->warp->source[lane] = (uint8_t)source;
    meet(SHUFFLE, mask);
    T result;
    memcpy(&result, &self->warp->result[lane], sizeof(T));
    return result;
}
static inline unsigned vote(unsigned mask, bool value) {
    self->warp->value[self->lane] = value;
    meet(VOTE, mask);
    return (unsigned)self->warp->result[self->lane];
}

// Four mma.m16n8k16 (u8 x s8): see dot_chunk in psigraph_device.cuh. Every lane brings its words, the last one
// computes: row g + 8 h, group t, digit d = sum over 16 bytes.
static void dot_all(Warp& warp) {
    alignas(64) unsigned digits[32], rows[16][4][4];
    for (unsigned lane = 0; lane < 32; lane++) {
        digits[lane] = (unsigned)warp.value[lane];
        for (unsigned j = 0; j < 8; j++) rows[(lane >> 2) + 8 * (j & 1)][j >> 1][lane & 3] = warp.weights[lane][j];
    }
    for (unsigned lane = 0; lane < 32; lane++) {
        unsigned g = lane >> 2, t = lane & 3;
        for (unsigned h = 0; h < 2; h++) {
            const uint8_t* weights = (const uint8_t*)rows[g + 8 * h][t];
            for (unsigned d = 0; d < 2; d++) {
                const int8_t* values = (const int8_t*)&digits[8 * t + 4 * d];
                int sum = 0;
                for (int i = 0; i < 16; i++) sum += (int16_t)weights[i] * (int16_t)values[i];
                warp.sums[lane][2 * h + d] += sum;
            }
        }
    }
}
static inline void dot_chunk(int sums[4], const unsigned weights[8], unsigned digits, int lane) {
    if ((unsigned)lane != self->lane) fail("partial warp", "dot_chunk was told lane %d", lane);
    Warp& warp = *self->warp;
    warp.value[lane] = digits;
    warp.weights[lane] = weights;
    warp.sums[lane] = sums;
    meet(DOT, 0xffffffffu);
}

// ---------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------

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

// ---------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------

template <class TO, class FROM> static inline TO bit_cast(FROM from) {
    static_assert(sizeof(TO) == sizeof(FROM), "bits of the same size");
    TO to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline float half_to_float(uint16_t bits) { return (float)bit_cast<_Float16>(bits); }
static inline uint16_t float_to_half(float value) { return bit_cast<uint16_t>((_Float16)value); }
static inline float exp2(float x) { return ::exp2f(x); }
static inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
// cvt.rni.s32.f32: to nearest even; out of range saturates, NaN gives 0.
static inline int round_to_int(float value) {
    if (!(value == value)) return 0;
    if (value >= 2147483648.0f) return 2147483647;
    if (value < -2147483648.0f) return -2147483647 - 1;
    return (int)::rintf(value);
}

template <class F> struct Invoke;
template <class... A> struct Invoke<void (*)(A...)> {
    static constexpr unsigned COUNT = sizeof...(A);
    static constexpr uint32_t SIZES[COUNT + 1] = {sizeof(A)..., 0};
    template <size_t... I> static void call(void (*kernel)(A...), void** parameters, std::index_sequence<I...>) {
        kernel(*(A*)parameters[I]...);
    }
    template <void (*KERNEL)(A...)> static void with(void** parameters) { call(KERNEL, parameters, std::index_sequence_for<A...>()); }
};

}  // namespace host

// The last line of a compiled text: what libcuda.cpp and check_runner.cpp look up.
#define PSIGRAPH_HOST_KERNEL(kernel)                                                                              \
    static int host_run(host_launch* what) {                                                                      \
        host::body = host::Invoke<decltype(&kernel)>::with<&kernel>;                                              \
        return host::run(what);                                                                                   \
    }                                                                                                             \
    extern "C" __attribute__((visibility("default"))) const host_kernel* psigraph_host_kernel() {                 \
        static const host_kernel one = {PSIGRAPH_HOST_ABI,                        (uint32_t)host::static_shared_bytes(), \
                                        #kernel,                                  host::Invoke<decltype(&kernel)>::COUNT, \
                                        host::Invoke<decltype(&kernel)>::SIZES,   host_run};                      \
        return &one;                                                                                              \
    }

// ---------------------------------------------------------------------------------------------------------
// Built-in names of CUDA C
// ---------------------------------------------------------------------------------------------------------

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
