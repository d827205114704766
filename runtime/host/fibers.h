// The threads of a block as fibers: memory for them, who runs next, and what is said when nobody can.
#ifndef PSIGRAPH_HOST_FIBERS_H
#define PSIGRAPH_HOST_FIBERS_H
#include "language.h"

namespace host {

enum Collective : uint8_t { SHUFFLE, VOTE, WARP_BARRIER, DOT, DOT_HALVES };

constexpr unsigned NAMED_BARRIERS = 16;
constexpr unsigned MOST_COPIES = 512;  // bulk copies of a block that may be under way at once
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

// An asynchronous copy of a block: `to` is null before it is issued and after somebody waited for it.
struct BulkCopy {
    char* to;
    const char* from;
    int bytes;
};

// What a warp multiplies halves with, in a collective of its own: see halves.h.
struct HalvesTimes {
    const uint16_t* rows;
    int stride, blocks;
    bool columns;
};
constexpr Collective HALVES = (Collective)16;
static void halves_all(struct Warp& warp);

// Masks have one bit a lane. A lane is in `ready`, in `meeting` (at a collective), elsewhere waiting, or done.
struct Warp {
    unsigned ready, meeting, done, lanes;
    unsigned mask[32];
    HalvesTimes halves;
    float* totals[32];
    Collective kind[32];
    uint8_t source[32];
    uint64_t value[32], result[32];
    const unsigned* weights[32];
    const unsigned* other[32];
    int* sums[32];
    float* float_sums[32];
    unsigned polling;  // lanes that wait for one that has not been issued
};

struct Block {
    dim3 index;
    unsigned linear, rank;  // place in the grid, and among the blocks that run together
    unsigned arrived, done;
    unsigned arrived_line;  // where in the source the first of them reached the barrier
    unsigned named_arrived[NAMED_BARRIERS];
    bool waited;
    unsigned copying;  // bulk copies under way
    BulkCopy copies[MOST_COPIES];
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
    // How accesses are meant is this thread's own affair: a bulk copy's wait, say, switches inside such a scope.
    HOST_WATCH(const watch_how meant = watch_access; watch_access = WATCH_PLAIN);
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
    HOST_WATCH(watch_access = meant);
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
        fail("bulk copy", "lanes 0x%08x wait for one that nobody issues, or for a stage that nobody gives back: on a GPU they never return", warps[w].polling);
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
    if (me->block->done == threads_each && me->block->copying) fail("bulk copy", "the block returned while one was under way");
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

static void free_fibers() {
    if (fiber_room) munmap(fibers[0].stack, fiber_room * STACK_BYTES);
    free(fibers);
    free(warps);
    fiber_room = 0;
}
static void free_blocks() {
    for (unsigned i = 0; i < block_room; i++) {
        free(blocks[i].dynamic);
        free(blocks[i].statics);
    }
    free(blocks);
    block_room = 0;
}
#ifndef PSIGRAPH_HOST_WATCH  // a watching build is never unloaded, and would watch this too
// When the image is unloaded. At the end of a process another thread may still be in the kernel.
__attribute__((destructor)) static void free_pools() {
    if (self) return;
    free_fibers();
    free_blocks();
}
#endif

// Memory for `count` blocks of the launch's size; kept from launch to launch, until the image is unloaded.
static bool reserve(unsigned count) {
    unsigned threads = threads_each * count;
    if (threads > fiber_room) {
        free_fibers();
        fibers = (Fiber*)calloc(threads, sizeof(Fiber));
        warps = (Warp*)calloc(threads, sizeof(Warp));  // blocks of fewer than 32 threads have a warp each
        void* stacks = mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
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
        if (count < block_room) count = block_room;
        if (bytes > dynamic_room || again) dynamic_room = bytes;
        free_blocks();
        blocks = (Block*)calloc(count, sizeof(Block));
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

}  // namespace host

#endif
