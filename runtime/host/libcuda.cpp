// A stand-in for libcuda.so.1: the driver's calls on plain host memory, with kernels that g++ compiled.
//
// Work runs when it is put on a stream, in that order; a stream that captures records it instead, and a graph
// is that record. What this driver does not know, cuGetProcAddress does not find, as with an old driver.
// Tests ask for the log of calls, make the Nth call fail, and read what was left or done wrong
// (the psigraph_host_* functions at the end; environment: see docs/debugging.md).
#include "libcuda_run.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

struct Attribute {  // CUlaunchAttribute
    int id;
    char pad[4];
    union {
        int number;
        unsigned three[3];
        char all[64];
    } value;
};
struct Config {  // CUlaunchConfig
    unsigned grid[3], block[3], shared_bytes;
    Stream* stream;
    Attribute* attributes;
    unsigned attribute_count;
};
struct KernelParameters {  // CUDA_KERNEL_NODE_PARAMS_v2
    Function* function;
    unsigned grid[3], block[3], shared_bytes;
    void** parameters;
    void** extra;
    Function* kernel;
    Context* context;
};
struct EdgeData {  // CUgraphEdgeData
    unsigned char from_port, to_port, type, reserved[5];
};
static_assert(sizeof(Attribute) == 72 && sizeof(Config) == 56 && sizeof(KernelParameters) == 72 && sizeof(EdgeData) == 8, "as in cuda.h");

static thread_local std::vector<Context*> current_contexts;

