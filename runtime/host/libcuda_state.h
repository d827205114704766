// The stand-in driver's objects, and the gate that every call passes.
#ifndef PSIGRAPH_LIBCUDA_STATE_H
#define PSIGRAPH_LIBCUDA_STATE_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "kernel_abi.h"

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum : int {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    OPERATING_SYSTEM = 304,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURED_EVENT = 907,
    EXEC_UPDATE_FAILURE = 910,
    INVALID_CLUSTER_SIZE = 912,
};

constexpr size_t GUARD_BYTES = 256;
constexpr size_t LOG_LIMIT = 1 << 20;  // a long run makes many calls
constexpr unsigned char GUARD = 0xA5;
constexpr size_t POISON_LIMIT = 64 << 20;  // larger pieces stay as the system gives them: filling them takes long

struct Context {
    bool primary = false;
    unsigned retained = 0;
};

struct Module {
    std::string image;  // the bytes of the shared object
    std::string name;
    struct Function* function = nullptr;
    bool unloaded = false;
};

// One loaded copy of a kernel's shared object.
struct Copy {
    const host_kernel* kernel = nullptr;
    void* handle = nullptr;
    int file = -1;  // in memory, where it could not be loaded from a folder
};

// A kernel. One copy of its shared object for each worker: the statics in it are that worker's scheduler.
struct Function {
    Module* module = nullptr;
    const host_kernel* first = nullptr;
    std::vector<Copy> copies;
    int max_dynamic = -1, carveout = -1;  // -1: nobody set it, so static and dynamic together may have 48 KiB
    bool large_clusters = false;  // more than 8 blocks
};

struct Work {
    enum Kind { KERNEL = 0, COPY = 1, FILL = 2, HOST = 3, EMPTY = 5 } kind = EMPTY;
    Function* function = nullptr;
    uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, shared_bytes = 0, together = 1;
    bool programmatic = false;
    std::vector<std::vector<char>> parameters;
    void* to = nullptr;
    const void* from = nullptr;
    size_t bytes = 0;       // COPY: bytes; FILL: elements
    unsigned width = 1, value = 0;
    void (*call)(void*) = nullptr;
    void* data = nullptr;
};

struct Node {
    Work work;
    std::vector<Node*> after;
};

struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
};

struct Exec {
    std::vector<Work> work;
    std::vector<Node*> nodes;  // of the graph it came from, for updates of one node
    struct Stream* in_flight = nullptr;
};

struct Capture {
    Graph* graph = nullptr;
    struct Stream* origin = nullptr;
    std::set<struct Stream*> streams;
    bool invalid = false, owns_graph = true;
    uint64_t id = 0;
};

struct Stream {
    std::shared_ptr<Capture> capture;
    std::vector<Node*> last;
    std::set<Exec*> in_flight;
    int priority = 0;
    unsigned flags = 0;
    uint64_t id = 0;
};

struct Event {
    double at = 0;
    bool recorded = false;
    unsigned flags = 0;
    std::shared_ptr<Capture> capture;
    std::vector<Node*> last;
};

struct Pool {
    uint64_t threshold = 0;
};

struct Allocation {
    char* whole = nullptr;
    size_t bytes = 0;
    bool host = false;
    Pool* pool = nullptr;
};

struct State {
    std::recursive_mutex lock;
    bool ready = false;
    CUresult sticky = OK;  // after an error on the device, every call gives it until the context is gone
    std::string message = "";  // what a kernel said when it failed
    Context primary;
    std::set<Context*> contexts;
    std::set<Module*> modules;
    std::set<Function*> functions;
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Graph*> graphs;
    std::set<Exec*> execs;
    std::set<Pool*> pools;
    std::map<CUdeviceptr, Allocation> memory;
    size_t used = 0, total = 0;
    int sms = 4, major = 9, minor = 0;
    Stream default_stream;
    Pool default_pool;
    uint64_t next_id = 1;
    uint32_t order = HOST_FORWARD;
    // Tests: the log of calls, and the one that fails.
    std::vector<const char*> calls;
    long fail_at = 0, counted = 0;
    CUresult fail_with = OK;
    std::vector<std::string> violations;
};

State& state();

static inline bool is_sticky(CUresult code) {
    static const std::set<CUresult> all = {214, 700, 702, 710, 714, 715, 716, 717, 718, 719};
    return all.count(code) != 0;
}

// Whether the call works in a thread that has no context: what asks about devices and contexts does.
static inline bool needs_no_context(const char* call) {
    for (const char* kind : {"cuInit", "cuDriver", "cuDevice", "cuCtx", "cuGet"})
        if (!strncmp(call, kind, strlen(kind))) return true;
    return false;
}
static bool in_a_context();

// At the head of every call: takes the lock, writes the log, gives the error that is due.
struct Gate {
    std::lock_guard<std::recursive_mutex> held;
    CUresult result = OK;
    Gate(const char* name, bool needs_init = true) : held(state().lock) {
        State& s = state();
        if (s.calls.size() < LOG_LIMIT) s.calls.push_back(name);
        if (++s.counted == s.fail_at) {
            result = s.fail_with;
            if (is_sticky(result)) {
                s.sticky = result;
                s.message = std::string("injected into ") + name;
            }
        } else if (s.sticky) {
            result = s.sticky;
        } else if (needs_init && !s.ready) {
            result = NOT_INITIALIZED;
        } else if (!needs_no_context(name) && !in_a_context()) {
            result = INVALID_CONTEXT;
        }
    }
};
#define GATE()                 \
    Gate gate(__func__);       \
    if (gate.result) return gate.result

#endif
