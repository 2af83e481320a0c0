// Dense solvers in fp32: the calls of cuSOLVER and cuBLAS that torch.linalg makes; logged with their sizes, not computed.
#include "simulated.hpp"

// see blas.cpp
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublas_v2.h>
#include <cusolverDn.h>

namespace {

constexpr cusolverStatus_t DONE = CUSOLVER_STATUS_SUCCESS;
using Fill = cublasFillMode_t;
using Type = cudaDataType;

// One solution of n equations with `sides` right-hand sides, for each matrix.  info: where to say that all went well, if wanted.
int solve(void* handle, const char* name, long n, long sides, long matrices, int* info) {
    simulated::captured(simulated::stream_of(handle), "solver");
    simulated::log("SOLVER|%s|n=%ld,rhs=%ld,b=%ld", name, n, sides, matrices);
    if (info) *info = 0;
    return 0;
}

cusolverStatus_t solve_one(void* handle, const char* name, long n, long sides, int* info) {
    return static_cast<cusolverStatus_t>(solve(handle, name, n, sides, 1, info));
}

// Of several matrices each has an info of its own, in memory that is zero already.
cusolverStatus_t solve_many(void* handle, const char* name, long n, long sides, long matrices) {
    return static_cast<cusolverStatus_t>(solve(handle, name, n, sides, matrices, nullptr));
}

cusolverStatus_t workspace(size_t* device, size_t* host, size_t bytes) {
    *device = bytes;
    *host = 0;
    return DONE;
}

}  // namespace

extern "C" {

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
    *handle = static_cast<cusolverDnHandle_t>(simulated::new_handle());
    return DONE;
}

cusolverStatus_t cusolverDnCreateParams(cusolverDnParams_t* parameters) {
    *parameters = static_cast<cusolverDnParams_t>(simulated::new_handle());
    return DONE;
}

cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
    simulated::bind_stream(handle, stream);
    return DONE;
}

// ---- Cholesky

cusolverStatus_t cusolverDnXpotrf_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, Fill, int64_t n, Type, const void*,
                                             int64_t, Type, size_t* device, size_t* host) {
    return workspace(device, host, 4 * n * n);
}

cusolverStatus_t cusolverDnXpotrf(cusolverDnHandle_t handle, cusolverDnParams_t, Fill, int64_t n, Type, void*, int64_t,
                                  Type, void*, size_t, void*, size_t, int* info) {
    return solve_one(handle, "potrf", n, 0, info);
}

cusolverStatus_t cusolverDnXpotrs(cusolverDnHandle_t handle, cusolverDnParams_t, Fill, int64_t n, int64_t sides, Type,
                                  const void*, int64_t, Type, void*, int64_t, int* info) {
    return solve_one(handle, "potrs", n, sides, info);
}

cusolverStatus_t cusolverDnSpotrf_bufferSize(cusolverDnHandle_t, Fill, int n, float*, int, int* numbers) {
    *numbers = n * n;
    return DONE;
}

cusolverStatus_t cusolverDnSpotrf(cusolverDnHandle_t handle, Fill, int n, float*, int, float*, int, int* info) {
    return solve_one(handle, "potrf", n, 0, info);
}

cusolverStatus_t cusolverDnSpotrs(cusolverDnHandle_t handle, Fill, int n, int sides, const float*, int, float*, int,
                                  int* info) {
    return solve_one(handle, "potrs", n, sides, info);
}

cusolverStatus_t cusolverDnSpotrfBatched(cusolverDnHandle_t handle, Fill, int n, float**, int, int*, int matrices) {
    return solve_many(handle, "potrfBatched", n, 0, matrices);
}

cusolverStatus_t cusolverDnSpotrsBatched(cusolverDnHandle_t handle, Fill, int n, int sides, float**, int, float**, int,
                                         int*, int matrices) {
    return solve_many(handle, "potrsBatched", n, sides, matrices);
}

// ---- LU

cusolverStatus_t cusolverDnSgetrf_bufferSize(cusolverDnHandle_t, int m, int n, float*, int, int* numbers) {
    *numbers = m * n;
    return DONE;
}

cusolverStatus_t cusolverDnSgetrf(cusolverDnHandle_t handle, int, int n, float*, int, float*, int*, int* info) {
    return solve_one(handle, "getrf", n, 0, info);
}

cusolverStatus_t cusolverDnSgetrs(cusolverDnHandle_t handle, cublasOperation_t, int n, int sides, const float*, int,
                                  const int*, float*, int, int* info) {
    return solve_one(handle, "getrs", n, sides, info);
}

cublasStatus_t cublasSgetrfBatched(cublasHandle_t handle, int n, float* const*, int, int*, int*, int matrices) {
    return static_cast<cublasStatus_t>(solve(handle, "getrfBatched", n, 0, matrices, nullptr));
}

cublasStatus_t cublasSgetrsBatched(cublasHandle_t handle, cublasOperation_t, int n, int sides, const float* const*, int,
                                   const int*, float* const*, int, int* info, int matrices) {
    return static_cast<cublasStatus_t>(solve(handle, "getrsBatched", n, sides, matrices, info));
}

// ---- triangular systems

cublasStatus_t cublasStrsm_v2(cublasHandle_t handle, cublasSideMode_t, Fill, cublasOperation_t, cublasDiagType_t, int m,
                              int n, const float*, const float*, int, float*, int) {
    return static_cast<cublasStatus_t>(solve(handle, "trsm", m, n, 1, nullptr));
}

cublasStatus_t cublasStrsmBatched(cublasHandle_t handle, cublasSideMode_t, Fill, cublasOperation_t, cublasDiagType_t,
                                  int m, int n, const float*, const float* const*, int, float* const*, int,
                                  int matrices) {
    return static_cast<cublasStatus_t>(solve(handle, "trsmBatched", m, n, matrices, nullptr));
}

// ---- eigenvalues

cusolverStatus_t cusolverDnXsyevd_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, Fill, int64_t n,
                                             Type, const void*, int64_t, Type, const void*, Type, size_t* device,
                                             size_t* host) {
    return workspace(device, host, 8 * n * n);
}

cusolverStatus_t cusolverDnXsyevd(cusolverDnHandle_t handle, cusolverDnParams_t, cusolverEigMode_t, Fill, int64_t n, Type,
                                  void*, int64_t, Type, void*, Type, void*, size_t, void*, size_t, int* info) {
    return solve_one(handle, "syevd", n, 0, info);
}

cusolverStatus_t cusolverDnXsyevBatched_bufferSize(cusolverDnHandle_t, cusolverDnParams_t, cusolverEigMode_t, Fill,
                                                   int64_t n, Type, const void*, int64_t, Type, const void*, Type,
                                                   size_t* device, size_t* host, int64_t) {
    return workspace(device, host, 8 * n * n);
}

cusolverStatus_t cusolverDnXsyevBatched(cusolverDnHandle_t handle, cusolverDnParams_t, cusolverEigMode_t, Fill, int64_t n,
                                        Type, void*, int64_t, Type, void*, Type, void*, size_t, void*, size_t, int*,
                                        int64_t matrices) {
    return solve_many(handle, "syevBatched", n, 0, matrices);
}

}  // extern "C"
