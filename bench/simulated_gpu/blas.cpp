// Matrix products: cuBLAS and cuBLASLt, as far as torch calls them; logged with their sizes, not computed.
#include "simulated.hpp"

// The headers of the 16-bit types need CUDA's C++ libraries, which no dependency of torch's brings along, and nothing below has
// a 16-bit value among its arguments.
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
struct __half;
struct __nv_bfloat16;
#include <cublasLt.h>
#include <cublas_v2.h>

namespace {

constexpr cublasStatus_t DONE = CUBLAS_STATUS_SUCCESS;

// What cuBLASLt keeps behind its opaque handles.
struct Layout {
    int type;
    long rows, columns;
    int matrices;
};

struct Product {
    int transpose_a = 0, transpose_b = 0, epilogue = CUBLASLT_EPILOGUE_DEFAULT;
};

const char* type_name(int type) {
    switch (type) {
        case CUDA_R_32F: return "f32";
        case CUDA_R_16F: return "f16";
        case CUDA_R_16BF: return "bf16";
        case CUDA_R_64F: return "f64";
        case CUDA_R_8F_E4M3: return "e4m3";
        default: return "?";
    }
}

struct Sizes {
    long m, n, k, matrices = 1;
};

cublasStatus_t multiply(const char* call, void* stream, int a, int b, Sizes s, int from, int to, int epilogue = 0) {
    simulated::captured(stream, "gemm");
    simulated::log("GEMM|%s|%c%c|m=%ld,n=%ld,k=%ld,b=%ld|%s->%s|ep=%d", call, a ? 'T' : 'N', b ? 'T' : 'N', s.m, s.n, s.k,
                   s.matrices, type_name(from), type_name(to), epilogue);
    return DONE;
}

}  // namespace

using simulated::stream_of;

extern "C" {

// ---- cuBLAS

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = static_cast<cublasHandle_t>(simulated::new_handle());
    return DONE;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    simulated::bind_stream(handle, stream);
    return DONE;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return DONE;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return DONE;
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n, int k,
                            const void*, const void*, cudaDataType from, int, const void*, cudaDataType, int,
                            const void*, void*, cudaDataType to, int, cublasComputeType_t, cublasGemmAlgo_t) {
    return multiply("GemmEx", stream_of(handle), a, b, {m, n, k}, from, to);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n,
                                          int k, const void*, const void*, cudaDataType from, int, long long,
                                          const void*, cudaDataType, int, long long, const void*, void*,
                                          cudaDataType to, int, long long, int matrices, cublasComputeType_t,
                                          cublasGemmAlgo_t) {
    return multiply("GemmStridedBatchedEx", stream_of(handle), a, b, {m, n, k, matrices}, from, to);
}

cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n, int k,
                              const float*, const float*, int, const float*, int, const float*, float*, int) {
    return multiply("Sgemm", stream_of(handle), a, b, {m, n, k}, CUDA_R_32F, CUDA_R_32F);
}

cublasStatus_t cublasSgemmEx(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n, int k,
                             const float*, const void*, cudaDataType from, int, const void*, cudaDataType, int,
                             const float*, void*, cudaDataType to, int) {
    return multiply("SgemmEx", stream_of(handle), a, b, {m, n, k}, from, to);
}

cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n,
                                         int k, const float*, const float*, int, long long, const float*, int,
                                         long long, const float*, float*, int, long long, int matrices) {
    return multiply("SgemmStridedBatched", stream_of(handle), a, b, {m, n, k, matrices}, CUDA_R_32F, CUDA_R_32F);
}

cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t a, cublasOperation_t b, int m, int n, int k,
                              const double*, const double*, int, const double*, int, const double*, double*, int) {
    return multiply("Dgemm", stream_of(handle), a, b, {m, n, k}, CUDA_R_64F, CUDA_R_64F);
}

cublasStatus_t cublasSgemv_v2(cublasHandle_t handle, cublasOperation_t a, int m, int n, const float*, const float*, int,
                              const float*, int, const float*, float*, int) {
    return multiply("Sgemv", stream_of(handle), a, 0, {m, 1, n}, CUDA_R_32F, CUDA_R_32F);
}

// ---- cuBLASLt

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t) {
    auto* created = new Layout{type, static_cast<long>(rows), static_cast<long>(columns), 1};
    *layout = reinterpret_cast<cublasLtMatrixLayout_t>(created);
    return DONE;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(const cublasLtMatrixLayout_t layout) {
    delete reinterpret_cast<Layout*>(layout);
    return DONE;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t which,
                                                const void* value, size_t) {
    if (which == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) {
        reinterpret_cast<Layout*>(layout)->matrices = *static_cast<const int*>(value);
    }
    return DONE;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t, cudaDataType_t) {
    *product = reinterpret_cast<cublasLtMatmulDesc_t>(new Product);
    return DONE;
}

cublasStatus_t cublasLtMatmulDescDestroy(const cublasLtMatmulDesc_t product) {
    delete reinterpret_cast<Product*>(product);
    return DONE;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t descriptor, cublasLtMatmulDescAttributes_t which,
                                              const void* value, size_t) {
    auto* product = reinterpret_cast<Product*>(descriptor);
    int number = *static_cast<const int*>(value);
    if (which == CUBLASLT_MATMUL_DESC_TRANSA) product->transpose_a = number;
    if (which == CUBLASLT_MATMUL_DESC_TRANSB) product->transpose_b = number;
    if (which == CUBLASLT_MATMUL_DESC_EPILOGUE) product->epilogue = number;
    return DONE;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    *preference = static_cast<cublasLtMatmulPreference_t>(simulated::new_handle());
    return DONE;
}

size_t cublasLtGetVersion() { return CUBLAS_VERSION; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* result,
                                              int* count) {
    *result = {};
    *count = 1;
    return DONE;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t descriptor, const void*, const void*,
                              cublasLtMatrixLayout_t a, const void*, cublasLtMatrixLayout_t, const void*, const void*,
                              cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t*, void*,
                              size_t, cudaStream_t stream) {
    auto *from = reinterpret_cast<Layout*>(a), *to = reinterpret_cast<Layout*>(d);
    auto* p = reinterpret_cast<Product*>(descriptor);
    Sizes sizes{to->rows, to->columns, p->transpose_a ? from->rows : from->columns, to->matrices};
    return multiply("Lt", stream, p->transpose_a, p->transpose_b, sizes, from->type, to->type, p->epilogue);
}

}  // extern "C"
