// Streams and events, and the capture of CUDA graphs: nothing is replayed, but CUDA's rules for a capture are checked.
#include "simulated.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <unordered_map>

namespace {

// What a stream has to do with a capture.  last: number of its latest node; joined: up to which node others wait for it.
struct Part {
    int capture = 0;
    long last = 0, joined = 0;
};

// Where an event was recorded: in which capture, on which stream, after which node.
struct Record {
    int capture = 0;
    void* stream = nullptr;
    long node = 0;
};

std::recursive_mutex capture_lock;
std::atomic<int> current{0};  // number of the capture that is going on, 0: none
std::unordered_map<void*, Part> parts;
std::unordered_map<void*, Record> records;
std::unordered_map<void*, void*> bound;  // handle of cuBLAS or cuSOLVER -> stream
void* origin = nullptr;
long last_node = 0, nodes = 0;
int asked_mode = cudaStreamCaptureModeGlobal;  // of the capture that is going on
std::thread::id capturing_thread;
bool invalid = false;  // whether the capture that is going on broke a rule
thread_local int mode = cudaStreamCaptureModeGlobal;

int capture_of(void* stream) {
    if (!current) return 0;
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    auto found = parts.find(stream);
    return found != parts.end() && found->second.capture == current ? current.load() : 0;
}

// A stream that waits for an event of the capture becomes a part of the capture.
void wait(void* stream, void* event) {
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    Record& record = records[event];
    Part& part = parts[stream];
    bool inside = part.capture == current, event_inside = record.capture == current;
    if (!event_inside) {
        if (inside) simulated::illegal("wait on an event recorded outside of the capture");
        return;
    }
    Part& awaited = parts[record.stream];
    awaited.joined = std::max(awaited.joined, record.node);
    if (inside) {
        part.last = ++last_node;
        simulated::log("GRAPH|join|%p", record.stream);
    } else {
        part = Part{current, ++last_node, 0};
        simulated::log("GRAPH|fork|%p", stream);
    }
}

cudaError_t create(void** handle) {
    *handle = simulated::new_handle();
    return cudaSuccess;
}

}  // namespace

namespace simulated {

void* new_handle() {
    static std::atomic<uintptr_t> latest{0x1000};
    return reinterpret_cast<void*>(latest += 16);
}

void captured(void* stream, const char* what) {
    if (!current) return;
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    if (!capture_of(stream)) {
        log("GRAPH|outside|%s|stream=%p", what, stream);
        return;
    }
    parts[stream].last = ++last_node;
    nodes++;
}

int illegal(const char* what) {
    if (!current) return cudaSuccess;
    log("GRAPH|illegal|%s", what);
    invalid = true;
    return cudaErrorStreamCaptureUnsupported;
}

int unsafe(const char* what) {
    if (!current || mode == cudaStreamCaptureModeRelaxed || asked_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    bool own = capturing_thread == std::this_thread::get_id();
    bool forbidden = own || (mode == cudaStreamCaptureModeGlobal && asked_mode == cudaStreamCaptureModeGlobal);
    return forbidden ? illegal(what) : cudaSuccess;
}

void bind_stream(void* library, void* stream) { bound[library] = stream; }

void* stream_of(void* library) { return bound[library]; }

}  // namespace simulated

extern "C" {

// ---- streams

cudaError_t cudaStreamCreate(cudaStream_t* stream) { return create(reinterpret_cast<void**>(stream)); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    int error = capture_of(stream) ? simulated::illegal("cudaStreamSynchronize of a capturing stream")
                                   : simulated::unsafe("cudaStreamSynchronize");
    simulated::log("SYNC|stream");
    return static_cast<cudaError_t>(error);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    if (current) wait(stream, event);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
    function(data);
    return cudaSuccess;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
    function(stream, cudaSuccess, data);
    return cudaSuccess;
}

// ---- events: whatever is measured takes a millisecond

cudaError_t cudaEventCreate(cudaEvent_t* event) { return create(reinterpret_cast<void**>(event)); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    if (!current) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    records[event] = capture_of(stream) ? Record{current, stream, parts[stream].last} : Record{};
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t) {
    simulated::unsafe("cudaEventQuery");
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (capture_of(stream)) simulated::illegal("cudaStreamQuery of a capturing stream");
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t) {
    int error = simulated::unsafe("cudaEventSynchronize");
    simulated::log("SYNC|event");
    return static_cast<cudaError_t>(error);
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    *milliseconds = 1;
    return cudaSuccess;
}

// ---- CUDA graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode asked) {
    static int count = 0;
    if (!stream) {
        simulated::log("GRAPH|illegal|capture on the legacy stream");
        return cudaErrorStreamCaptureUnsupported;
    }
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    parts.clear();
    records.clear();
    current = ++count;
    asked_mode = asked;
    invalid = false;
    capturing_thread = std::this_thread::get_id();
    parts[stream] = Part{current, 0, 0};
    origin = stream;
    nodes = 0;
    simulated::log("GRAPH|begin|mode=%d", static_cast<int>(asked));
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    std::lock_guard<std::recursive_mutex> guard(capture_lock);
    if (stream != origin) simulated::illegal("end on another stream");
    for (auto& [other, part] : parts) {
        if (other != origin && part.capture == current && part.last > part.joined) simulated::illegal("unjoined stream");
    }
    current = 0;
    simulated::log("GRAPH|end|nodes=%ld", nodes);
    if (invalid) {
        *graph = nullptr;
        return cudaErrorStreamCaptureInvalidated;
    }
    return create(reinterpret_cast<void**>(graph));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    *status = capture_of(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number,
                                     cudaGraph_t* graph, const cudaGraphNode_t** after, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    if (number) *number = capture_of(stream);
    if (graph) *graph = nullptr;
    if (after) *after = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* exchanged) {
    int before = mode;
    mode = *exchanged;
    *exchanged = static_cast<cudaStreamCaptureMode>(before);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t, unsigned long long) {
    return create(reinterpret_cast<void**>(executable));
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
    simulated::log("GRAPH|launch|%p", static_cast<void*>(executable));
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
    if (count) *count = 1;
    return cudaSuccess;
}

}  // extern "C"
