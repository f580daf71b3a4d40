// The products that the algebra on kernels shares with the passes over the batch.
#pragma once
#include "vector.h"

// y = act(bias + (x - mean) kernel^T) + more; x is (N, C), kernel (O, C), more (N, O) or null.
API void pointwise_convolve(const float* x, int64_t n, int64_t c, const float* mean, const float* kernel,
                            const float* bias, int64_t o, float top, const float* more, float* y, int threads);

// products[i][j] = sum over rows of a[i] b[j], where that is symmetric; a and b are (N, K).
void symmetric_product(const float* a, const float* b, int64_t n, int64_t k, double* products, int threads);
