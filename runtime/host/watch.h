// What cuda_on_cpu.h tells the watcher (watch.cpp), which sees every load and store of a kernel.
#ifndef PSIGRAPH_HOST_WATCH_H
#define PSIGRAPH_HOST_WATCH_H
#include <stddef.h>

#include "kernel_abi.h"

enum watch_how { WATCH_PLAIN, WATCH_FRESH, WATCH_EARLIER, WATCH_NON_COHERENT, WATCH_ATOMIC };

extern "C" {
void watch_launch(const host_launch* launch);
void watch_block(unsigned block, unsigned threads, const char* dynamic, size_t dynamic_bytes, const char* statics, size_t static_bytes);
// Who runs from here on; whether a thread of its block, and whether itself, has executed the programmatic wait.
void watch_thread(unsigned block, unsigned thread, bool block_waited, bool waited);
void watch_barrier(unsigned block);
void watch_warp(unsigned block, unsigned warp);
void watch_fence();
// A bulk copy is issued: its source is read, its target is nobody's until it arrives.
void watch_issued(const void* to, const void* from, size_t bytes);
void watch_arrived(const void* to, size_t bytes);
extern watch_how watch_access;
// Given by cuda_on_cpu.h: ends the launch.
void host_watch_failed(const char* kind, const char* text);
}

// How the loads and stores of a scope are meant. The fences keep them inside: the compiler does not know yet, when
// it optimises, that each of them is going to call the watcher.
struct WatchAs {
    watch_how before;
    explicit WatchAs(watch_how how) : before(watch_access) {
        watch_access = how;
        asm volatile("" ::: "memory");
    }
    ~WatchAs() {
        asm volatile("" ::: "memory");
        watch_access = before;
        asm volatile("" ::: "memory");
    }
};

#endif