static long from_environment(const char* name, long otherwise) {
    const char* text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

State& state() {
    static State* one = [] {
        State* s = new State;  // never destroyed: workers and interpreters end in any order
        s->sms = (int)from_environment("PSIGRAPH_HOST_SMS", 4);
        s->total = (size_t)from_environment("PSIGRAPH_HOST_MEMORY", 64l << 30);
        long capability = from_environment("PSIGRAPH_HOST_CAPABILITY", 90);
        s->major = (int)capability / 10;
        s->minor = (int)capability % 10;
        const char* order = getenv("PSIGRAPH_HOST_ORDER");
        s->order = order && !strcmp(order, "reverse") ? HOST_REVERSE : order && !strcmp(order, "shuffle") ? HOST_SHUFFLE : HOST_FORWARD;
        const char* fail = getenv("PSIGRAPH_HOST_FAIL");  // "nth:code", for a process that tests start
        if (fail && sscanf(fail, "%ld:%d", &s->fail_at, &s->fail_with) != 2) s->fail_at = 0;
        return s;
    }();
    return *one;
}

static double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

// ---------------------------------------------------------------------------------------------------------
// Process, device, context
// ---------------------------------------------------------------------------------------------------------

static CUresult cuInit(unsigned flags) {
    Gate gate(__func__, false);
    if (gate.result) return gate.result;
    if (flags) return INVALID_VALUE;
    state().ready = true;
    return OK;
}
static CUresult cuDriverGetVersion(int* version) {
    *version = 13000;
    return OK;
}

static const std::map<int, const char*>& error_names() {
    static const std::map<int, const char*> all = {
        {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {3, "CUDA_ERROR_NOT_INITIALIZED"},
        {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"}, {200, "CUDA_ERROR_INVALID_IMAGE"},
        {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {214, "CUDA_ERROR_ECC_UNCORRECTABLE"},
        {304, "CUDA_ERROR_OPERATING_SYSTEM"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
        {600, "CUDA_ERROR_NOT_READY"}, {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
        {702, "CUDA_ERROR_LAUNCH_TIMEOUT"}, {716, "CUDA_ERROR_MISALIGNED_ADDRESS"}, {719, "CUDA_ERROR_LAUNCH_FAILED"},
        {720, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE"}, {801, "CUDA_ERROR_NOT_SUPPORTED"},
        {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}, {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
        {903, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED"}, {904, "CUDA_ERROR_STREAM_CAPTURE_UNJOINED"},
        {907, "CUDA_ERROR_CAPTURED_EVENT"}, {910, "CUDA_ERROR_GRAPH_EXEC_UPDATE_FAILURE"},
        {912, "CUDA_ERROR_INVALID_CLUSTER_SIZE"}, {999, "CUDA_ERROR_UNKNOWN"}};
    return all;
}
static CUresult cuGetErrorName(CUresult code, const char** text) {
    auto found = error_names().find(code);
    *text = found == error_names().end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return OK;
}
static CUresult cuGetErrorString(CUresult code, const char** text) {
    static thread_local std::string kept;
    std::lock_guard<std::recursive_mutex> held(state().lock);
    cuGetErrorName(code, text);
    if (!state().message.empty() && (code == LAUNCH_FAILED || code == ILLEGAL_ADDRESS || code == INVALID_HANDLE)) {
        kept = state().message;
        *text = kept.c_str();
    }
    return OK;
}

static CUresult cuDeviceGetCount(int* count) {
    GATE();
    *count = 1;
    return OK;
}
static CUresult cuDeviceGet(int* device, int ordinal) {
    GATE();
    if (ordinal != 0) return INVALID_DEVICE;
    *device = 0;
    return OK;
}
static CUresult cuDeviceGetName(char* name, int length, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    snprintf(name, length, "psigraph host target");
    return OK;
}
static CUresult cuDeviceGetUuid(char* uuid, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    memcpy(uuid, "psigraph-host-00", 16);
    return OK;
}
static CUresult cuDeviceGetPCIBusId(char* text, int length, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    snprintf(text, length, "0000:00:00.0");
    return OK;
}
static CUresult cuDeviceTotalMem(size_t* bytes, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    *bytes = state().total;
    return OK;
}
static CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    State& s = state();
    // Those of an H100, but for the number of multiprocessors; what is not named here is 0 (absent).
    static const std::map<int, int> known = {
        {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {9, 65536}, {10, 32},
        {11, 2147483647}, {12, 65536}, {13, 1980000}, {14, 512}, {15, 1}, {19, 1}, {30, 512}, {31, 1}, {36, 2619000}, {37, 5120},
        {38, 52428800}, {39, 2048}, {40, 1}, {41, 1}, {51, 32}, {78, 1}, {79, 1}, {80, 1}, {81, 233472}, {82, 65536}, {90, 1},
        {95, 1}, {97, 232448}, {99, 1}, {106, 32}, {111, 1024}, {115, 1}};
    auto found = known.find(attribute);
    *value = found == known.end() ? 0 : found->second;
    if (attribute == 16) *value = s.sms;
    if (attribute == 75) *value = s.major;
    if (attribute == 76) *value = s.minor;
    if (attribute == 120) *value = s.major >= 9;
    return attribute <= 0 ? INVALID_VALUE : OK;
}

static CUresult cuDevicePrimaryCtxRetain(Context** context, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    State& s = state();
    s.primary.primary = true;
    s.primary.retained++;
    s.contexts.insert(&s.primary);
    *context = &s.primary;
    return OK;
}
// The context goes with its last holder, and everything in it goes too; that heals a sticky error.
static void end_context(State& s) {
    s.sticky = OK;
    s.primary.retained = 0;
}
static CUresult cuDevicePrimaryCtxRelease(int device) {
    Gate gate(__func__);
    State& s = state();
    if (device) return INVALID_DEVICE;
    if (s.primary.retained == 0) return gate.result ? gate.result : INVALID_CONTEXT;
    if (--s.primary.retained == 0) end_context(s);
    return gate.result;
}
static CUresult cuDevicePrimaryCtxReset(int device) {
    Gate gate(__func__);
    if (device) return INVALID_DEVICE;
    end_context(state());
    return gate.result;
}
static CUresult cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    GATE();
    if (device) return INVALID_DEVICE;
    *flags = 0;
    *active = state().primary.retained != 0;
    return OK;
}
static CUresult cuDevicePrimaryCtxSetFlags(int device, unsigned) {
    GATE();
    return device ? INVALID_DEVICE : OK;
}
static CUresult cuCtxSetCurrent(Context* context) {
    GATE();
    if (!current_contexts.empty()) current_contexts.pop_back();
    if (context) {
        if (!state().contexts.count(context)) return INVALID_CONTEXT;
        current_contexts.push_back(context);
    }
    return OK;
}
static Context* current() { return current_contexts.empty() ? nullptr : current_contexts.back(); }
static CUresult cuCtxGetCurrent(Context** context) {
    GATE();
    *context = current();
    return OK;
}
static CUresult cuCtxPushCurrent(Context* context) {
    GATE();
    if (!state().contexts.count(context)) return INVALID_CONTEXT;
    current_contexts.push_back(context);
    return OK;
}
static CUresult cuCtxPopCurrent(Context** context) {
    GATE();
    if (current_contexts.empty()) return INVALID_CONTEXT;
    if (context) *context = current();
    current_contexts.pop_back();
    return OK;
}
static CUresult cuCtxCreate(Context** context, void*, unsigned, int device) {
    GATE();
    if (device) return INVALID_DEVICE;
    *context = new Context;
    state().contexts.insert(*context);
    current_contexts.push_back(*context);
    return OK;
}
static CUresult cuCtxDestroy(Context* context) {
    GATE();
    if (!state().contexts.erase(context) || context->primary) return INVALID_CONTEXT;
    for (size_t i = current_contexts.size(); i--;)
        if (current_contexts[i] == context) current_contexts.erase(current_contexts.begin() + i);
    delete context;
    return OK;
}
static CUresult cuCtxGetDevice(int* device) {
    GATE();
    if (!current()) return INVALID_CONTEXT;
    *device = 0;
    return OK;
}
static CUresult cuCtxGetDevice_v2(int* device, Context*) {
    GATE();
    *device = 0;
    return OK;
}
static CUresult cuCtxGetApiVersion(Context*, unsigned* version) {
    GATE();
    *version = 3020;
    return OK;
}
static CUresult cuCtxGetId(Context*, unsigned long long* id) {
    GATE();
    *id = 1;
    return OK;
}
static CUresult cuCtxGetFlags(unsigned* flags) {
    GATE();
    *flags = 0;
    return OK;
}
static CUresult cuCtxGetLimit(size_t* value, int) {
    GATE();
    *value = 0;
    return OK;
}
static CUresult cuCtxSetLimit(int, size_t) {
    GATE();
    return OK;
}
static CUresult cuCtxSetCacheConfig(int) {
    GATE();
    return OK;
}
static CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    GATE();
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return OK;
}

// ---------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------

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
    if (posix_memalign((void**)&one.whole, GUARD_BYTES, bytes + 2 * GUARD_BYTES)) return OUT_OF_MEMORY;
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
    free(found->second.whole);
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
    if (!current()) return INVALID_CONTEXT;
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

// ---------------------------------------------------------------------------------------------------------
// Streams: work runs at once, or is recorded
// ---------------------------------------------------------------------------------------------------------

static Stream* stream_of(Stream* handle) {
    if ((uintptr_t)handle <= 2) return &state().default_stream;  // null, legacy, per thread
    return state().streams.count(handle) ? handle : nullptr;
}

static CUresult submit(Stream* handle, Work&& work) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        Capture& capture = *stream->capture;
        if (capture.invalid) return CAPTURE_INVALIDATED;
        auto node = std::make_unique<Node>();
        node->work = std::move(work);
        node->after = stream->last;
        stream->last = {node.get()};
        capture.graph->nodes.push_back(std::move(node));
        return OK;
    }
    CUresult result = run_work(work);
    if (result == LAUNCH_FAILED) {
        state().sticky = result;  // the launch itself succeeds; the next call learns of it
        return OK;
    }
    return result;
}

// A call that waits, on a stream that captures: the capture is lost.
static bool breaks_capture(Stream* stream) {
    if (!stream->capture) return false;
    stream->capture->invalid = true;
    return true;
}
// A call that waits for the whole device, while any stream captures.
static bool breaks_any_capture() {
    bool any = breaks_capture(&state().default_stream);
    for (Stream* stream : state().streams) any |= breaks_capture(stream);
    return any;
}
static void landed(Stream* stream) {
    for (Exec* exec : stream->in_flight) exec->in_flight = nullptr;
    stream->in_flight.clear();
}
static CUresult synchronize_all(CUresult due) {
    if (due) {
        for (Stream* stream : state().streams) landed(stream);  // whoever saw the wait fail may take things down
        return due;
    }
    if (breaks_any_capture()) return CAPTURE_UNSUPPORTED;
    landed(&state().default_stream);
    for (Stream* stream : state().streams) landed(stream);
    return check_guards();
}
static CUresult cuCtxSynchronize() {
    Gate gate(__func__);
    return synchronize_all(gate.result);
}
static CUresult cuCtxSynchronize_v2(Context*) {
    Gate gate(__func__);
    return synchronize_all(gate.result);
}

static CUresult create_stream(Stream** stream, unsigned flags, int priority) {
    if (!current()) return INVALID_CONTEXT;
    *stream = new Stream;
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    (*stream)->id = state().next_id++;
    state().streams.insert(*stream);
    return OK;
}
static CUresult cuStreamCreate(Stream** stream, unsigned flags) {
    GATE();
    return create_stream(stream, flags, 0);
}
static CUresult cuStreamCreateWithPriority(Stream** stream, unsigned flags, int priority) {
    GATE();
    return create_stream(stream, flags, priority);
}
static CUresult destroy_stream(Stream* stream) {
    State& s = state();
    if (!s.streams.count(stream)) return INVALID_HANDLE;
    if (stream->capture) {
        s.violations.push_back("a stream was destroyed while it captures");
        stream->capture->streams.erase(stream);
        if (stream->capture->origin == stream && stream->capture->owns_graph) {
            s.graphs.erase(stream->capture->graph);
            delete stream->capture->graph;
        }
    }
    landed(stream);
    s.streams.erase(stream);
    delete stream;
    return OK;
}
static CUresult cuStreamDestroy(Stream* stream) { RELEASE_GATE(destroy_stream(stream)); }
static CUresult cuStreamSynchronize(Stream* handle) {
    Gate gate(__func__);
    Stream* stream = stream_of(handle);
    if (gate.result) {
        if (stream) landed(stream);  // whoever saw the wait fail may take things down
        return gate.result;
    }
    if (!stream) return INVALID_HANDLE;
    if (breaks_capture(stream)) return CAPTURE_UNSUPPORTED;
    landed(stream);
    return check_guards();
}
static CUresult cuStreamQuery(Stream* handle) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    return breaks_capture(stream) ? CAPTURE_UNSUPPORTED : OK;
}
static CUresult cuStreamGetPriority(Stream* handle, int* priority) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *priority = stream->priority;
    return OK;
}
static CUresult cuStreamGetFlags(Stream* handle, unsigned* flags) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *flags = stream->flags;
    return OK;
}
static CUresult cuStreamGetId(Stream* handle, unsigned long long* id) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *id = stream->id;
    return OK;
}
static CUresult cuStreamGetCtx(Stream*, Context** context) {
    GATE();
    *context = current() ? current() : &state().primary;
    return OK;
}
static CUresult cuStreamGetCtx_v2(Stream*, Context** context, void** green) {
    GATE();
    *context = current() ? current() : &state().primary;
    if (green) *green = nullptr;
    return OK;
}
static CUresult cuStreamGetDevice(Stream*, int* device) {
    GATE();
    *device = 0;
    return OK;
}

static CUresult begin_capture(Stream* handle, Graph* into) {
    Stream* stream = stream_of(handle);
    if (!stream || stream == &state().default_stream) return stream ? CAPTURE_UNSUPPORTED : INVALID_HANDLE;
    if (stream->capture) return INVALID_VALUE;
    auto capture = std::make_shared<Capture>();
    capture->graph = into ? into : new Graph;
    capture->owns_graph = !into;
    capture->origin = stream;
    capture->streams.insert(stream);
    capture->id = state().next_id++;
    state().graphs.insert(capture->graph);
    stream->capture = capture;
    stream->last.clear();
    return OK;
}
static CUresult cuStreamBeginCapture(Stream* stream, int) {
    GATE();
    return begin_capture(stream, nullptr);
}
static CUresult cuStreamBeginCaptureToGraph(Stream* stream, Graph* graph, Node* const*, const EdgeData*, size_t, int) {
    GATE();
    return state().graphs.count(graph) ? begin_capture(stream, graph) : INVALID_HANDLE;
}
static CUresult end_capture(Stream* handle, Graph** graph) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture || stream->capture->origin != stream) return CAPTURE_UNMATCHED;
    auto capture = stream->capture;
    std::set<const Node*> joined;
    std::vector<const Node*> todo(stream->last.begin(), stream->last.end());
    while (!todo.empty()) {
        const Node* node = todo.back();
        todo.pop_back();
        if (joined.insert(node).second) todo.insert(todo.end(), node->after.begin(), node->after.end());
    }
    bool unjoined = false;
    for (Stream* one : capture->streams) {
        for (Node* node : one->last) unjoined |= !joined.count(node);
        one->capture = nullptr;
        one->last.clear();
    }
    if (capture->invalid || unjoined) {
        if (capture->owns_graph) {
            state().graphs.erase(capture->graph);
            delete capture->graph;
        }
        *graph = nullptr;
        return capture->invalid ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
    }
    *graph = capture->graph;
    return OK;
}
static CUresult cuStreamEndCapture(Stream* stream, Graph** graph) {
    Gate gate(__func__);
    CUresult ended = end_capture(stream, graph);
    if (gate.result && !ended && *graph) {  // a failed call gives no graph, but the capture has ended
        state().graphs.erase(*graph);
        delete *graph;
        *graph = nullptr;
    }
    return gate.result ? gate.result : ended;
}
static CUresult cuStreamIsCapturing(Stream* handle, int* status) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return OK;
}
static CUresult capture_info(Stream* handle, int* status, uint64_t* id, Graph** graph, Node* const** last, size_t* count) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    if (*status != 1) return OK;
    if (id) *id = stream->capture->id;
    if (graph) *graph = stream->capture->graph;
    if (last) *last = stream->last.data();
    if (count) *count = stream->last.size();
    return OK;
}
static CUresult cuStreamGetCaptureInfo_v2(Stream* stream, int* status, uint64_t* id, Graph** graph, Node* const** last, size_t* count) {
    GATE();
    return capture_info(stream, status, id, graph, last, count);
}
static CUresult cuStreamGetCaptureInfo_v3(Stream* stream, int* status, uint64_t* id, Graph** graph, Node* const** last, const EdgeData** edges,
                                          size_t* count) {
    GATE();
    if (edges) *edges = nullptr;
    return capture_info(stream, status, id, graph, last, count);
}
static CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    GATE();
    static thread_local int kept = 0;
    std::swap(*mode, kept);
    return OK;
}

