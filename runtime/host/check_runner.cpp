// Runs one launch of one compiled kernel in a process of its own, where a crash harms nobody (check.py).
//
//   check_runner IMAGE LAUNCH RESULT
//
// LAUNCH: 16 words (magic, grid, block, shared bytes, together, programmatic, order, seed, number of arguments,
// rest 0), then for each argument 4 words (pointer?, produced?, writable?, bytes) and its bytes. RESULT: the bytes
// of the writable buffers after the launch, one after the other. Every buffer is an allocation of its exact size,
// so that AddressSanitizer sees its ends. Exit status: 0; 2 for a wrong call; 3 if the kernel failed, its message
// on standard output; else what the sanitizers give.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "kernel_abi.h"

static int wrong(const char* what) {
    fprintf(stderr, "check_runner: %s\n", what);
    return 2;
}

int main(int count, char** words) {
    if (count != 4) return wrong("three arguments are needed");
    void* library = dlopen(words[1], RTLD_NOW);
    if (!library) return wrong(dlerror());
    auto get = (const host_kernel* (*)())dlsym(library, PSIGRAPH_HOST_SYMBOL);
    const host_kernel* kernel = get ? get() : nullptr;
    if (!kernel || kernel->abi != PSIGRAPH_HOST_ABI) return wrong("not a kernel image");
    FILE* file = fopen(words[2], "rb");
    uint32_t head[16];
    if (!file || fread(head, sizeof head, 1, file) != 1 || head[0] != 0x70736967) return wrong("not a launch");
    if (head[12] != kernel->parameter_count) return wrong(("the kernel takes " + std::to_string(kernel->parameter_count) + " arguments").c_str());
    std::vector<void*> parameters;
    std::vector<host_region> regions;
    for (uint32_t i = 0; i < head[12]; i++) {
        uint32_t about[4];
        if (fread(about, sizeof about, 1, file) != 1) return wrong("the launch ends early");
        uint32_t bytes = about[3];
        if ((about[0] ? 8 : bytes) != kernel->parameter_sizes[i]) return wrong(("argument " + std::to_string(i) + " has the wrong size").c_str());
        void* memory;
        if (posix_memalign(&memory, 256, bytes ? bytes : 1)) return wrong("no memory");
        if (bytes && fread(memory, bytes, 1, file) != 1) return wrong("the launch ends early");
        if (about[0]) {
            regions.push_back({(const char*)memory, bytes, i, about[1], about[2]});
            parameters.push_back(new void*(memory));
        } else {
            parameters.push_back(memory);
        }
    }
    fclose(file);
    uint32_t next = 0, stop = 0;
    host_launch launch = {};
    memcpy(launch.grid, head + 1, 12);
    memcpy(launch.block, head + 4, 12);
    launch.shared_bytes = head[7];
    launch.together = head[8];
    launch.programmatic = head[9];
    launch.order = head[10];
    launch.seed = head[11];
    launch.parameters = parameters.data();
    launch.next_group = &next;
    launch.stop = &stop;
    launch.regions = regions.data();
    launch.region_count = (uint32_t)regions.size();
    if (kernel->run(&launch)) {
        puts(launch.message);
        return 3;
    }
    file = fopen(words[3], "wb");
    if (!file) return wrong("the result cannot be written");
    for (const host_region& region : regions)
        if (region.writable && region.bytes && fwrite(region.base, region.bytes, 1, file) != 1) return wrong("the result cannot be written");
    return fclose(file) ? wrong("the result cannot be written") : 0;
}
