// The stand-in driver. Memory.
#ifndef PSIGRAPH_LIBCUDA_MEMORY_H
#define PSIGRAPH_LIBCUDA_MEMORY_H
#include <sys/mman.h>

#include "libcuda_device.h"

// The allocation that holds all of [at, at + bytes), or null.
static const Allocation* holder(CUdeviceptr at, size_t bytes, CUdeviceptr* start = nullptr) {
    State& s = state();
    auto next = s.memory.upper_bound(at);
    if (next == s.memory.begin()) return nullptr;
    --next;
    if (at + bytes > next->first + next->second.bytes || at + bytes < at) return nullptr;
    if (start) *start = next->first;
    return &next->second;
}

// Nothing ran over an end: looked at whenever the host waits for the device, and when memory is freed.
static bool guards_whole(CUdeviceptr at, const Allocation& one) {
    const unsigned char *before = (unsigned char*)at - GUARD_BYTES, *after = (unsigned char*)at + one.bytes;
    for (size_t i = 0; i < GUARD_BYTES; i++)
        if (before[i] != GUARD || after[i] != GUARD) return false;
    return true;
}
static CUresult check_guards() {
    State& s = state();
    for (const auto& [at, one] : s.memory) {
        if (guards_whole(at, one)) continue;
        s.sticky = ILLEGAL_ADDRESS;
        s.message = "a kernel wrote outside an allocation of " + std::to_string(one.bytes) + " bytes";
        s.violations.push_back(s.message);
        return s.sticky;
    }
    return OK;
}

static CUresult allocate(CUdeviceptr* at, size_t bytes, bool host, Pool* pool) {
    State& s = state();
    if (!bytes || !at) return INVALID_VALUE;
    if (!host && (bytes > s.total || s.used > s.total - bytes)) return OUT_OF_MEMORY;
    Allocation one;
    one.bytes = bytes;
    one.host = host;
    one.pool = pool;
    // From the system, not from malloc, which keeps what is freed.
    void* whole = mmap(nullptr, bytes + 2 * GUARD_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return OUT_OF_MEMORY;
    one.whole = (char*)whole;
    memset(one.whole, GUARD, GUARD_BYTES);
    memset(one.whole + GUARD_BYTES + bytes, GUARD, GUARD_BYTES);
    if (bytes <= POISON_LIMIT) memset(one.whole + GUARD_BYTES, 0xFF, bytes);  // read before written: NaN
    *at = (CUdeviceptr)(one.whole + GUARD_BYTES);
    s.memory[*at] = one;
    if (!host) s.used += bytes;
    return OK;
}
static CUresult release(CUdeviceptr at, bool host) {
    State& s = state();
    if (!at) return OK;
    auto found = s.memory.find(at);
    if (found == s.memory.end() || found->second.host != host) return INVALID_VALUE;
    CUresult result = OK;
    if (!guards_whole(at, found->second)) result = check_guards();
    if (!host) s.used -= found->second.bytes;
    munmap(found->second.whole, found->second.bytes + 2 * GUARD_BYTES);
    s.memory.erase(found);
    return result;
}

// Frees work even where an error is due: a leak would be reported where there is none.
#define RELEASE_GATE(what)              \
    Gate gate(__func__);                \
    if (gate.result == NOT_INITIALIZED) return gate.result; \
    CUresult freed = what;              \
    return gate.result ? gate.result : freed

static CUresult cuMemAlloc(CUdeviceptr* at, size_t bytes) {
    GATE();
    return allocate(at, bytes, false, nullptr);
}
static CUresult cuMemFree(CUdeviceptr at) { RELEASE_GATE(release(at, false)); }
static CUresult cuMemAllocAsync(CUdeviceptr* at, size_t bytes, Stream*) {
    GATE();
    return allocate(at, bytes, false, &state().default_pool);
}
static CUresult cuMemAllocFromPoolAsync(CUdeviceptr* at, size_t bytes, Pool* pool, Stream*) {
    GATE();
    return allocate(at, bytes, false, pool);
}
static CUresult cuMemFreeAsync(CUdeviceptr at, Stream*) { RELEASE_GATE(release(at, false)); }
static CUresult cuMemHostAlloc(void** at, size_t bytes, unsigned) {
    GATE();
    return allocate((CUdeviceptr*)at, bytes, true, nullptr);
}
static CUresult cuMemAllocHost(void** at, size_t bytes) {
    GATE();
    return allocate((CUdeviceptr*)at, bytes, true, nullptr);
}
static CUresult cuMemFreeHost(void* at) { RELEASE_GATE(release((CUdeviceptr)at, true)); }
static CUresult cuMemHostGetDevicePointer(CUdeviceptr* to, void* at, unsigned) {
    GATE();
    *to = (CUdeviceptr)at;
    return OK;
}
static CUresult cuMemHostRegister(void*, size_t, unsigned) {
    GATE();
    return OK;
}
static CUresult cuMemHostUnregister(void*) {
    GATE();
    return OK;
}
static CUresult cuMemGetInfo(size_t* free_bytes, size_t* total) {
    GATE();
    *free_bytes = state().total - state().used;
    *total = state().total;
    return OK;
}
static CUresult cuMemGetAddressRange(CUdeviceptr* base, size_t* bytes, CUdeviceptr at) {
    GATE();
    CUdeviceptr start;
    const Allocation* one = holder(at, 1, &start);
    if (!one) return NOT_FOUND;
    if (base) *base = start;
    if (bytes) *bytes = one->bytes;
    return OK;
}

static CUresult pointer_attribute(void* to, int attribute, CUdeviceptr at, bool lenient) {
    CUdeviceptr start = 0;
    const Allocation* one = holder(at, 1, &start);
    if (!one && !lenient) return INVALID_VALUE;
    switch (attribute) {
        case 1: *(void**)to = one ? &state().primary : nullptr; return OK;
        case 2: *(unsigned*)to = one ? (one->host ? 1 : 2) : 0; return OK;
        case 3: *(CUdeviceptr*)to = one ? at : 0; return OK;
        case 4: *(void**)to = one && one->host ? (void*)at : nullptr; return OK;
        case 8: *(unsigned*)to = 0; return OK;
        case 9: *(int*)to = one ? 0 : -2; return OK;
        case 11: *(CUdeviceptr*)to = start; return OK;
        case 12: *(size_t*)to = one ? one->bytes : 0; return OK;
        case 13: *(bool*)to = one != nullptr; return OK;
        case 17: *(void**)to = one ? one->pool : nullptr; return OK;
        default: return lenient ? OK : NOT_SUPPORTED;
    }
}
static CUresult cuPointerGetAttribute(void* to, int attribute, CUdeviceptr at) {
    GATE();
    return pointer_attribute(to, attribute, at, false);
}
static CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** to, CUdeviceptr at) {
    GATE();
    for (unsigned i = 0; i < count; i++) pointer_attribute(to[i], attributes[i], at, true);
    return OK;
}