static CUresult cuEventCreate(Event** event, unsigned flags) {
    GATE();
    if (!current()) return INVALID_CONTEXT;
    state().events.insert(*event = new Event);
    (*event)->flags = flags;
    return OK;
}
static CUresult destroy_event(Event* event) {
    if (!state().events.erase(event)) return INVALID_HANDLE;
    delete event;
    return OK;
}
static CUresult cuEventDestroy(Event* event) { RELEASE_GATE(destroy_event(event)); }
static CUresult record(Event* event, Stream* handle) {
    Stream* stream = stream_of(handle);
    if (!stream || !state().events.count(event)) return INVALID_HANDLE;
    event->capture = stream->capture;
    if (stream->capture) {
        event->last = stream->last;
        return OK;
    }
    event->at = seconds();
    event->recorded = true;
    return OK;
}
static CUresult cuEventRecord(Event* event, Stream* stream) {
    GATE();
    return record(event, stream);
}
static CUresult cuEventRecordWithFlags(Event* event, Stream* stream, unsigned) {
    GATE();
    return record(event, stream);
}
static CUresult cuEventQuery(Event* event) {
    GATE();
    if (!state().events.count(event)) return INVALID_HANDLE;
    return event->capture ? CAPTURED_EVENT : OK;
}
static CUresult cuEventSynchronize(Event* event) {
    GATE();
    if (!state().events.count(event)) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    return check_guards();
}
static CUresult cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    GATE();
    if (!state().events.count(from) || !state().events.count(to) || !from->recorded || !to->recorded || (from->flags | to->flags) & 2)
        return INVALID_HANDLE;
    *milliseconds = (float)((to->at - from->at) * 1e3);
    return OK;
}
static CUresult cuStreamWaitEvent(Stream* handle, Event* event, unsigned) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream || !state().events.count(event)) return INVALID_HANDLE;
    if (!event->capture) return stream->capture && event->recorded ? 905 : OK;  // isolation: an event from outside
    if (stream->capture && stream->capture != event->capture) return 902;       // two captures would merge
    if (!stream->capture) {
        stream->capture = event->capture;
        event->capture->streams.insert(stream);
        stream->last.clear();
    }
    stream->last.insert(stream->last.end(), event->last.begin(), event->last.end());
    return OK;
}
static CUresult cuLaunchHostFunc(Stream* stream, void (*call)(void*), void* data) {
    GATE();
    Work work;
    work.kind = Work::HOST;
    work.call = call;
    work.data = data;
    return submit(stream, std::move(work));
}

