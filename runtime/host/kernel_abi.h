// What a compiled kernel and whoever runs it (libcuda.cpp, check_runner.cpp) agree on. Plain C layout.
#ifndef PSIGRAPH_HOST_KERNEL_ABI_H
#define PSIGRAPH_HOST_KERNEL_ABI_H
#include <stdint.h>

#define PSIGRAPH_HOST_ABI 1u
#define PSIGRAPH_HOST_SYMBOL "psigraph_host_kernel"

enum host_order { HOST_FORWARD = 0, HOST_REVERSE = 1, HOST_SHUFFLE = 2 };

// One kernel argument that points to device memory, for builds that watch every access.
struct host_region {
    const char* base;
    uint64_t bytes;
    uint32_t argument;  // its place among the kernel's parameters
    uint32_t produced;  // written by an earlier kernel of the step: no read before the wait, `fresh` reads only
    uint32_t writable;  // this kernel may write it
};

struct host_launch {
    uint32_t grid[3], block[3];
    uint32_t shared_bytes;
    uint32_t together;      // blocks that run side by side: the cluster's size, or the whole grid if cooperative
    uint32_t programmatic;  // every block must execute the wait
    uint32_t order;         // host_order
    uint64_t seed;          // of HOST_SHUFFLE
    void** parameters;
    uint32_t* next_group;  // shared by the workers of one launch: the next group of blocks to run
    uint32_t* stop;        // set by the first worker that fails
    const struct host_region* regions;
    uint32_t region_count;
    char message[1024];  // "kind: what happened", when run() does not return 0
};

struct host_kernel {
    uint32_t abi;
    uint32_t static_shared_bytes;
    const char* name;
    uint32_t parameter_count;
    const uint32_t* parameter_sizes;
    int (*run)(struct host_launch*);
};

#endif
