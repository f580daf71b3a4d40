// Vectors of floats, the threads' rows, and the one tile that every matrix product here is made of.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <immintrin.h>
#endif

#define API extern "C" __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 12;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE_ROWS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 6;
#endif
constexpr int PANEL = 2 * LANES;  // columns of a tile; also the channels of a depthwise block

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef float half __attribute__((vector_size(2 * LANES), aligned(4)));
typedef double wide __attribute__((vector_size(4 * LANES), aligned(8)));
typedef int32_t mask __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
INLINE void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
// A bfloat16 number: the upper half of a float. Maps may hold them; what is computed is float32.
struct bf16 {
    uint16_t bits;
};
typedef uint16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
INLINE vec load(const bf16* p) {
    return reinterpret_cast<vec>(__builtin_convertvector(*reinterpret_cast<const shorts*>(p), words) << 16);
}
INLINE void store(bf16* p, vec v) {  // rounded to nearest, to even at a tie; NaN stays NaN
    const words bits = reinterpret_cast<words>(v), nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const words out = v != v ? (bits >> 16 | 0x40) : nearest;
    *reinterpret_cast<shorts*>(p) = __builtin_convertvector(out, shorts);
}
// Stores that pass the caches: for maps that they would not hold until somebody reads them. A whole line is then not read
// before it is overwritten. Where `to` is not aligned, or there are no such stores, as any other; `fence` ends them.
INLINE void stream(float* to, vec v) {
#ifdef __SSE__
    if (reinterpret_cast<uintptr_t>(to) % sizeof v == 0) {
#if defined(__AVX512F__)
        return _mm512_stream_ps(to, v);
#elif defined(__AVX__)
        return _mm256_stream_ps(to, v);
#else
        return _mm_stream_ps(to, v);
#endif
    }
#endif
    store(to, v);
}
INLINE void fence() {
#ifdef __SSE__
    _mm_sfence();
#endif
}
constexpr int64_t LARGE = int64_t(1) << 20;  // floats of a map that is streamed: twice what the caches near a core hold
INLINE float value(float v) { return v; }
INLINE float value(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    return std::memcpy(&out, &bits, sizeof out), out;
}
INLINE void put(float* p, float v) { *p = v; }
INLINE void put(bf16* p, float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    p->bits = uint16_t(v != v ? (bits >> 16 | 0x40) : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE void add_to(float* p, vec v) { store(p, load(p) + v); }
INLINE vec clamp(vec v, float top) {
    vec zero = {};
    v = v > zero ? v : zero;
    return v < top + zero ? v : top + zero;
}
// to[0..LANES) += v, in float64.
INLINE void add(double* to, vec v) {
    half low, high;
    std::memcpy(&low, &v, sizeof low), std::memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
    wide* at = reinterpret_cast<wide*>(to);
    at[0] += __builtin_convertvector(low, wide);
    at[1] += __builtin_convertvector(high, wide);
}
// The gradient where the activation let the value y through; top is its upper bound, below 0 where there is none.
INLINE vec through(vec g, vec y, float top) {
    vec zero = {};
    mask open = (y > zero) & (y < top + zero);
    return reinterpret_cast<vec>(reinterpret_cast<mask>(g) & open);
}
INLINE float through(float g, float y, float top) { return y > 0 && y < top ? g : 0.0f; }

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, std::max<size_t>(n, 1) * sizeof(T))) std::abort();
    return Buffer<T>(static_cast<T*>(p));
}
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Runs work(thread, first, last) on equal shares of n items; the shares depend on the number of threads alone.
template <class Work>
void share(int64_t n, int threads, Work work) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
    for (int t = 0; t < threads; t++) work(t, n * t / threads, n * (t + 1) / threads), fence();
}

// Asks for what comes next while this is computed: some lines of up to three maps at every run of products.
struct Next {
    static constexpr int64_t LINE = 64;
    const char *at[3] = {}, *end[3] = {};
    int64_t lines[3] = {};
    int maps = 0;
    // n floats from `from` on, in so many runs.
    void add(const float* from, int64_t n, int64_t runs) {
        at[maps] = reinterpret_cast<const char*>(from), end[maps] = at[maps] + n * sizeof(float);
        lines[maps++] = n * int64_t(sizeof(float)) / LINE / std::max<int64_t>(runs, 1) + 1;
    }
    void ask() {
        for (int m = 0; m < maps; m++)
            for (int64_t i = 0; i < lines[m] && at[m] < end[m]; i++, at[m] += LINE) __builtin_prefetch(at[m], 0, 2);
    }
};

// out[r][0..W * LANES) = sum over k of a[r * row + k * step] * b[k][0..W * LANES), for R rows; b is PANEL wide. RUN products
// are summed one by one, more run by run, which keeps their rounding small. A function of its own: it needs all registers.
template <int R, int W, int RUN>
__attribute__((noinline)) static void tile(int64_t depth, const float* a, int64_t row, int64_t step, const float* b, Next* next,
                                           vec (*out)[2]) {
    for (int64_t from = 0; from < depth; from += RUN) {
        if (next) next->ask();
        const float* const end = b + std::min<int64_t>(RUN, depth - from) * PANEL;
        vec acc[R][W] = {};
        for (; b != end; b += PANEL, a += step) {
            vec v[W];
#pragma GCC unroll 2
            for (int i = 0; i < W; i++) v[i] = load(b + i * LANES);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const float value = a[r * row];
#pragma GCC unroll 2
                for (int i = 0; i < W; i++) acc[r][i] += value * v[i];
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int i = 0; i < W; i++) out[r][i] = from ? out[r][i] + acc[r][i] : acc[r][i];
    }
}

// The same for any number of rows up to TILE_ROWS, and so many columns; what is beyond LANES is not written if few.
template <int RUN>
INLINE void tile_of(int rows, int64_t columns, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                    Next* next, vec (*out)[2]) {
    if (rows == TILE_ROWS) {
        const auto whole = columns <= LANES ? tile<TILE_ROWS, 1, RUN> : tile<TILE_ROWS, 2, RUN>;
        return whole(depth, a, row, step, b, next, out);
    }
    for (int r = 0; r < rows; r++) tile<1, 2, RUN>(depth, a + r * row, row, step, b, next, out + r);
}
