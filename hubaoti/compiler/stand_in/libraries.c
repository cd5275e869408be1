/* CUDA's libraries of mathematics: the few functions whose answers torch goes on with.
 *
 * The others are made from their headers: products say success.
 */
#include "stand_in.h"
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>
#include <string.h>

/* One algorithm, which needs no workspace. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle,
                                              cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int *found) {
    (void)handle, (void)operation, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *found = wanted > 0;
    if (wanted > 0) memset(results, 0, sizeof *results);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    return (void)handle, *mode = CUBLAS_POINTER_MODE_HOST, CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    return (void)handle, *mode = CUBLAS_DEFAULT_MATH, CUBLAS_STATUS_SUCCESS;
}

/* Of a plan: one engine, that needs no workspace and has nothing to be said of. */
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t descriptor,
                                       cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t wanted,
                                       int64_t *found, void *values) {
    (void)descriptor;
    size_t size = type == CUDNN_TYPE_INT64   ? sizeof(int64_t)
                  : type == CUDNN_TYPE_INT32 ? sizeof(int32_t)
                                             : 0;
    if (found) *found = size || name == CUDNN_ATTR_ENGINEHEUR_RESULTS;
    if (values && wanted > 0) memset(values, 0, size);
    return CUDNN_STATUS_SUCCESS;
}

/* Streams are told to a handle, which keeps none: the legacy one stands for all of them. */
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    return (void)handle, *stream = NULL, CUDNN_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *stream) {
    return (void)handle, *stream = NULL, CUBLAS_STATUS_SUCCESS;
}
