// The stand-in driver. Streams: work runs at once, or is recorded.
#ifndef PSIGRAPH_LIBCUDA_STREAMS_H
#define PSIGRAPH_LIBCUDA_STREAMS_H
#include "libcuda_memory.h"
#include "libcuda_run.h"

static Stream* stream_of(Stream* handle) {
    if ((uintptr_t)handle <= 2) return &state().default_stream;  // null, legacy, per thread
    return state().streams.count(handle) ? handle : nullptr;
}

static CUresult submit(Stream* handle, Work&& work) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) {
        Capture& capture = *stream->capture;
        if (capture.invalid) return CAPTURE_INVALIDATED;
        auto node = std::make_unique<Node>();
        node->work = std::move(work);
        node->after = stream->last;
        stream->last = {node.get()};
        capture.graph->nodes.push_back(std::move(node));
        return OK;
    }
    CUresult result = run_work(work);
    if (result == LAUNCH_FAILED) {
        state().sticky = result;  // the launch itself succeeds; the next call learns of it
        return OK;
    }
    return result;
}

// A call that waits, on a stream that captures: the capture is lost.
static bool breaks_capture(Stream* stream) {
    if (!stream->capture) return false;
    stream->capture->invalid = true;
    return true;
}
// A call that waits for the whole device, while any stream captures.
static bool breaks_any_capture() {
    bool any = breaks_capture(&state().default_stream);
    for (Stream* stream : state().streams) any |= breaks_capture(stream);
    return any;
}
static void landed(Stream* stream) {
    for (Exec* exec : stream->in_flight) exec->in_flight = nullptr;
    stream->in_flight.clear();
}
static CUresult synchronize_all(CUresult due) {
    if (due) {
        for (Stream* stream : state().streams) landed(stream);  // whoever saw the wait fail may take things down
        return due;
    }
    if (breaks_any_capture()) return CAPTURE_UNSUPPORTED;
    landed(&state().default_stream);
    for (Stream* stream : state().streams) landed(stream);
    return check_guards();
}
static CUresult cuCtxSynchronize() {
    Gate gate(__func__);
    return synchronize_all(gate.result);
}
static CUresult cuCtxSynchronize_v2(Context*) {
    Gate gate(__func__);
    return synchronize_all(gate.result);
}

static CUresult create_stream(Stream** stream, unsigned flags, int priority) {
    *stream = new Stream;
    (*stream)->flags = flags;
    (*stream)->priority = priority;
    (*stream)->id = state().next_id++;
    state().streams.insert(*stream);
    return OK;
}
static CUresult cuStreamCreate(Stream** stream, unsigned flags) {
    GATE();
    return create_stream(stream, flags, 0);
}
static CUresult cuStreamCreateWithPriority(Stream** stream, unsigned flags, int priority) {
    GATE();
    return create_stream(stream, flags, priority);
}
static CUresult destroy_stream(Stream* stream) {
    State& s = state();
    if (!s.streams.count(stream)) return INVALID_HANDLE;
    if (stream->capture) {
        s.violations.push_back("a stream was destroyed while it captures");
        stream->capture->streams.erase(stream);
        if (stream->capture->origin == stream && stream->capture->owns_graph) {
            s.graphs.erase(stream->capture->graph);
            delete stream->capture->graph;
        }
    }
    landed(stream);
    s.streams.erase(stream);
    delete stream;
    return OK;
}
static CUresult cuStreamDestroy(Stream* stream) { RELEASE_GATE(destroy_stream(stream)); }
static CUresult cuStreamSynchronize(Stream* handle) {
    Gate gate(__func__);
    Stream* stream = stream_of(handle);
    if (gate.result) {
        if (stream) landed(stream);  // whoever saw the wait fail may take things down
        return gate.result;
    }
    if (!stream) return INVALID_HANDLE;
    if (breaks_capture(stream)) return CAPTURE_UNSUPPORTED;
    landed(stream);
    return check_guards();
}
static CUresult cuStreamQuery(Stream* handle) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    return breaks_capture(stream) ? CAPTURE_UNSUPPORTED : OK;
}
static CUresult cuStreamGetPriority(Stream* handle, int* priority) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *priority = stream->priority;
    return OK;
}
static CUresult cuStreamGetFlags(Stream* handle, unsigned* flags) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *flags = stream->flags;
    return OK;
}
static CUresult cuStreamGetId(Stream* handle, unsigned long long* id) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *id = stream->id;
    return OK;
}
static CUresult cuStreamGetCtx(Stream*, Context** context) {
    GATE();
    *context = current() ? current() : &state().primary;
    return OK;
}
static CUresult cuStreamGetCtx_v2(Stream*, Context** context, void** green) {
    GATE();
    *context = current() ? current() : &state().primary;
    if (green) *green = nullptr;
    return OK;
}
static CUresult cuStreamGetDevice(Stream*, int* device) {
    GATE();
    *device = 0;
    return OK;
}

