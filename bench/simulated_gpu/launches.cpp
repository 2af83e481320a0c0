// Launches of the kernels that torch's own libraries bring along: logged by name, not run.
#include "simulated.hpp"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

std::mutex names_lock;

// Host function -> symbol of its kernel.  A function's own static: libraries register kernels before this file is initialised.
std::unordered_map<const void*, std::string>& names() {
    static auto* found = new std::unordered_map<const void*, std::string>();
    return *found;
}

thread_local struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    simulated::captured(stream, "kernel");
    std::lock_guard<std::mutex> guard(names_lock);
    auto found = names().find(function);
    const char* name = found == names().end() ? "?" : found->second.c_str();
    simulated::log("KERNEL|%s|%u,%u,%u|%u,%u,%u|%zu", name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared);
    return cudaSuccess;
}

int does_nothing() { return 0; }

}  // namespace

extern "C" {

// ---- what nvcc's host code calls before main and around <<<>>>

void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* function, char*, const char* symbol, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    std::lock_guard<std::mutex> guard(names_lock);
    names()[function] = symbol;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *static_cast<cudaStream_t*>(stream) = configuration.stream;
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
    return cudaSuccess;
}

// ---- launches

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(function, grid, block, shared, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch(kernel, grid, block, shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t stream) {
    return launch(function, grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* function, void**) {
    return launch(function, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

// ---- what is asked about kernels

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = simulated::architecture();
    found->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t,
                                                                   unsigned) {
    *blocks = 2048 / (threads ? threads : 1);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// ---- the driver, function by function

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) {
        simulated::log("UNKNOWN|%s", name);
        *function = reinterpret_cast<void*>(does_nothing);
    }
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

}  // extern "C"
