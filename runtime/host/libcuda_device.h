// The stand-in driver. Process, device, context.
#ifndef PSIGRAPH_LIBCUDA_DEVICE_H
#define PSIGRAPH_LIBCUDA_DEVICE_H
#include "libcuda_state.h"

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
static bool in_a_context() { return !current_contexts.empty(); }

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

#endif
