// The device itself: its log and its attributes.
#include "simulated.hpp"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace {

int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

std::atomic<bool> host_is_timed{false};

const char* device_name() {
    const char* name = getenv("SIMULATED_GPU_NAME");
    return name ? name : "simulated GPU";
}

}  // namespace

namespace simulated {

bool timed() { return host_is_timed; }

void log(const char* format, ...) {
    if (timed()) return;
    static std::mutex lock;
    static FILE* file = [] {
        const char* path = getenv("SIMULATED_GPU_LOG");
        FILE* opened = fopen(path ? path : "/dev/null", "a");
        // a line at a time, so that the log is whole wherever the program ends
        setvbuf(opened, nullptr, _IOLBF, 1 << 16);
        return opened;
    }();
    std::lock_guard<std::mutex> guard(lock);
    va_list values;
    va_start(values, format);
    vfprintf(file, format, values);
    va_end(values);
    fputc('\n', file);
}

int architecture() {
    static int found = setting("SIMULATED_GPU_ARCH", 90);
    return found;
}

size_t memory_bytes() {
    static size_t found = static_cast<size_t>(setting("SIMULATED_GPU_MEMORY_MIB", 81559)) << 20;
    return found;
}

int attribute(int which) {
    bool hopper = architecture() >= 90;
    switch (which) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return architecture() / 10;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return architecture() % 10;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return hopper ? 132 : 108;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return hopper ? 232448 : 166912;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return hopper ? 233472 : 167936;
        case CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR:
        case CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY: return 65536;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR: return 32;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X:
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y: return 1024;
        case CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z: return 64;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y:
        case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z: return 65535;
        case CU_DEVICE_ATTRIBUTE_CLOCK_RATE: return hopper ? 1755000 : 1410000;         // kHz
        case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: return hopper ? 2619000 : 1593000;  // kHz
        case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 5120;                  // bits
        case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: return hopper ? 52428800 : 41943040;
        case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
        case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
        case CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH:
        case CU_DEVICE_ATTRIBUTE_STREAM_PRIORITIES_SUPPORTED: return 1;
        case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: return 3;
        case CU_DEVICE_ATTRIBUTE_TEXTURE_ALIGNMENT: return 512;
        default: return 0;
    }
}

}  // namespace simulated

extern "C" {

void simulated_gpu_mark(const char* text) { simulated::log("MARK|%s", text); }
void simulated_gpu_time_host(int on) { host_is_timed = on; }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

// the runtime's attributes have the driver's numbers
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = simulated::attribute(which);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
#define ATTRIBUTE(name) simulated::attribute(CU_DEVICE_ATTRIBUTE_##name)
    memset(found, 0, sizeof *found);
    snprintf(found->name, sizeof found->name, "%s", device_name());
    found->totalGlobalMem = simulated::memory_bytes();
    found->major = ATTRIBUTE(COMPUTE_CAPABILITY_MAJOR);
    found->minor = ATTRIBUTE(COMPUTE_CAPABILITY_MINOR);
    found->multiProcessorCount = ATTRIBUTE(MULTIPROCESSOR_COUNT);
    found->warpSize = ATTRIBUTE(WARP_SIZE);
    found->sharedMemPerBlock = ATTRIBUTE(MAX_SHARED_MEMORY_PER_BLOCK);
    found->sharedMemPerBlockOptin = ATTRIBUTE(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    found->sharedMemPerMultiprocessor = ATTRIBUTE(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    found->regsPerBlock = found->regsPerMultiprocessor = ATTRIBUTE(MAX_REGISTERS_PER_BLOCK);
    found->maxThreadsPerBlock = ATTRIBUTE(MAX_THREADS_PER_BLOCK);
    found->maxThreadsPerMultiProcessor = ATTRIBUTE(MAX_THREADS_PER_MULTIPROCESSOR);
    found->maxThreadsDim[0] = found->maxThreadsDim[1] = ATTRIBUTE(MAX_BLOCK_DIM_X);
    found->maxThreadsDim[2] = ATTRIBUTE(MAX_BLOCK_DIM_Z);
    found->maxGridSize[0] = ATTRIBUTE(MAX_GRID_DIM_X);
    found->maxGridSize[1] = found->maxGridSize[2] = ATTRIBUTE(MAX_GRID_DIM_Y);
    found->totalConstMem = ATTRIBUTE(TOTAL_CONSTANT_MEMORY);
    found->l2CacheSize = ATTRIBUTE(L2_CACHE_SIZE);
    found->memoryBusWidth = ATTRIBUTE(GLOBAL_MEMORY_BUS_WIDTH);
    found->asyncEngineCount = ATTRIBUTE(ASYNC_ENGINE_COUNT);
    found->textureAlignment = ATTRIBUTE(TEXTURE_ALIGNMENT);
    found->unifiedAddressing = found->concurrentKernels = found->cooperativeLaunch = 1;
    found->streamPrioritiesSupported = 1;
    return cudaSuccess;
#undef ATTRIBUTE
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int) {
    snprintf(text, length, "0000:00:00.0");
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* lowest, int* highest) {
    *lowest = 0;
    *highest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
    int error = simulated::illegal("cudaDeviceSynchronize");
    simulated::log("SYNC|device");
    return static_cast<cudaError_t>(error);
}

cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
    *pool = static_cast<cudaMemPool_t>(simulated::new_handle());
    return cudaSuccess;
}

}  // extern "C"