// ---------------------------------------------------------------------------------------------------------
// Copies
// ---------------------------------------------------------------------------------------------------------

enum Side { DEVICE_SIDE, HOST_SIDE, ANY_SIDE };
static bool side_holds(Side side, const void* at, size_t bytes) { return side != DEVICE_SIDE || !bytes || holder((CUdeviceptr)at, bytes); }
static CUresult copy(void* to, Side to_side, const void* from, Side from_side, size_t bytes, Stream* stream) {
    if (!side_holds(to_side, to, bytes) || !side_holds(from_side, from, bytes) || (bytes && (!to || !from))) return INVALID_VALUE;
    Work work;
    work.kind = Work::COPY;
    work.to = to;
    work.from = from;
    work.bytes = bytes;
    return submit(stream, std::move(work));
}
static CUresult copy_now(void* to, Side to_side, const void* from, Side from_side, size_t bytes) {
    if (breaks_any_capture()) return 906;  // a call that waits for the default stream, while another captures
    CUresult result = copy(to, to_side, from, from_side, bytes, nullptr);
    return result ? result : check_guards();
}
static CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
    GATE();
    return copy_now((void*)to, DEVICE_SIDE, from, HOST_SIDE, bytes);
}
static CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now(to, HOST_SIDE, (void*)from, DEVICE_SIDE, bytes);
}
static CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now((void*)to, DEVICE_SIDE, (void*)from, DEVICE_SIDE, bytes);
}
static CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    GATE();
    return copy_now((void*)to, ANY_SIDE, (void*)from, ANY_SIDE, bytes);
}
static CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, DEVICE_SIDE, from, HOST_SIDE, bytes, stream);
}
static CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy(to, HOST_SIDE, (void*)from, DEVICE_SIDE, bytes, stream);
}
static CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, DEVICE_SIDE, (void*)from, DEVICE_SIDE, bytes, stream);
}
static CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, Stream* stream) {
    GATE();
    return copy((void*)to, ANY_SIDE, (void*)from, ANY_SIDE, bytes, stream);
}
static CUresult fill(CUdeviceptr to, unsigned value, unsigned width, size_t count, Stream* stream) {
    if (to % width || (count && !holder(to, width * count))) return INVALID_VALUE;
    Work work;
    work.kind = Work::FILL;
    work.to = (void*)to;
    work.bytes = count;
    work.width = width;
    work.value = value;
    return submit(stream, std::move(work));
}
static CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) {
    GATE();
    return fill(to, value, 1, count, nullptr);
}
static CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) {
    GATE();
    return fill(to, value, 2, count, nullptr);
}
static CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) {
    GATE();
    return fill(to, value, 4, count, nullptr);
}
static CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 1, count, stream);
}
static CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 2, count, stream);
}
static CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, Stream* stream) {
    GATE();
    return fill(to, value, 4, count, stream);
}

// ---------------------------------------------------------------------------------------------------------
// Modules and kernels. A library is a module, a kernel is a function.
// ---------------------------------------------------------------------------------------------------------

