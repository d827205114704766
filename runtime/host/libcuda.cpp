// A stand-in for libcuda.so.1: the driver's calls on plain host memory, with kernels that g++ compiled.
//
// Work runs when it is put on a stream, in that order; a stream that captures records it instead, and a graph
// is that record. What this driver does not know, cuGetProcAddress does not find, as with an old driver.
// Tests ask for the log of calls, make the Nth call fail, and read what was left or done wrong
// (the psigraph_host_* functions at the end; environment: see docs/debugging.md).
#include "libcuda_copies.h"
#include "libcuda_device.h"
#include "libcuda_graphs.h"
#include "libcuda_memory.h"
#include "libcuda_modules.h"
#include "libcuda_streams.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

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