static CUresult begin_capture(Stream* handle, Graph* into) {
    Stream* stream = stream_of(handle);
    if (!stream || stream == &state().default_stream) return stream ? CAPTURE_UNSUPPORTED : INVALID_HANDLE;
    if (stream->capture) return INVALID_VALUE;
    auto capture = std::make_shared<Capture>();
    capture->graph = into ? into : new Graph;
    capture->owns_graph = !into;
    capture->origin = stream;
    capture->streams.insert(stream);
    capture->id = state().next_id++;
    state().graphs.insert(capture->graph);
    stream->capture = capture;
    stream->last.clear();
    return OK;
}
static CUresult cuStreamBeginCapture(Stream* stream, int) {
    GATE();
    return begin_capture(stream, nullptr);
}
static CUresult cuStreamBeginCaptureToGraph(Stream* stream, Graph* graph, Node* const*, const EdgeData*, size_t, int) {
    GATE();
    return state().graphs.count(graph) ? begin_capture(stream, graph) : INVALID_HANDLE;
}
static CUresult end_capture(Stream* handle, Graph** graph) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (!stream->capture || stream->capture->origin != stream) return CAPTURE_UNMATCHED;
    auto capture = stream->capture;
    std::set<const Node*> joined;
    std::vector<const Node*> todo(stream->last.begin(), stream->last.end());
    while (!todo.empty()) {
        const Node* node = todo.back();
        todo.pop_back();
        if (joined.insert(node).second) todo.insert(todo.end(), node->after.begin(), node->after.end());
    }
    bool unjoined = false;
    for (Stream* one : capture->streams) {
        for (Node* node : one->last) unjoined |= !joined.count(node);
        one->capture = nullptr;
        one->last.clear();
    }
    if (capture->invalid || unjoined) {
        if (capture->owns_graph) {
            state().graphs.erase(capture->graph);
            delete capture->graph;
        }
        *graph = nullptr;
        return capture->invalid ? CAPTURE_INVALIDATED : CAPTURE_UNJOINED;
    }
    *graph = capture->graph;
    return OK;
}
static CUresult cuStreamEndCapture(Stream* stream, Graph** graph) {
    Gate gate(__func__);
    CUresult ended = end_capture(stream, graph);
    if (gate.result && !ended && *graph) {  // a failed call gives no graph, but the capture has ended
        state().graphs.erase(*graph);
        delete *graph;
        *graph = nullptr;
    }
    return gate.result ? gate.result : ended;
}
static CUresult cuStreamIsCapturing(Stream* handle, int* status) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    return OK;
}
static CUresult capture_info(Stream* handle, int* status, uint64_t* id, Graph** graph, Node* const** last, size_t* count) {
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    *status = !stream->capture ? 0 : stream->capture->invalid ? 2 : 1;
    if (*status != 1) return OK;
    if (id) *id = stream->capture->id;
    if (graph) *graph = stream->capture->graph;
    if (last) *last = stream->last.data();
    if (count) *count = stream->last.size();
    return OK;
}
static CUresult cuStreamGetCaptureInfo_v2(Stream* stream, int* status, uint64_t* id, Graph** graph, Node* const** last, size_t* count) {
    GATE();
    return capture_info(stream, status, id, graph, last, count);
}
static CUresult cuStreamGetCaptureInfo_v3(Stream* stream, int* status, uint64_t* id, Graph** graph, Node* const** last, const EdgeData** edges,
                                          size_t* count) {
    GATE();
    if (edges) *edges = nullptr;
    return capture_info(stream, status, id, graph, last, count);
}
static CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
    GATE();
    static thread_local int kept = 0;
    std::swap(*mode, kept);
    return OK;
}

static CUresult cuEventCreate(Event** event, unsigned flags) {
    GATE();
    state().events.insert(*event = new Event);
    (*event)->flags = flags;
    return OK;
}
static CUresult destroy_event(Event* event) {
    if (!state().events.erase(event)) return INVALID_HANDLE;
    delete event;
    return OK;
}
static CUresult cuEventDestroy(Event* event) { RELEASE_GATE(destroy_event(event)); }
static CUresult record(Event* event, Stream* handle) {
    Stream* stream = stream_of(handle);
    if (!stream || !state().events.count(event)) return INVALID_HANDLE;
    event->capture = stream->capture;
    if (stream->capture) {
        event->last = stream->last;
        return OK;
    }
    event->at = seconds();
    event->recorded = true;
    return OK;
}
static CUresult cuEventRecord(Event* event, Stream* stream) {
    GATE();
    return record(event, stream);
}
static CUresult cuEventRecordWithFlags(Event* event, Stream* stream, unsigned) {
    GATE();
    return record(event, stream);
}
static CUresult cuEventQuery(Event* event) {
    GATE();
    if (!state().events.count(event)) return INVALID_HANDLE;
    return event->capture ? CAPTURED_EVENT : OK;
}
static CUresult cuEventSynchronize(Event* event) {
    GATE();
    if (!state().events.count(event)) return INVALID_HANDLE;
    if (event->capture) return CAPTURED_EVENT;
    return check_guards();
}
static CUresult cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    GATE();
    if (!state().events.count(from) || !state().events.count(to) || !from->recorded || !to->recorded || (from->flags | to->flags) & 2)
        return INVALID_HANDLE;
    *milliseconds = (float)((to->at - from->at) * 1e3);
    return OK;
}
static CUresult cuStreamWaitEvent(Stream* handle, Event* event, unsigned) {
    GATE();
    Stream* stream = stream_of(handle);
    if (!stream || !state().events.count(event)) return INVALID_HANDLE;
    if (!event->capture) return stream->capture && event->recorded ? 905 : OK;  // isolation: an event from outside
    if (stream->capture && stream->capture != event->capture) return 902;       // two captures would merge
    if (!stream->capture) {
        stream->capture = event->capture;
        event->capture->streams.insert(stream);
        stream->last.clear();
    }
    stream->last.insert(stream->last.end(), event->last.begin(), event->last.end());
    return OK;
}
static CUresult cuLaunchHostFunc(Stream* stream, void (*call)(void*), void* data) {
    GATE();
    Work work;
    work.kind = Work::HOST;
    work.call = call;
    work.data = data;
    return submit(stream, std::move(work));
}

#endif
