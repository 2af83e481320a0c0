// Calls that have nothing to do here: they succeed, whatever their arguments.
//
// NVIDIA's headers are left out on purpose.  With the calling conventions of C on x86-64 and AArch64 a function without
// parameters can stand for one with parameters, and 0 means success in all four libraries.
#define SUCCEEDS(name) \
    extern "C" int name() { return 0; }

// the runtime
SUCCEEDS(cudaSetDevice)
SUCCEEDS(cudaHostRegister)
SUCCEEDS(cudaHostUnregister)
SUCCEEDS(cudaMemcpyToSymbol)
SUCCEEDS(cudaFuncSetAttribute)
SUCCEEDS(cudaStreamDestroy)
SUCCEEDS(cudaEventDestroy)
SUCCEEDS(cudaGraphDestroy)
SUCCEEDS(cudaGraphExecDestroy)
SUCCEEDS(cudaProfilerStart)
SUCCEEDS(cudaProfilerStop)

// the driver
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxPushCurrent_v2)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuCtxSynchronize)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuStreamSynchronize)
SUCCEEDS(cuMemsetD32Async)

// cuBLAS and cuSOLVER
SUCCEEDS(cublasDestroy_v2)
SUCCEEDS(cublasSetWorkspace_v2)
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetSmCountTarget)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
SUCCEEDS(cusolverDnDestroy)
SUCCEEDS(cusolverDnDestroyParams)
