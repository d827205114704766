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

#include "builtins.h"

namespace host {

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

#endif