static CUresult load_module(Module** module, const void* image) {
    size_t bytes = image_bytes(image);
    if (!bytes) {
        const unsigned char* head = (const unsigned char*)image;
        bool cubin = image && !memcmp(head, ELFMAG, SELFMAG);
        return cubin ? NO_BINARY_FOR_GPU : INVALID_IMAGE;
    }
    auto loaded = std::make_unique<Module>();
    loaded->image.assign((const char*)image, bytes);
    void* handle;
    const host_kernel* kernel = load_copy(loaded->image, &handle);
    if (!kernel) {
        if (handle) dlclose(handle);
        return INVALID_IMAGE;
    }
    auto* function = new Function;
    function->module = loaded.get();
    function->first = kernel;
    function->copies = {kernel};
    function->handles = {handle};
    loaded->function = function;
    loaded->name = kernel->name;
    state().modules.insert(*module = loaded.release());
    state().functions.insert(function);
    return OK;
}
// The shell of a module stays: a graph may still name its kernel, and is told so (run_work).
static CUresult unload_module(Module* module) {
    if (!state().modules.erase(module)) return INVALID_HANDLE;
    module->unloaded = true;
    state().functions.erase(module->function);
    for (void* handle : module->function->handles) dlclose(handle);
    module->image.clear();
    module->image.shrink_to_fit();
    return OK;
}
static CUresult find_function(Function** function, Module* module, const char* name) {
    if (!state().modules.count(module)) return INVALID_HANDLE;
    if (!name || module->name != name) return NOT_FOUND;
    *function = module->function;
    return OK;
}
static CUresult cuModuleLoadData(Module** module, const void* image) {
    GATE();
    if (!current()) return INVALID_CONTEXT;
    return load_module(module, image);
}
static CUresult cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) {
    GATE();
    if (!current()) return INVALID_CONTEXT;
    return load_module(module, image);
}
static CUresult cuModuleUnload(Module* module) { RELEASE_GATE(unload_module(module)); }
static CUresult cuModuleGetFunction(Function** function, Module* module, const char* name) {
    GATE();
    return find_function(function, module, name);
}
static CUresult cuModuleGetFunctionCount(unsigned* count, Module*) {
    GATE();
    *count = 1;
    return OK;
}
static CUresult cuModuleGetGlobal(CUdeviceptr*, size_t*, Module*, const char*) {
    GATE();
    return NOT_FOUND;
}
static CUresult cuModuleGetLoadingMode(int* mode) {
    GATE();
    *mode = 1;
    return OK;
}
static CUresult cuLibraryLoadData(Module** library, const void* image, int*, void**, unsigned, int*, void**, unsigned) {
    GATE();
    return load_module(library, image);
}
static CUresult cuLibraryUnload(Module* library) { RELEASE_GATE(unload_module(library)); }
static CUresult cuLibraryGetKernel(Function** kernel, Module* library, const char* name) {
    GATE();
    return find_function(kernel, library, name);
}
static CUresult cuLibraryGetKernelCount(unsigned* count, Module*) {
    GATE();
    *count = 1;
    return OK;
}
static CUresult cuLibraryGetModule(Module** module, Module* library) {
    GATE();
    *module = library;
    return OK;
}
static CUresult cuKernelGetFunction(Function** function, Function* kernel) {
    GATE();
    *function = kernel;
    return state().functions.count(kernel) ? OK : INVALID_HANDLE;
}
static CUresult cuKernelGetLibrary(Module** library, Function* kernel) {
    GATE();
    *library = kernel->module;
    return OK;
}
static CUresult cuFuncGetModule(Module** module, Function* function) {
    GATE();
    *module = function->module;
    return OK;
}
static CUresult cuFuncGetName(const char** name, Function* function) {
    GATE();
    *name = function->module->name.c_str();
    return OK;
}
static CUresult cuFuncLoad(Function*) {
    GATE();
    return OK;
}
static CUresult cuFuncIsLoaded(int* loaded, Function*) {
    GATE();
    *loaded = 1;
    return OK;
}
static CUresult parameter_info(Function* function, size_t index, size_t* offset, size_t* size) {
    if (!state().functions.count(function)) return INVALID_HANDLE;
    if (index >= function->first->parameter_count) return INVALID_VALUE;
    size_t at = 0;
    for (size_t i = 0;; i++) {
        size_t bytes = function->first->parameter_sizes[i];
        size_t align = bytes >= 16 ? 16 : bytes >= 8 ? 8 : bytes >= 4 ? 4 : bytes >= 2 ? 2 : 1;
        at = (at + align - 1) / align * align;
        if (i == index) {
            if (offset) *offset = at;
            if (size) *size = bytes;
            return OK;
        }
        at += bytes;
    }
}
static CUresult cuFuncGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
    GATE();
    return parameter_info(function, index, offset, size);
}
static CUresult cuKernelGetParamInfo(Function* function, size_t index, size_t* offset, size_t* size) {
    GATE();
    return parameter_info(function, index, offset, size);
}
static CUresult get_attribute(int* value, int attribute, Function* function) {
    if (!state().functions.count(function)) return INVALID_HANDLE;
    switch (attribute) {
        case 0: *value = 1024; break;
        case 1: *value = (int)function->first->static_shared_bytes; break;
        case 4: *value = 64; break;
        case 5: case 6: *value = state().major * 10 + state().minor; break;
        case 8: *value = function->max_dynamic; break;
        case 9: *value = function->carveout; break;
        default: *value = 0;
    }
    return OK;
}
static CUresult set_attribute(Function* function, int attribute, int value) {
    if (!state().functions.count(function)) return INVALID_HANDLE;
    if (attribute == 8) {
        if (value < 0 || value + (int)function->first->static_shared_bytes > 232448) return INVALID_VALUE;
        function->max_dynamic = value;
    } else if (attribute == 9) {
        if (value < -1 || value > 100) return INVALID_VALUE;
        function->carveout = value;
    } else if (attribute < 10) {
        return INVALID_VALUE;
    }
    return OK;
}
static CUresult cuFuncGetAttribute(int* value, int attribute, Function* function) {
    GATE();
    return get_attribute(value, attribute, function);
}
static CUresult cuFuncSetAttribute(Function* function, int attribute, int value) {
    GATE();
    return set_attribute(function, attribute, value);
}
static CUresult cuKernelGetAttribute(int* value, int attribute, Function* kernel, int) {
    GATE();
    return get_attribute(value, attribute, kernel);
}
static CUresult cuKernelSetAttribute(int attribute, int value, Function* kernel, int) {
    GATE();
    return set_attribute(kernel, attribute, value);
}
static CUresult cuFuncSetCacheConfig(Function*, int) {
    GATE();
    return OK;
}
static int blocks_per_sm(Function* function, int threads, size_t dynamic) {
    size_t shared = dynamic + function->first->static_shared_bytes + 1024;
    int by_threads = threads > 0 ? 2048 / ((threads + 31) / 32 * 32) : 0, by_shared = (int)(233472 / shared);
    int fit = by_threads < by_shared ? by_threads : by_shared;
    return fit < 32 ? fit : 32;
}
static CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t dynamic) {
    GATE();
    if (!state().functions.count(function)) return INVALID_HANDLE;
    *blocks = blocks_per_sm(function, threads, dynamic);
    return OK;
}
static CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, Function* function, int threads, size_t dynamic, unsigned) {
    GATE();
    if (!state().functions.count(function)) return INVALID_HANDLE;
    *blocks = blocks_per_sm(function, threads, dynamic);
    return OK;
}

