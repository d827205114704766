// The stand-in driver. Graphs.
#ifndef PSIGRAPH_LIBCUDA_GRAPHS_H
#define PSIGRAPH_LIBCUDA_GRAPHS_H
#include "libcuda_modules.h"

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

#endif
