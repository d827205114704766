// How the stand-in driver loads a kernel and runs it: on as many host threads as there are processors.
#ifndef PSIGRAPH_LIBCUDA_RUN_H
#define PSIGRAPH_LIBCUDA_RUN_H
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <condition_variable>
#include <thread>

#include "libcuda_state.h"

// The size of an ELF file in memory: its section headers come last. 0: not one for this processor.
static size_t image_bytes(const void* image) {
    const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
    if (!image || memcmp(header->e_ident, ELFMAG, SELFMAG) || header->e_ident[EI_CLASS] != ELFCLASS64) return 0;
    if (header->e_type != ET_DYN || header->e_machine == 190 /* EM_CUDA */) return 0;
    return header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
}

static bool write_all(int file, const std::string& data) {
    for (size_t at = 0; at < data.size();) {
        ssize_t wrote = write(file, data.data() + at, data.size() - at);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return false;
        at += wrote;
    }
    return true;
}

// A debugger reads the file of a shared object for as long as it looks at it: with PSIGRAPH_HOST_BUILD=step the files
// stay until the process ends.
static void remove_file(const std::string& path) {
    const char* build = getenv("PSIGRAPH_HOST_BUILD");
    if (!build || strcmp(build, "step")) {
        unlink(path.c_str());
        return;
    }
    static auto* kept = new std::vector<std::string>;
    if (kept->empty())
        atexit([] {
            for (const std::string& one : *kept) unlink(one.c_str());
        });
    kept->push_back(path);
}

// The loader unmaps the copy and runs its destructor, which frees its fibers' memory (fibers.h).
static void unload(const Copy& copy) {
    if (copy.handle) dlclose(copy.handle);
    if (copy.file >= 0) close(copy.file);
}

// Load one more copy of a kernel; without `kernel` if it cannot be. A file of its own each time: the loader would
// recognise the same one.
static Copy load_copy(const std::string& image) {
    Copy copy;
    const char* folder = getenv("TMPDIR");
    std::string path = std::string(folder && *folder ? folder : "/tmp") + "/psigraph-kernel-XXXXXX";
    int file = mkostemp(&path[0], O_CLOEXEC);
    if (file >= 0) {
        if (write_all(file, image)) copy.handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        close(file);
        remove_file(path);
    }
    if (!copy.handle) {  // a full folder, or one that allows no execution; open until unloaded, so that its name is unique
        copy.file = memfd_create("psigraph-kernel", MFD_CLOEXEC);
        if (copy.file >= 0 && write_all(copy.file, image))
            copy.handle = dlopen(("/proc/self/fd/" + std::to_string(copy.file)).c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    auto get = copy.handle ? (const host_kernel* (*)())dlsym(copy.handle, PSIGRAPH_HOST_SYMBOL) : nullptr;
    const host_kernel* kernel = get ? get() : nullptr;
    if (kernel && kernel->abi == PSIGRAPH_HOST_ABI) {
        copy.kernel = kernel;
        return copy;
    }
    unload(copy);
    return {};
}

static unsigned worker_count() {
    static unsigned count = [] {
        const char* named = getenv("PSIGRAPH_HOST_THREADS");
        cpu_set_t set;
        int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
        int wanted = named ? atoi(named) : cores;
        return (unsigned)(wanted < 1 ? 1 : wanted > 16 ? 16 : wanted);
    }();
    return count;
}

// The host threads besides the caller's. They live as long as the process.
class Workers {
    std::mutex lock;
    std::condition_variable wake, done;
    std::vector<host_launch> launches;
    std::vector<const host_kernel*> kernels;
    uint64_t turn = 0;
    unsigned busy = 0;
    bool started = false;
    pid_t owner = 0;

    void serve(unsigned me) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> held(lock);
        for (;;) {
            wake.wait(held, [&] { return turn != seen; });
            seen = turn;
            if (me < kernels.size()) {
                const host_kernel* kernel = kernels[me];
                host_launch* launch = &launches[me];
                held.unlock();
                kernel->run(launch);
                held.lock();
            }
            if (--busy == 0) done.notify_one();
        }
    }
    void start() {
        if (started && owner == getpid()) return;
        started = true;
        owner = getpid();
        sigset_t all, before;  // signals are for the interpreter's main thread
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        for (unsigned i = 1; i < worker_count(); i++) std::thread(&Workers::serve, this, i).detach();
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

   public:
    // Run one launch on up to `use` workers; the first message of a kernel that failed, or "".
    std::string run(Function* function, const host_launch& launch, unsigned use) {
        while (function->copies.size() < use) {
            Copy copy = load_copy(function->module->image);
            if (!copy.kernel) {
                use = (unsigned)function->copies.size();
                break;
            }
            function->copies.push_back(copy);
        }
        if (use <= 1) {
            host_launch alone = launch;
            return function->first->run(&alone) ? alone.message : "";
        }
        start();
        std::unique_lock<std::mutex> held(lock);
        kernels.clear();
        for (unsigned i = 0; i < use; i++) kernels.push_back(function->copies[i].kernel);
        launches.assign(use, launch);
        busy = worker_count() - 1;
        turn++;
        wake.notify_all();
        host_launch* mine = &launches[0];
        held.unlock();
        kernels[0]->run(mine);
        held.lock();
        done.wait(held, [&] { return busy == 0; });
        for (host_launch& one : launches)
            if (one.message[0]) return one.message;
        return "";
    }
};

static Workers& workers() {
    static Workers* all = new Workers;  // never destroyed: its threads may still wait when the process ends
    return *all;
}

// The result of a piece of work; a kernel that fails leaves its words in state().message.
static CUresult run_work(const Work& work) {
    State& s = state();
    switch (work.kind) {
        case Work::COPY:
            memmove(work.to, work.from, work.bytes);
            return OK;
        case Work::FILL:
            for (size_t i = 0; i < work.bytes; i++) memcpy((char*)work.to + i * work.width, &work.value, work.width);
            return OK;
        case Work::HOST:
            work.call(work.data);
            return OK;
        case Work::EMPTY:
            return OK;
        case Work::KERNEL:
            break;
    }
    if (work.function->module->unloaded) {
        s.message = work.function->module->name + ": its module has been unloaded";
        return INVALID_HANDLE;
    }
    std::vector<void*> pointers;
    for (const auto& parameter : work.parameters) pointers.push_back((void*)parameter.data());
    uint32_t next = 0, stop = 0;
    host_launch launch = {};
    memcpy(launch.grid, work.grid, sizeof launch.grid);
    memcpy(launch.block, work.block, sizeof launch.block);
    launch.shared_bytes = work.shared_bytes;
    launch.together = work.together;
    launch.programmatic = work.programmatic;
    launch.order = s.order;
    launch.seed = 1;
    launch.parameters = pointers.data();
    launch.next_group = &next;
    launch.stop = &stop;
    unsigned groups = work.grid[0] * work.grid[1] * work.grid[2] / work.together;
    unsigned use = groups < worker_count() ? groups : worker_count();
    std::string said = workers().run(work.function, launch, use);
    if (said.empty()) return OK;
    s.message = work.function->module->name + ": " + said;
    return LAUNCH_FAILED;
}

#endif