static CUresult make_kernel_work(Work& work, Function* function, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                                 void** parameters, void** extra) {
    if (!state().functions.count(function)) return INVALID_HANDLE;
    uint64_t threads = (uint64_t)block[0] * block[1] * block[2];
    if (!threads || threads > 1024 || block[2] > 64 || !grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return INVALID_VALUE;
    if ((int)shared_bytes > function->max_dynamic || shared_bytes + function->first->static_shared_bytes > 232448) return INVALID_VALUE;
    work.kind = Work::KERNEL;
    work.function = function;
    memcpy(work.grid, grid, sizeof work.grid);
    memcpy(work.block, block, sizeof work.block);
    work.shared_bytes = shared_bytes;
    unsigned count = function->first->parameter_count;
    if (count && !parameters && !extra) return INVALID_VALUE;
    const char* packed = nullptr;
    for (void** word = extra; !parameters && word && *word; word += 2)
        if (*word == (void*)1) packed = (const char*)word[1];  // CU_LAUNCH_PARAM_BUFFER_POINTER
    if (count && !parameters && !packed) return INVALID_VALUE;
    work.parameters.clear();
    for (unsigned i = 0; i < count; i++) {
        size_t offset, size;
        parameter_info(function, i, &offset, &size);
        const char* from = parameters ? (const char*)parameters[i] : packed + offset;
        work.parameters.emplace_back(from, from + size);
    }
    return OK;
}
static CUresult apply_attributes(Work& work, const Attribute* attributes, unsigned count) {
    uint64_t blocks = (uint64_t)work.grid[0] * work.grid[1] * work.grid[2];
    for (unsigned i = 0; i < count; i++) {
        const Attribute& one = attributes[i];
        if (one.id == 2 && one.value.number) {
            int fit = blocks_per_sm(work.function, work.block[0] * work.block[1] * work.block[2], work.shared_bytes) * state().sms;
            if (blocks > (uint64_t)fit) return COOPERATIVE_LAUNCH_TOO_LARGE;
            work.together = (uint32_t)blocks;
        } else if (one.id == 4) {
            const unsigned* cluster = one.value.three;
            if (!cluster[0] || cluster[1] != 1 || cluster[2] != 1 || cluster[0] > 16 || work.grid[0] % cluster[0] || state().major < 9)
                return INVALID_CLUSTER_SIZE;
            if (work.together == 1) work.together = cluster[0];
        } else if (one.id == 6) {
            if (one.value.number && state().major < 9) return NOT_SUPPORTED;
            work.programmatic = one.value.number != 0;
        }
    }
    return OK;
}
static CUresult cuLaunchKernelEx(const Config* config, Function* function, void** parameters, void** extra) {
    GATE();
    Work work;
    CUresult result = make_kernel_work(work, function, config->grid, config->block, config->shared_bytes, parameters, extra);
    if (!result) result = apply_attributes(work, config->attributes, config->attribute_count);
    return result ? result : submit(config->stream, std::move(work));
}
static CUresult launch_plain(Function* function, const unsigned* grid, const unsigned* block, unsigned shared_bytes, Stream* stream,
                             void** parameters, void** extra, bool cooperative) {
    Work work;
    CUresult result = make_kernel_work(work, function, grid, block, shared_bytes, parameters, extra);
    Attribute attribute = {};
    attribute.id = 2;
    attribute.value.number = cooperative;
    if (!result) result = apply_attributes(work, &attribute, 1);
    return result ? result : submit(stream, std::move(work));
}
static CUresult cuLaunchKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                               unsigned shared_bytes, Stream* stream, void** parameters, void** extra) {
    GATE();
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    return launch_plain(function, grid, block, shared_bytes, stream, parameters, extra, false);
}
static CUresult cuLaunchCooperativeKernel(Function* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                          unsigned shared_bytes, Stream* stream, void** parameters) {
    GATE();
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    return launch_plain(function, grid, block, shared_bytes, stream, parameters, nullptr, true);
}

// ---------------------------------------------------------------------------------------------------------
// Graphs
// ---------------------------------------------------------------------------------------------------------

static CUresult cuGraphCreate(Graph** graph, unsigned) {
    GATE();
    state().graphs.insert(*graph = new Graph);
    return OK;
}
static CUresult destroy_graph(Graph* graph) {
    if (!state().graphs.erase(graph)) return INVALID_HANDLE;
    delete graph;
    return OK;
}
static CUresult cuGraphDestroy(Graph* graph) { RELEASE_GATE(destroy_graph(graph)); }
static CUresult cuGraphGetNodes(Graph* graph, Node** nodes, size_t* count) {
    GATE();
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    size_t have = graph->nodes.size();
    for (size_t i = 0; nodes && i < *count; i++) nodes[i] = i < have ? graph->nodes[i].get() : nullptr;
    if (!nodes || have < *count) *count = have;
    return OK;
}
static CUresult cuGraphGetEdges(Graph* graph, Node** from, Node** to, EdgeData* data, size_t* count) {
    GATE();
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    size_t have = 0;
    for (const auto& node : graph->nodes) {
        for (Node* before : node->after) {
            if (from && to && have < *count) {
                from[have] = before;
                to[have] = node.get();
                // As the real driver records it: the kernel before releases a programmatic launch early.
                bool programmatic = node->work.programmatic && before->work.kind == Work::KERNEL;
                if (data) data[have] = programmatic ? EdgeData{1, 0, 1, {}} : EdgeData{};
            }
            have++;
        }
    }
    if (!from || have < *count) *count = have;
    return OK;
}
static CUresult cuGraphNodeGetType(Node* node, int* type) {
    GATE();
    *type = node->work.kind;
    return OK;
}
static CUresult cuGraphKernelNodeGetParams(Node* node, KernelParameters* to) {
    GATE();
    if (node->work.kind != Work::KERNEL) return INVALID_VALUE;
    static thread_local std::vector<void*> pointers;
    pointers.clear();
    for (const auto& one : node->work.parameters) pointers.push_back((void*)one.data());
    *to = {};
    to->function = node->work.function;
    memcpy(to->grid, node->work.grid, sizeof to->grid);
    memcpy(to->block, node->work.block, sizeof to->block);
    to->shared_bytes = node->work.shared_bytes;
    to->parameters = pointers.data();
    return OK;
}
static CUresult cuGraphDebugDotPrint(Graph* graph, const char* path, unsigned) {
    GATE();
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    FILE* file = fopen(path, "w");
    if (!file) return OPERATING_SYSTEM;
    static const char* kinds[] = {"kernel", "memcpy", "memset", "host", "graph", "empty"};
    fprintf(file, "digraph step {\n");
    for (const auto& node : graph->nodes) {
        const Work& work = node->work;
        fprintf(file, "  n%p [label=\"%s\"];\n", (void*)node.get(), work.kind == Work::KERNEL ? work.function->module->name.c_str() : kinds[work.kind]);
        for (Node* before : node->after) fprintf(file, "  n%p -> n%p;\n", (void*)before, (void*)node.get());
    }
    fprintf(file, "}\n");
    return fclose(file) ? OPERATING_SYSTEM : OK;
}
static CUresult instantiate(Exec** exec, Graph* graph) {
    if (!state().graphs.count(graph)) return INVALID_HANDLE;
    *exec = new Exec;
    for (const auto& node : graph->nodes) {
        (*exec)->work.push_back(node->work);
        (*exec)->nodes.push_back(node.get());
    }
    state().execs.insert(*exec);
    return OK;
}
static CUresult cuGraphInstantiate(Exec** exec, Graph* graph, unsigned long long) {
    GATE();
    return instantiate(exec, graph);
}
static CUresult cuGraphInstantiateWithParams(Exec** exec, Graph* graph, void* how) {
    GATE();
    struct Parameters {  // CUDA_GRAPH_INSTANTIATE_PARAMS
        uint64_t flags;
        Stream* upload;
        Node* wrong;
        int result;
    }* parameters = (Parameters*)how;
    parameters->result = 0;
    parameters->wrong = nullptr;
    return instantiate(exec, graph);
}
static CUresult destroy_exec(Exec* exec) {
    if (!state().execs.erase(exec)) return INVALID_HANDLE;
    if (exec->in_flight) {
        state().violations.push_back("an executable graph was destroyed before its stream was synchronized");
        exec->in_flight->in_flight.erase(exec);
    }
    delete exec;
    return OK;
}
static CUresult cuGraphExecDestroy(Exec* exec) { RELEASE_GATE(destroy_exec(exec)); }
static CUresult cuGraphUpload(Exec* exec, Stream*) {
    GATE();
    return state().execs.count(exec) ? OK : INVALID_HANDLE;
}
static CUresult cuGraphExecGetFlags(Exec*, unsigned long long* flags) {
    GATE();
    *flags = 0;
    return OK;
}
static CUresult cuGraphLaunch(Exec* exec, Stream* handle) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream || !state().execs.count(exec)) return INVALID_HANDLE;
    if (breaks_capture(stream)) return CAPTURE_UNSUPPORTED;
    for (const Work& work : exec->work) {
        CUresult result = run_work(work);
        if (result == LAUNCH_FAILED) {
            state().sticky = result;
            break;
        }
        if (result) return result;
    }
    exec->in_flight = stream;
    stream->in_flight.insert(exec);
    return OK;
}
static CUresult cuGraphExecUpdate(Exec* exec, Graph* graph, void* result_info) {
    GATE();
    struct Info {  // CUgraphExecUpdateResultInfo
        int result;
        Node *wrong, *from;
    }* info = (Info*)result_info;
    if (!state().execs.count(exec) || !state().graphs.count(graph)) return INVALID_HANDLE;
    bool same = exec->work.size() == graph->nodes.size();
    for (size_t i = 0; same && i < exec->work.size(); i++) same = exec->work[i].kind == graph->nodes[i]->work.kind;
    if (info) *info = {same ? 0 : 2, nullptr, nullptr};
    if (!same) return EXEC_UPDATE_FAILURE;
    for (size_t i = 0; i < exec->work.size(); i++) {
        exec->work[i] = graph->nodes[i]->work;
        exec->nodes[i] = graph->nodes[i].get();
    }
    return OK;
}
static CUresult cuGraphExecKernelNodeSetParams(Exec* exec, Node* node, const KernelParameters* to) {
    GATE();
    if (!state().execs.count(exec)) return INVALID_HANDLE;
    for (size_t i = 0; i < exec->nodes.size(); i++) {
        if (exec->nodes[i] != node) continue;
        Work changed = exec->work[i];
        CUresult result = make_kernel_work(changed, to->function ? to->function : to->kernel, to->grid, to->block, to->shared_bytes,
                                           to->parameters, to->extra);
        if (!result) exec->work[i] = std::move(changed);
        return result;
    }
    return INVALID_VALUE;
}