static CUresult cuDeviceGetDefaultMemPool(Pool** pool, int device) {
    GATE();
    *pool = &state().default_pool;
    return device ? INVALID_DEVICE : OK;
}
static CUresult cuDeviceGetMemPool(Pool** pool, int device) {
    GATE();
    *pool = &state().default_pool;
    return device ? INVALID_DEVICE : OK;
}
static CUresult cuDeviceSetMemPool(int device, Pool*) {
    GATE();
    return device ? INVALID_DEVICE : OK;
}
static CUresult cuMemPoolCreate(Pool** pool, const void*) {
    GATE();
    state().pools.insert(*pool = new Pool);
    return OK;
}
static CUresult destroy_pool(Pool* pool) {
    if (!state().pools.erase(pool)) return INVALID_HANDLE;
    delete pool;
    return OK;
}
static CUresult cuMemPoolDestroy(Pool* pool) { RELEASE_GATE(destroy_pool(pool)); }
static CUresult cuMemPoolTrimTo(Pool*, size_t) {
    GATE();
    return OK;
}
static CUresult cuMemPoolSetAccess(Pool*, const void*, size_t) {
    GATE();
    return OK;
}
static CUresult cuMemPoolSetAttribute(Pool* pool, int attribute, void* value) {
    GATE();
    if (attribute == 4) pool->threshold = *(uint64_t*)value;
    return OK;
}
static CUresult cuMemPoolGetAttribute(Pool* pool, int attribute, void* value) {
    GATE();
    if (attribute <= 3) *(int*)value = 1;
    else *(uint64_t*)value = attribute == 4 ? pool->threshold : state().used;
    return OK;
}

#endif
