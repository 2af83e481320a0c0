// Memory of the device, copies, and errors: the only call that can fail is an allocation.
#include "simulated.hpp"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

constexpr size_t PAGE = 4096;
// Larger copies between host and device and larger memsets are logged and not carried out: nobody reads the values.
constexpr size_t LARGEST_COPY = size_t{16} << 20, LARGEST_MEMSET = size_t{1} << 20;
// While the host's time is taken: what a real device does by itself would count as the host's.
constexpr size_t LARGEST_TIMED = 4096;

std::mutex memory_lock;
std::map<uintptr_t, size_t> allocations;  // address -> bytes
size_t used = 0;

bool on_device(const void* address) {
    std::lock_guard<std::mutex> guard(memory_lock);
    auto after = allocations.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (after == allocations.begin()) return false;
    --after;
    return reinterpret_cast<uintptr_t>(address) < after->first + after->second;
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    static const char* names[] = {"H2H", "H2D", "D2H", "D2D", "DEF"};
    simulated::log("MEMCPY|%s|%zu", names[kind], bytes);
    if (bytes <= (simulated::timed() ? LARGEST_TIMED : LARGEST_COPY)) memcpy(to, from, bytes);
    return cudaSuccess;
}

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

namespace simulated {

void* allocate(size_t bytes) {
    std::lock_guard<std::mutex> guard(memory_lock);
    size_t whole = bytes ? (bytes + PAGE - 1) / PAGE * PAGE : PAGE;
    if (used + whole > memory_bytes()) return nullptr;
    void* address =
        mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (address == MAP_FAILED) return nullptr;
    allocations[reinterpret_cast<uintptr_t>(address)] = whole;
    used += whole;
    return address;
}

void release(void* address) {
    std::lock_guard<std::mutex> guard(memory_lock);
    auto found = allocations.find(reinterpret_cast<uintptr_t>(address));
    if (found == allocations.end()) return;
    munmap(address, found->second);
    used -= found->second;
    allocations.erase(found);
}

}  // namespace simulated

extern "C" {

cudaError_t cudaMalloc(void** address, size_t bytes) {
    simulated::unsafe("cudaMalloc");
    *address = simulated::allocate(bytes);
    simulated::log("MALLOC|%zu", bytes);
    return *address ? cudaSuccess : (last_error = cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void* address) {
    simulated::unsafe("cudaFree");
    simulated::release(address);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** address, size_t bytes, cudaStream_t) { return cudaMalloc(address, bytes); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
    simulated::unsafe("cudaHostAlloc");
    *address = nullptr;
    return posix_memalign(address, PAGE, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
    simulated::unsafe("cudaFreeHost");
    free(address);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    *total = simulated::memory_bytes();
    *unused = *total - used;
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
    if (int error = simulated::unsafe("cudaMemcpy")) return static_cast<cudaError_t>(error);
    simulated::log("SYNC|cudaMemcpy");
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    simulated::captured(stream, "memcpy");
    return copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
    simulated::captured(stream, "memcpy");
    return copy(to, from, bytes, cudaMemcpyDeviceToDevice);
}

cudaError_t cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t stream) {
    simulated::captured(stream, "memcpy");
    simulated::log("MEMCPY2D|%zu", width * height);
    return cudaSuccess;
}

cudaError_t cudaMemset(void* address, int value, size_t bytes) {
    simulated::log("MEMSET|%zu", bytes);
    if (bytes <= (simulated::timed() ? LARGEST_TIMED : LARGEST_MEMSET)) memset(address, value, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
    simulated::captured(stream, "memset");
    return cudaMemset(address, value, bytes);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
    memset(found, 0, sizeof *found);
    bool here = on_device(address);
    found->type = here ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    (here ? found->devicePointer : found->hostPointer) = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static void* somewhere = simulated::allocate(1 << 20);
    *address = somewhere;
    return cudaSuccess;
}

cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    return error ? "an error of the simulated GPU" : "no error";
}

const char* cudaGetErrorName(cudaError_t error) {
    if (error == cudaErrorMemoryAllocation) return "cudaErrorMemoryAllocation";
    return error ? "cudaErrorUnknown" : "cudaSuccess";
}

}  // extern "C"