// ---------------------------------------------------------------------------------------------------------
// Finding the calls
// ---------------------------------------------------------------------------------------------------------

struct Known {
    const char* name;
    int since;  // the first CUDA version that asks for this meaning of the name
    void* call;
};
#define KNOWN(name) {#name, 0, (void*)name}
EXPORT CUresult cuGetProcAddress_v2(const char* name, void** call, int version, unsigned long long flags, int* status);
EXPORT CUresult cuGetProcAddress(const char* name, void** call, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, call, version, flags, nullptr);
}
static const Known KNOWN_CALLS[] = {
    KNOWN(cuInit), KNOWN(cuDriverGetVersion), KNOWN(cuGetErrorName), KNOWN(cuGetErrorString), KNOWN(cuDeviceGetCount), KNOWN(cuDeviceGet),
    KNOWN(cuDeviceGetName), KNOWN(cuDeviceGetUuid), KNOWN(cuDeviceGetPCIBusId), KNOWN(cuDeviceTotalMem), KNOWN(cuDeviceGetAttribute),
    KNOWN(cuDevicePrimaryCtxRetain), KNOWN(cuDevicePrimaryCtxRelease), KNOWN(cuDevicePrimaryCtxReset), KNOWN(cuDevicePrimaryCtxGetState),
    KNOWN(cuDevicePrimaryCtxSetFlags), KNOWN(cuCtxSetCurrent), KNOWN(cuCtxGetCurrent), KNOWN(cuCtxPushCurrent), KNOWN(cuCtxPopCurrent),
    {"cuCtxCreate", 12050, (void*)cuCtxCreate}, KNOWN(cuCtxDestroy), KNOWN(cuCtxGetDevice), {"cuCtxGetDevice", 13000, (void*)cuCtxGetDevice_v2},
    KNOWN(cuCtxGetApiVersion), KNOWN(cuCtxGetId), KNOWN(cuCtxGetFlags), KNOWN(cuCtxGetLimit), KNOWN(cuCtxSetLimit), KNOWN(cuCtxSetCacheConfig),
    KNOWN(cuCtxGetStreamPriorityRange), KNOWN(cuCtxSynchronize), {"cuCtxSynchronize", 13000, (void*)cuCtxSynchronize_v2},
    KNOWN(cuMemAlloc), KNOWN(cuMemFree), KNOWN(cuMemAllocAsync), KNOWN(cuMemAllocFromPoolAsync), KNOWN(cuMemFreeAsync), KNOWN(cuMemHostAlloc),
    KNOWN(cuMemAllocHost), KNOWN(cuMemFreeHost), KNOWN(cuMemHostGetDevicePointer), KNOWN(cuMemHostRegister), KNOWN(cuMemHostUnregister),
    KNOWN(cuMemGetInfo), KNOWN(cuMemGetAddressRange), KNOWN(cuPointerGetAttribute), KNOWN(cuPointerGetAttributes),
    KNOWN(cuDeviceGetDefaultMemPool), KNOWN(cuDeviceGetMemPool), KNOWN(cuDeviceSetMemPool), KNOWN(cuMemPoolCreate), KNOWN(cuMemPoolDestroy),
    KNOWN(cuMemPoolTrimTo), KNOWN(cuMemPoolSetAccess), KNOWN(cuMemPoolSetAttribute), KNOWN(cuMemPoolGetAttribute), KNOWN(cuStreamCreate),
    KNOWN(cuStreamCreateWithPriority), KNOWN(cuStreamDestroy), KNOWN(cuStreamSynchronize), KNOWN(cuStreamQuery), KNOWN(cuStreamGetPriority),
    KNOWN(cuStreamGetFlags), KNOWN(cuStreamGetId), KNOWN(cuStreamGetCtx), {"cuStreamGetCtx", 12050, (void*)cuStreamGetCtx_v2},
    KNOWN(cuStreamGetDevice), KNOWN(cuStreamBeginCapture), KNOWN(cuStreamBeginCaptureToGraph), KNOWN(cuStreamEndCapture),
    KNOWN(cuStreamIsCapturing), {"cuStreamGetCaptureInfo", 11030, (void*)cuStreamGetCaptureInfo_v2},
    {"cuStreamGetCaptureInfo", 12030, (void*)cuStreamGetCaptureInfo_v3}, KNOWN(cuThreadExchangeStreamCaptureMode), KNOWN(cuEventCreate),
    KNOWN(cuEventDestroy), KNOWN(cuEventRecord), KNOWN(cuEventRecordWithFlags), KNOWN(cuEventQuery), KNOWN(cuEventSynchronize),
    KNOWN(cuEventElapsedTime), KNOWN(cuStreamWaitEvent), KNOWN(cuLaunchHostFunc), KNOWN(cuMemcpyHtoD), KNOWN(cuMemcpyDtoH), KNOWN(cuMemcpyDtoD),
    KNOWN(cuMemcpy), KNOWN(cuMemcpyHtoDAsync), KNOWN(cuMemcpyDtoHAsync), KNOWN(cuMemcpyDtoDAsync), KNOWN(cuMemcpyAsync), KNOWN(cuMemsetD8),
    KNOWN(cuMemsetD16), KNOWN(cuMemsetD32), KNOWN(cuMemsetD8Async), KNOWN(cuMemsetD16Async), KNOWN(cuMemsetD32Async), KNOWN(cuModuleLoadData),
    KNOWN(cuModuleLoadDataEx), KNOWN(cuModuleUnload), KNOWN(cuModuleGetFunction), KNOWN(cuModuleGetFunctionCount), KNOWN(cuModuleGetGlobal),
    KNOWN(cuModuleGetLoadingMode), KNOWN(cuLibraryLoadData), KNOWN(cuLibraryUnload), KNOWN(cuLibraryGetKernel), KNOWN(cuLibraryGetKernelCount),
    KNOWN(cuLibraryGetModule), KNOWN(cuKernelGetFunction), KNOWN(cuKernelGetLibrary), KNOWN(cuFuncGetModule), KNOWN(cuFuncGetName),
    KNOWN(cuFuncLoad), KNOWN(cuFuncIsLoaded), KNOWN(cuFuncGetParamInfo), KNOWN(cuKernelGetParamInfo), KNOWN(cuFuncGetAttribute),
    KNOWN(cuFuncSetAttribute), KNOWN(cuKernelGetAttribute), KNOWN(cuKernelSetAttribute), KNOWN(cuFuncSetCacheConfig),
    KNOWN(cuOccupancyMaxActiveBlocksPerMultiprocessor), KNOWN(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags), KNOWN(cuLaunchKernelEx),
    KNOWN(cuLaunchKernel), KNOWN(cuLaunchCooperativeKernel), KNOWN(cuGraphCreate), KNOWN(cuGraphDestroy), KNOWN(cuGraphGetNodes),
    {"cuGraphGetEdges", 12030, (void*)cuGraphGetEdges}, KNOWN(cuGraphNodeGetType), {"cuGraphKernelNodeGetParams", 12000, (void*)cuGraphKernelNodeGetParams},
    KNOWN(cuGraphDebugDotPrint), {"cuGraphInstantiate", 11040, (void*)cuGraphInstantiate}, {"cuGraphInstantiateWithFlags", 0, (void*)cuGraphInstantiate},
    KNOWN(cuGraphInstantiateWithParams), KNOWN(cuGraphExecDestroy), KNOWN(cuGraphUpload), KNOWN(cuGraphExecGetFlags), KNOWN(cuGraphLaunch),
    {"cuGraphExecUpdate", 12000, (void*)cuGraphExecUpdate}, {"cuGraphExecKernelNodeSetParams", 12000, (void*)cuGraphExecKernelNodeSetParams},
    {"cuGetProcAddress", 0, (void*)cuGetProcAddress}, {"cuGetProcAddress", 12000, (void*)cuGetProcAddress_v2},
};

