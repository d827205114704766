// The stand-in driver. Modules and kernels. A library is a module, a kernel is a function.
#ifndef PSIGRAPH_LIBCUDA_MODULES_H
#define PSIGRAPH_LIBCUDA_MODULES_H
#include "libcuda_streams.h"

static CUresult load_module(Module** module, const void* image) {
    size_t bytes = image_bytes(image);
    if (!bytes) {
        const unsigned char* head = (const unsigned char*)image;
        bool cubin = image && !memcmp(head, ELFMAG, SELFMAG);
        return cubin ? NO_BINARY_FOR_GPU : INVALID_IMAGE;
    }
    auto loaded = std::make_unique<Module>();
    loaded->image.assign((const char*)image, bytes);
    Copy copy = load_copy(loaded->image);
    if (!copy.kernel) return INVALID_IMAGE;
    auto* function = new Function;
    function->module = loaded.get();
    function->first = copy.kernel;
    function->copies = {copy};
    loaded->function = function;
    loaded->name = copy.kernel->name;
    state().modules.insert(*module = loaded.release());
    state().functions.insert(function);
    return OK;
}
// The shell of a module stays: a graph may still name its kernel, and is told so (run_work).
static CUresult unload_module(Module* module) {
    if (!state().modules.erase(module)) return INVALID_HANDLE;
    module->unloaded = true;
    state().functions.erase(module->function);
    for (const Copy& copy : module->function->copies) unload(copy);
    module->function->copies.clear();
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
    return load_module(module, image);
}
static CUresult cuModuleLoadDataEx(Module** module, const void* image, unsigned, int*, void**) {
    GATE();
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
static int most_dynamic(const Function* function) {
    return function->max_dynamic >= 0 ? function->max_dynamic : (48 << 10) - (int)function->first->static_shared_bytes;
}
static CUresult get_attribute(int* value, int attribute, Function* function) {
    if (!state().functions.count(function)) return INVALID_HANDLE;
    switch (attribute) {
        case 0: *value = 1024; break;
        case 1: *value = (int)function->first->static_shared_bytes; break;
        case 4: *value = 64; break;
        case 5: case 6: *value = state().major * 10 + state().minor; break;
        case 8: *value = most_dynamic(function); break;
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
    } else if (attribute == 14) {
        function->large_clusters = value != 0;
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
    if ((int)shared_bytes > most_dynamic(function) || shared_bytes + function->first->static_shared_bytes > 232448) return INVALID_VALUE;
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
            unsigned most = work.function->large_clusters ? 16 : 8;
            if (!cluster[0] || cluster[1] != 1 || cluster[2] != 1 || cluster[0] > most || work.grid[0] % cluster[0] || state().major < 9)
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

#endif
