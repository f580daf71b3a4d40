// The products that the algebra on kernels shares with the passes over the batch.
#pragma once
#include "vector.h"

// y = act(bias + (x - mean) kernel^T) + more; x is (N, C), kernel (O, C), more (N, O) or null.
API void pointwise_convolve(const float* x, int64_t n, int64_t c, const float* mean, const float* kernel,
                            const float* bias, int64_t o, float top, const float* more, float* y, int threads);

// products[o][c] = sum over rows of grad'[o] (x - mean)[c]; sum[o] = sum of grad'.
API void pointwise_kernel_grad(const float* g, const float* y, const float* x, int64_t n, int64_t c, int64_t o,
                               const float* mean, float top, double* products, double* sum, int threads);