EXPORT CUresult cuGetProcAddress_v2(const char* name, void** call, int version, unsigned long long, int* status) {
    const Known* best = nullptr;
    for (const Known& one : KNOWN_CALLS)
        if (!strcmp(one.name, name) && one.since <= version && (!best || one.since >= best->since)) best = &one;
    *call = best ? best->call : nullptr;
    if (status) *status = best ? 0 : 1;
    return best ? OK : NOT_FOUND;
}

// ---------------------------------------------------------------------------------------------------------
// For tests (runtime/host/__init__.py)
// ---------------------------------------------------------------------------------------------------------

EXPORT void psigraph_host_configure(int sms, unsigned long long memory_bytes) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    if (sms > 0) state().sms = sms;
    if (memory_bytes) state().total = memory_bytes;
}
// The nth call from now on (1: the next) fails once with this code; 0: none does. The log starts anew.
EXPORT void psigraph_host_inject(long nth, int code) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    State& s = state();
    s.calls.clear();
    s.counted = 0;
    s.fail_at = nth;
    s.fail_with = code;
}
EXPORT long psigraph_host_call_count() {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    return (long)state().calls.size();
}
EXPORT const char* psigraph_host_call(long index) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    return index >= 0 && index < (long)state().calls.size() ? state().calls[index] : "";
}
EXPORT void psigraph_host_order(int order) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    state().order = (uint32_t)order;
}
// What is still there: 0 device memory, 1 host memory, 2 modules, 3 streams, 4 events, 5 graphs, 6 executable graphs, 7 primary context.
EXPORT long psigraph_host_live(int what) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    State& s = state();
    long host = 0;
    for (const auto& [at, one] : s.memory) host += one.host;
    const long all[] = {(long)s.memory.size() - host, host, (long)s.modules.size(), (long)s.streams.size(), (long)s.events.size(),
                        (long)s.graphs.size(), (long)s.execs.size(), (long)s.primary.retained};
    return what >= 0 && what < 8 ? all[what] : -1;
}
EXPORT long psigraph_host_violation_count() {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    return (long)state().violations.size();
}
EXPORT const char* psigraph_host_violation(long index) {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    return index >= 0 && index < (long)state().violations.size() ? state().violations[index].c_str() : "";
}
EXPORT const char* psigraph_host_message() {
    static thread_local std::string kept;
    std::lock_guard<std::recursive_mutex> held(state().lock);
    return (kept = state().message).c_str();
}
// After a test that broke the device: forget the error and the notes (not the objects).
EXPORT void psigraph_host_forget() {
    std::lock_guard<std::recursive_mutex> held(state().lock);
    State& s = state();
    s.sticky = OK;
    s.message.clear();
    s.violations.clear();
    s.calls.clear();
    s.fail_at = s.counted = 0;
}
EXPORT const char* psigraph_host_marker() { return "psigraph host target"; }
