// The driver's API, as far as Triton's launcher, torch's static launcher and torch's caching allocator use it.
#include "simulated.hpp"

#include <cuda.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

// cuda.h gives some functions the names of their newer versions; both names are defined here
#undef cuDeviceTotalMem
#undef cuMemAlloc
#undef cuMemFree

namespace {

struct Kernel {
    std::string name;
    int registers;
};

using Module = std::map<std::string, Kernel>;

CUcontext only_context() { return reinterpret_cast<CUcontext>(0x77); }

// The kernels of a cubin: its sections .text.NAME, whose flags hold the registers per thread.
Module* kernels_of(const char* image) {
    auto* module = new Module;
    auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return module;
    auto* sections = reinterpret_cast<const Elf64_Shdr*>(image + header->e_shoff);
    const char* names = image + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        std::string name = names + sections[i].sh_name;
        if (name.rfind(".text.", 0)) continue;
        name = name.substr(6);
        (*module)[name] = Kernel{name, static_cast<int>(sections[i].sh_info >> 24 & 0xff)};
    }
    return module;
}

}  // namespace

extern "C" {

// ---- device and context

CUresult cuDriverGetVersion(int* version) {
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int length, CUdevice) {
    snprintf(name, length, "simulated GPU");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
    *value = simulated::attribute(which);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) {
    *bytes = simulated::memory_bytes();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
    *context = only_context();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }
CUresult cuCtxGetDevice(CUdevice* device) { return cuDeviceGet(device, 0); }

CUresult cuCtxGetLimit(size_t* value, CUlimit) {
    *value = 1 << 20;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
    *text = "an error of the simulated GPU";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

// ---- modules and kernels

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    simulated::unsafe("cuModuleLoadData");
    *module = reinterpret_cast<CUmodule>(kernels_of(static_cast<const char*>(image)));
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
    return cuModuleLoadData(module, image);
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    std::string image{std::istreambuf_iterator<char>(file), {}};
    return cuModuleLoadData(module, image.data());
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    auto* kernels = reinterpret_cast<Module*>(module);
    auto found = kernels->find(name);
    if (found == kernels->end()) return CUDA_ERROR_NOT_FOUND;
    *function = reinterpret_cast<CUfunction>(&found->second);
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
    *value = 0;
    if (which == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = reinterpret_cast<Kernel*>(function)->registers;
    if (which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void**, void**) {
    auto* kernel = reinterpret_cast<Kernel*>(function);
    simulated::captured(stream, "triton");
    simulated::log("TRITON|%s|%u,%u,%u|%u,%u,%u|%u|%d", kernel->name.c_str(), grid_x, grid_y, grid_z, block_x, block_y,
                   block_z, shared, kernel->registers);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void**, void**) {
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, nullptr, nullptr);
}

CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
    *count = simulated::attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int threads, size_t) {
    *blocks = 2048 / (threads ? threads : 1);
    return CUDA_SUCCESS;
}

// ---- memory

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    *address = reinterpret_cast<CUdeviceptr>(simulated::allocate(bytes));
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    simulated::release(reinterpret_cast<void*>(address));
    return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* start, size_t* bytes, CUdeviceptr address) {
    *start = address;
    *bytes = 1 << 20;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr address) {
    if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        *static_cast<CUdeviceptr*>(value) = address;
    } else {
        *static_cast<unsigned*>(value) = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

// ---- the driver, function by function

CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) simulated::log("UNKNOWN|%s", name);
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}

}  // extern "C"
