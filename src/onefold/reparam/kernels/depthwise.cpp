// The four passes for a depthwise unit on (B, H, W, C) images: K x K taps a channel, zeros around the image.
//
// Work is cut into pieces: some rows of an image, a block of PANEL channels. What a piece reads is copied into a scratch
// near the core, with the image's border written out, less the channel's centre - border included, so a patch is centred
// as a whole. Sums are float32 for some dozen places, then float64.
//
// Second moments at stride 1: the product of the taps t and u at a place p is x[p+t] x[p+u], which is x[q] x[q+lag] with
// q = p+t. So one sum a lag serves all pairs of taps that far apart, but for the q near the border where p would leave the
// grid: those are summed apart, by row and column. 13 products a pixel for K = 3 in place of 45.
#include <type_traits>

#include "vector.h"

namespace {

constexpr int64_t SOME = 28;  // places summed in float32 where a row has fewer

struct Shape {
    int64_t b, h, w, c, stride, padding;
    int64_t blocks() const { return (c + PANEL - 1) / PANEL; }
    int64_t out(int64_t n, int taps) const { return (n + 2 * padding - taps) / stride + 1; }
};

// A piece: rows first ... last-1 of an image, and a block of channels.
struct Piece {
    int64_t image, block, first, last;
};

// All images' rows in pieces that fit near the core, blocks of the same rows side by side.
struct Pieces {
    int64_t rows, height, strips, blocks, count;
    Pieces(const Shape& s, int64_t rows, int64_t width)
        : rows(rows),
          height(std::min(rows, std::max<int64_t>(8, 96 * 1024 / (4 * PANEL * (width + 4))))),
          strips((rows + height - 1) / height),
          blocks(s.blocks()),
          count(s.b * strips * blocks) {}
    Piece at(int64_t i) const {
        const int64_t strip = i / blocks % strips;
        return {i / blocks / strips, i % blocks, strip * height, std::min(rows, (strip + 1) * height)};
    }
};

// A block of channels of some rows of a map, with columns to spare on both sides; at(y, x) counts as the map does.
struct Plane {
    int64_t w, margin, top = 0;
    Buffer<float> data;
    Plane(int64_t most, int64_t w, int64_t margin)
        : w(w), margin(margin), data(buffer<float>(most * (w + 2 * margin) * PANEL)) {}
    int64_t row() const { return (w + 2 * margin) * PANEL; }
    float* at(int64_t y, int64_t x) { return data.get() + (y - top) * row() + (x + margin) * PANEL; }
    // Rows first ... last-1 from now on; zero but for rows and columns within `border` of a map of h rows, which follow.
    void start(int64_t first, int64_t last, int64_t h, int64_t border) {
        top = first;
        const int64_t side = (margin - border) * PANEL;
        for (int64_t y = first; y < last; y++) {
            float* line = at(y, -margin);
            if (y < -border || y >= h + border) {
                std::fill_n(line, row(), 0.0f);
            } else {
                std::fill_n(line, side, 0.0f), std::fill_n(line + row() - side, side, 0.0f);
            }
        }
    }
};

// n values, zeros up to PANEL.
void copy_block(const float* from, int64_t n, float* to) {
    if (n >= PANEL) {
        store(to, load(from)), store(to + LANES, load(from + LANES));
    } else {
        for (int64_t j = 0; j < PANEL; j++) to[j] = j < n ? from[j] : 0;
    }
}

// The first n lanes of v, all if there are as many; past the caches if the map is large.
template <class T>
INLINE void store_some(T* to, vec v, int64_t n, bool large) {
    if constexpr (std::is_same_v<T, float>)
        if (large && n >= LANES) return stream(to, v);
    if (n >= LANES) return store(to, v);
    for (int j = 0; j < n; j++) put(to + j, v[j]);
}

// The first n values from here on, zeros past them.
template <class T>
INLINE vec load_some(const T* from, int64_t n) {
    if (n >= LANES) return load(from);
    float some[LANES] = {};
    for (int64_t j = 0; j < n; j++) some[j] = value(from[j]);
    return load(some);
}

// Rows first ... last-1 of an image less centre; up to `border` pixels around it zero less centre, beyond those zero.
template <class T>
void fill(Plane& plane, int64_t first, int64_t last, const T* image, const Shape& s, int64_t block, const float* centre,
          int64_t border) {
    const int64_t n = s.c - block * PANEL;
    float around[PANEL];
    copy_block(centre + block * PANEL, n, around);
    const vec left = load(around), right = load(around + LANES);
    plane.start(first, last, s.h, border);
    const auto outside = [&](int64_t y, int64_t from, int64_t to) {
        for (float* at = plane.at(y, from); from < to; from++, at += PANEL) store(at, -left), store(at + LANES, -right);
    };
    for (int64_t y = std::max(first, -border); y < std::min(last, s.h + border); y++) {
        if (y < 0 || y >= s.h) {
            outside(y, -border, s.w + border);
            continue;
        }
        outside(y, -border, 0), outside(y, s.w, s.w + border);
        const T* from = image + y * s.w * s.c + block * PANEL;
        float* to = plane.at(y, 0);
        if (n >= PANEL) {
            for (int64_t x = 0; x < s.w; x++, from += s.c, to += PANEL) {
                __builtin_prefetch(from + PANEL, 0, 2);  // the next block's piece, which comes next
                store(to, load(from) - left), store(to + LANES, load(from + LANES) - right);
            }
        } else {
            for (int64_t x = 0; x < s.w; x++, from += s.c, to += PANEL)
                store(to, load_some(from, n) - left), store(to + LANES, load_some(from + LANES, n - LANES) - right);
        }
    }
}

// Rows first ... last-1 of the gradient through the activation; zeros outside its grid of `height` rows.
template <class T>
void fill_gradient(Plane& plane, int64_t first, int64_t last, int64_t height, const T* g, const T* y,
                   const Shape& s, int64_t block, float top) {
    const int64_t n = s.c - block * PANEL;
    plane.start(first, last, height, 0);
    for (int64_t p = std::max<int64_t>(first, 0); p < std::min(last, height); p++) {
        const T *from = g + p * plane.w * s.c + block * PANEL, *after = y + (from - g);
        float* to = plane.at(p, 0);
        for (int64_t x = 0; x < plane.w; x++, from += s.c, after += s.c, to += PANEL) {
            __builtin_prefetch(from + PANEL, 0, 2), __builtin_prefetch(after + PANEL, 0, 2);
            if (n < PANEL) {
                for (int half = 0; half < PANEL; half += LANES) {
                    const vec v = load_some(from + half, n - half);
                    store(to + half, top < 0 ? v : through(v, load_some(after + half, n - half), top));
                }
            } else if (top < 0) {
                store(to, load(from)), store(to + LANES, load(from + LANES));
            } else {
                store(to, through(load(from), load(after), top));
                store(to + LANES, through(load(from + LANES), load(after + LANES), top));
            }
        }
    }
}

// Asks for what the next piece reads of a map, pixel by pixel, while this one is computed. It may ask beyond the map,
// which does nothing.
template <class T>
struct Ahead {
    const T* at;
    int64_t c;
    // The rows of `map` (`height` x `width` pixels an image) that belong to piece `i`'s, from `row` on.
    Ahead(const T* map, const Pieces& pieces, int64_t i, int64_t height, int64_t width, int64_t scale, int64_t c) : c(c) {
        const Piece next = pieces.at(i);
        at = map + (next.image * height + next.first * scale) * width * c + next.block * PANEL;
    }
    void ask(int64_t pixels) {
        for (int64_t j = 0; j < pixels; j++, at += c) __builtin_prefetch(at, 0, 2);
    }
};

// A (count, C) table as [block][count][PANEL], zeros past the last channel; table is (C, count) row-major.
Buffer<float> by_block(const float* table, int64_t c, int64_t count) {
    const int64_t blocks = (c + PANEL - 1) / PANEL;
    auto out = buffer<float>(blocks * count * PANEL);
    for (int64_t i = 0; i < blocks * PANEL; i++)
        for (int64_t k = 0; k < count; k++)
            out[(i / PANEL * count + k) * PANEL + i % PANEL] = i < c ? table[i * count + k] : 0;
    return out;
}

// Where q may stand along an axis: near the start one by one, in the middle, near the end one by one.
struct Axis {
    int64_t n, edge;                       // length; places on each side where a tap has no place
    Axis(int64_t n, int64_t edge) : n(n), edge(edge) {}
    int64_t kinds() const { return 2 * edge + 1; }
    int64_t kind(int64_t q) const { return q < edge ? q : q < n - edge ? edge : 2 * edge - (n - 1 - q); }
    // Whether tap t (0 ... K-1) of some place reads a q of this kind: place q + padding - t is on the grid.
    bool allows(int64_t kind, int64_t t, int64_t taps, int64_t padding) const {
        if (kind < edge) return kind + padding - t >= 0;
        if (kind == edge) return true;
        const int64_t back = 2 * edge - kind;  // from the end
        return (n - 1 - back) + padding - t <= n + 2 * padding - taps;
    }
};

template <int K>
struct Lags {
    static constexpr int count = (2 * K - 1) * (2 * K - 1) / 2 + 1;  // those ahead in reading order, and 0
    static int of(int dy, int dx) { return dy * (2 * K - 1) + dx; }  // 0 for (0, 0); dx from 1-K
};

// Adds x[q] x[q + lag] and x[q], for n places q along a row and so many channels, to sums[lag or last][PANEL] in float32.
template <int K>
void add_lags(const float* first, int64_t row, int64_t n, int64_t channels, float* sums) {
    constexpr int count = Lags<K>::count;
    for (int half = 0; half < PANEL && half < channels; half += LANES) {
        const float* const end = first + half + n * PANEL;
        if (K == 3) {  // 13 sums, a total and the pixel just fit the registers
            vec acc[count + 1] = {};
            for (const float* p = first + half; p != end; p += PANEL) {
                const vec v = load(p);
                acc[count] += v;
                int l = 0;
#pragma GCC unroll 8
                for (int dy = 0; dy < K; dy++)
#pragma GCC unroll 8
                    for (int dx = dy ? 1 - K : 0; dx < K; dx++, l++) acc[l] += v * load(p + dy * row + dx * PANEL);
            }
#pragma GCC unroll 32
            for (int l = 0; l <= count; l++) add_to(sums + l * PANEL + half, acc[l]);
        } else {
            for (int dy = 0; dy < K; dy++)
                for (int dx = dy ? 1 - K : 0; dx < K; dx++) {
                    vec acc = {};
                    for (const float* p = first + half; p != end; p += PANEL) acc += load(p) * load(p + dy * row + dx * PANEL);
                    add_to(sums + Lags<K>::of(dy, dx) * PANEL + half, acc);
                }
            vec acc = {};
            for (const float* p = first + half; p != end; p += PANEL) acc += load(p);
            add_to(sums + count * PANEL + half, acc);
        }
    }
}

// Adds n float32 sums to float64 ones and forgets them.
void flush(float* from, int64_t n, double* to) {
    for (int64_t i = 0; i < n; i += LANES) add(to + i, load(from + i)), store(from + i, vec{});
}

// All sums by lag, kind of row and kind of column, of rows first ... last-1, counted with `border` pixels around the image;
// total is [kind y][kind x][count + 1][PANEL].
template <int K>
void lags_of(Plane& z, int64_t border, int64_t first, int64_t last, const Axis& tall, const Axis& wide, int64_t channels,
             std::vector<float>& some, double* total) {
    const int64_t entry = (Lags<K>::count + 1) * PANEL, line = wide.kinds() * entry;
    int64_t pending = 0;
    for (int64_t y = first; y < last; y++) {
        const int64_t kind = tall.kind(y);
        const auto from = [&](int64_t x) { return z.at(y - border, x - border); };
        for (int64_t x = 0; x < wide.edge; x++) add_lags<K>(from(x), z.row(), 1, channels, &some[x * entry]);
        for (int64_t x = wide.edge; x < wide.n - wide.edge; x += 32)
            add_lags<K>(from(x), z.row(), std::min<int64_t>(32, wide.n - wide.edge - x), channels, &some[wide.edge * entry]);
        for (int64_t x = wide.n - wide.edge; x < wide.n; x++)
            add_lags<K>(from(x), z.row(), 1, channels, &some[wide.kind(x) * entry]);
        pending += wide.n;
        if (y + 1 == last || tall.kind(y + 1) != kind || pending + wide.n > 128)
            flush(some.data(), line, total + kind * line), pending = 0;
    }
}

// sum[K*K] and products[K*K][K*K] of one channel out of its sums by lag.
template <int K>
void pair_taps(const double* total, int64_t lane, const Axis& tall, const Axis& wide, int64_t padding, double* sum,
               double* products) {
    constexpr int entry = Lags<K>::count + 1, taps = K * K;
    for (int t = 0; t < taps; t++) {
        double of_t = 0, with[taps] = {};
        for (int64_t ky = 0; ky < tall.kinds(); ky++)
            for (int64_t kx = 0; kx < wide.kinds(); kx++) {
                if (!tall.allows(ky, t / K, K, padding) || !wide.allows(kx, t % K, K, padding)) continue;
                const double* at = total + (ky * wide.kinds() + kx) * entry * PANEL + lane;
                of_t += at[Lags<K>::count * PANEL];
                for (int u = t; u < taps; u++) with[u] += at[Lags<K>::of(u / K - t / K, u % K - t % K) * PANEL];
            }
        sum[t] = of_t;
        for (int u = t; u < taps; u++) products[t * taps + u] = products[u * taps + t] = with[u];
    }
}

// The same sums for n places along a row, `step` floats apart: sums is [taps (taps + 1) / 2 pairs, then taps][PANEL]. Of
// the pairs those whose first tap is from T0 up to T1: as many as there are registers.
template <int K, int T0, int T1>
INLINE void add_pairs(const float* p, int64_t row, int64_t step, int64_t n, float* sums) {
    constexpr int taps = K * K, before = T0 * taps - T0 * (T0 - 1) / 2;
    vec acc[T1 - T0][taps];
    const auto each = [&](auto work) __attribute__((always_inline)) {
        float* to = sums + before * PANEL;
#pragma GCC unroll 16
        for (int t = T0; t < T1; t++)
#pragma GCC unroll 16
            for (int u = t; u < taps; u++, to += PANEL) work(acc[t - T0][u], to);
    };
    each([](vec& sum, float* at) __attribute__((always_inline)) { sum = load(at); });
    for (const float* const end = p + n * step; p != end; p += step) {
        vec first[T1 - T0];
#pragma GCC unroll 16
        for (int u = T0; u < taps; u++) {
            const vec v = load(p + u / K * row + u % K * PANEL);
            if (u < T1) first[u - T0] = v;
#pragma GCC unroll 16
            for (int t = T0; t < T1 && t <= u; t++) acc[t - T0][u] += first[t - T0] * v;
        }
    }
    each([](vec& sum, float* at) __attribute__((always_inline)) { store(at, sum); });
}

// All of them, for any stride, of a piece's places and so many channels.
template <int K>
void pairs_of(Plane& z, const Piece& piece, const Shape& s, int64_t channels, std::vector<float>& some, double* total) {
    constexpr int taps = K * K, pairs = taps * (taps + 1) / 2, count = pairs + taps;
    const int64_t columns = s.out(s.w, K), step = s.stride * PANEL;
    int64_t pending = 0;
    for (int64_t y = piece.first; y < piece.last; y++)
        for (int64_t x = 0, n; x < columns; x += n) {
            n = std::min<int64_t>(columns - x, 32 - pending);
            for (int half = 0; half < PANEL && half < channels; half += LANES) {
                const float* const p = z.at(y * s.stride - s.padding, x * s.stride - s.padding) + half;
                float* const to = some.data() + half;
                if constexpr (K == 3 && LANES == 16) {  // 32 registers: 24 and 21 pairs
                    add_pairs<K, 0, 3>(p, z.row(), step, n, to), add_pairs<K, 3, taps>(p, z.row(), step, n, to);
                } else if constexpr (K == 3) {  // 16 registers
                    add_pairs<K, 0, 1>(p, z.row(), step, n, to), add_pairs<K, 1, 2>(p, z.row(), step, n, to);
                    add_pairs<K, 2, 4>(p, z.row(), step, n, to), add_pairs<K, 4, 6>(p, z.row(), step, n, to);
                    add_pairs<K, 6, taps>(p, z.row(), step, n, to);
                } else {
                    for (int64_t i = 0; i < n; i++) {
                        vec v[taps];
#pragma GCC unroll 64
                        for (int t = 0; t < taps; t++) v[t] = load(p + i * step + t / K * z.row() + t % K * PANEL);
                        float* at = to;
                        for (int t = 0; t < taps; t++)
                            for (int u = t; u < taps; u++, at += PANEL) add_to(at, v[t] * v[u]);
                    }
                }
                vec acc[taps];
#pragma GCC unroll 64
                for (int t = 0; t < taps; t++) acc[t] = load(to + (pairs + t) * PANEL);
                for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 64
                    for (int t = 0; t < taps; t++) acc[t] += load(p + i * step + t / K * z.row() + t % K * PANEL);
#pragma GCC unroll 64
                for (int t = 0; t < taps; t++) store(to + (pairs + t) * PANEL, acc[t]);
            }
            if ((pending += n) == 32) flush(some.data(), count * PANEL, total), pending = 0;
        }
    flush(some.data(), count * PANEL, total);
}

// The same in float64 throughout: around a centre the image's border is large, and so are its squares.
template <int K>
void wide_pairs_of(Plane& z, const Piece& piece, const Shape& s, double* total) {
    constexpr int taps = K * K;
    for (int64_t y = piece.first; y < piece.last; y++)
        for (int64_t x = 0; x < s.out(s.w, K); x++) {
            const float* p = z.at(y * s.stride - s.padding, x * s.stride - s.padding);
            const auto tap = [&](int t) { return p + t / K * z.row() + t % K * PANEL; };
            double* to = total;
            for (int t = 0; t < taps; t++)
                for (int u = t; u < taps; u++, to += PANEL)
                    for (int j = 0; j < PANEL; j++) to[j] += double(tap(t)[j]) * tap(u)[j];
            for (int t = 0; t < taps; t++, to += PANEL)
                for (int j = 0; j < PANEL; j++) to[j] += tap(t)[j];
        }
}

template <int K, class T>
void moments(const T* x, const Shape& s, const float* centre, bool centred, double* sum, double* products, int threads) {
    constexpr int taps = K * K;
    // Centred, the border is no longer zero: the image is then the whole of what patches read, and has no padding.
    const int64_t border = centred ? s.padding : 0, padding = s.padding - border, edge = K - 1 - padding;
    const Axis tall(s.h + 2 * border, edge), wide(s.w + 2 * border, edge);
    const bool lags = s.stride == 1 && tall.n >= 2 * edge && wide.n >= 2 * edge && edge >= 0;
    const int64_t entry = lags ? tall.kinds() * wide.kinds() * (Lags<K>::count + 1) : taps * (taps + 1) / 2 + taps;
    const int64_t size = s.blocks() * entry * PANEL;
    const Pieces pieces(s, lags ? tall.n : s.out(s.h, K), s.w);
    std::vector<double> totals(size_t(threads) * size);
    share(pieces.count, threads, [&](int t, int64_t first, int64_t last) {
        std::vector<float> some(entry * PANEL);
        Plane z(pieces.height * s.stride + K, s.w, s.padding + K - 1);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t channels = s.c - piece.block * PANEL;
            double* total = &totals[t * size + piece.block * entry * PANEL];
            const T* image = x + piece.image * s.h * s.w * s.c;
            if (lags) {
                fill(z, piece.first - border, piece.last - border + K - 1, image, s, piece.block, centre, border);
                lags_of<K>(z, border, piece.first, piece.last, tall, wide, channels, some, total);
            } else {
                const int64_t from = piece.first * s.stride - s.padding, to = (piece.last - 1) * s.stride - s.padding + K;
                fill(z, from, to, image, s, piece.block, centre, s.padding);
                centred ? wide_pairs_of<K>(z, piece, s, total) : pairs_of<K>(z, piece, s, channels, some, total);
            }
        }
    });
    for (int t = 1; t < threads; t++)
        for (int64_t i = 0; i < size; i++) totals[i] += totals[t * size + i];
    share(s.c, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t c = first; c < last; c++) {
            const double* total = &totals[c / PANEL * entry * PANEL];
            double *to = sum + c * taps, *pairs = products + c * taps * taps;
            if (lags) {
                pair_taps<K>(total, c % PANEL, tall, wide, padding, to, pairs);
                continue;
            }
            const double* at = total + c % PANEL;
            for (int t = 0; t < taps; t++)
                for (int u = t; u < taps; u++, at += PANEL) pairs[t * taps + u] = pairs[u * taps + t] = *at;
            for (int t = 0; t < taps; t++, at += PANEL) to[t] = *at;
        }
    });
}

template <int K, class T>
void convolve(const T* x, const Shape& s, const float* centre, const float* kernel, const float* bias, float top,
              T* y, int threads) {
    constexpr int taps = K * K;
    const auto weights = by_block(kernel, s.c, taps), shifts = by_block(bias, s.c, 1);
    const int64_t rows = s.out(s.h, K), columns = s.out(s.w, K);
    const bool large = s.b * rows * columns * s.c >= LARGE;
    const Pieces pieces(s, rows, s.w);
    share(pieces.count, threads, [&](int, int64_t first, int64_t last) {
        Plane z(pieces.height * s.stride + K, s.w, s.padding);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t at = piece.block * PANEL, channels = std::min<int64_t>(PANEL, s.c - at);
            const int64_t from = piece.first * s.stride - s.padding, to = (piece.last - 1) * s.stride - s.padding + K;
            fill(z, from, to, x + piece.image * s.h * s.w * s.c, s, piece.block, centre, s.padding);
            for (int64_t p = piece.first; p < piece.last; p++)
                for (int half = 0; half < PANEL && half < channels; half += LANES) {
                    vec w[taps];
#pragma GCC unroll 64
                    for (int t = 0; t < taps; t++) w[t] = load(&weights[at * taps + t * PANEL + half]);
                    const vec shift = load(&shifts[at + half]);
                    const float* from = z.at(p * s.stride - s.padding, -s.padding) + half;
                    T* to = y + ((piece.image * rows + p) * columns) * s.c + at + half;
                    for (int64_t q = 0; q < columns; q++, from += s.stride * PANEL, to += s.c) {
                        vec v = shift;
#pragma GCC unroll 8
                        for (int ty = 0; ty < K; ty++) {
                            vec line = w[ty * K] * load(from + ty * z.row());
#pragma GCC unroll 8
                            for (int tx = 1; tx < K; tx++) line += w[ty * K + tx] * load(from + ty * z.row() + tx * PANEL);
                            v += line;
                        }
                        if (top >= 0) v = clamp(v, top);
                        store_some(to, v, channels - half, large);
                    }
                }
        }
    });
}

template <int K, class T>
void kernel_grad(const T* g, const T* y, const T* x, const Shape& s, const float* centre, float top,
                 double* products, double* sum, int threads) {
    constexpr int taps = K * K;
    const int64_t rows = s.out(s.h, K), columns = s.out(s.w, K), size = s.blocks() * (taps + 1) * PANEL;
    const Pieces pieces(s, rows, s.w);
    std::vector<double> totals(size_t(threads) * size);
    share(pieces.count, threads, [&](int t, int64_t first, int64_t last) {
        Plane z(pieces.height * s.stride + K, s.w, s.padding), grad(pieces.height, columns, 0);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t from = piece.first * s.stride - s.padding, to = (piece.last - 1) * s.stride - s.padding + K;
            const int64_t at = piece.image * rows * columns * s.c;
            fill(z, from, to, x + piece.image * s.h * s.w * s.c, s, piece.block, centre, s.padding);
            fill_gradient(grad, piece.first, piece.last, rows, g + at, y + at, s, piece.block, top);
            double* total = &totals[t * size + piece.block * (taps + 1) * PANEL];
            const int64_t together = std::max<int64_t>(1, SOME / columns);  // rows that are summed in float32
            const int64_t channels = s.c - piece.block * PANEL;
            for (int64_t start = piece.first; start < piece.last; start += together)
                for (int half = 0; half < PANEL && half < channels; half += LANES) {
                    vec acc[taps + 1] = {};
                    for (int64_t p = start; p < std::min(piece.last, start + together); p++) {
                        const float* from = z.at(p * s.stride - s.padding, -s.padding) + half;
                        const float* by = grad.at(p, 0) + half;
                        for (int64_t q = 0; q < columns; q++, from += s.stride * PANEL, by += PANEL) {
                            const vec v = load(by);
                            acc[taps] += v;
#pragma GCC unroll 64
                            for (int k = 0; k < taps; k++) acc[k] += v * load(from + k / K * z.row() + k % K * PANEL);
                        }
                    }
#pragma GCC unroll 64
                    for (int k = 0; k <= taps; k++) add(total + k * PANEL + half, acc[k]);
                }
        }
    });
    for (int t = 1; t < threads; t++)
        for (int64_t i = 0; i < size; i++) totals[i] += totals[t * size + i];
    for (int64_t c = 0; c < s.c; c++) {
        const double* total = &totals[c / PANEL * (taps + 1) * PANEL + c % PANEL];
        for (int k = 0; k < taps; k++) products[c * taps + k] = total[k * PANEL];
        sum[c] = total[taps * PANEL];
    }
}

// At stride 1 the gradient of a pixel is a stencil of taps on the output's gradient and one of lags on the input, the
// latter by kind of pixel: lag_weights is [block][kind y][kind x][(2K-1)^2 + 1][PANEL], its last row the constant.
template <int K, class Kinds>
Buffer<float> lag_weights(const Shape& s, const float* quad, const float* offset, const float* shift, const Kinds& tall,
                          const Kinds& wide, int threads) {
    constexpr int taps = K * K, side = 2 * K - 1, entry = side * side + 1;
    const int64_t kinds = tall.kinds() * wide.kinds(), blocks = s.blocks();
    auto out = buffer<float>(blocks * kinds * entry * PANEL);
    std::fill_n(out.get(), blocks * kinds * entry * PANEL, 0.0f);
    const auto write = [&](int64_t c, int64_t ky, int64_t kx) {
        float* to = &out[((c / PANEL * kinds + ky * wide.kinds() + kx) * entry) * PANEL + c % PANEL];
        for (int t = 0; t < taps; t++) {
            if (!tall.allows(ky, t / K, K, s.padding) || !wide.allows(kx, t % K, K, s.padding)) continue;
            double constant = shift[c * taps + t];
            for (int u = 0; u < taps; u++) {
                const int lag = (u / K - t / K + K - 1) * side + u % K - t % K + K - 1;
                to[lag * PANEL] += quad[(c * taps + t) * taps + u];
                constant -= double(quad[(c * taps + t) * taps + u]) * offset[c * taps + u];
            }
            to[side * side * PANEL] += float(constant);
        }
    };
    share(s.c, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t c = first; c < last; c++)
            for (int64_t ky = 0; ky < tall.kinds(); ky++)
                for (int64_t kx = 0; kx < wide.kinds(); kx++) write(c, ky, kx);
    });
    return out;
}

// out = the two stencils at N pixels of one kind, from (y, x) on. Few pixels have several sums each, to keep busy.
template <int K, int N, class T>
INLINE void blend(Plane& z, Plane& grad, int64_t y, int64_t x, const float* kernel, const float* lags, int half, T* out,
                  int64_t step, int64_t channels, int64_t padding, bool large) {
    constexpr int side = 2 * K - 1, sums = 4 / N;
    vec acc[N][sums] = {};
    const vec constant = load(lags + side * side * PANEL + half);
    for (int n = 0; n < N; n++) acc[n][0] = constant;
    const float* p = z.at(y + 1 - K, x + 1 - K) + half;
    for (int dy = 0; dy < side; dy++, p += z.row()) {
        vec v[N + side - 1];
#pragma GCC unroll 32
        for (int i = 0; i < N + side - 1; i++) v[i] = load(p + i * PANEL);
#pragma GCC unroll 16
        for (int dx = 0; dx < side; dx++) {
            const vec w = load(lags + (dy * side + dx) * PANEL + half);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][dx % sums] += w * v[dx + n];
        }
    }
    const float* g = grad.at(y + padding, x + padding + 1 - K) + half;
    for (int ty = 0; ty < K; ty++, g -= grad.row()) {
        vec v[N + K - 1];
#pragma GCC unroll 32
        for (int i = 0; i < N + K - 1; i++) v[i] = load(g + i * PANEL);
#pragma GCC unroll 8
        for (int tx = 0; tx < K; tx++) {
            const vec w = load(kernel + (ty * K + tx) * PANEL + half);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][tx % sums] += w * v[K - 1 - tx + n];
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
#pragma GCC unroll 4
        for (int s = 1; s < sums; s++) acc[n][0] += acc[n][s];
        store_some(out + n * step + half, acc[n][0], channels - half, large);
    }
}

template <int K, class T>
void input_grad_by_lag(const T* g, const T* y, const T* x, const Shape& s, const float* centre,
                       const float* kernel, const float* quad, const float* offset, const float* shift,
    float top, T* dx, int threads) {
    constexpr int taps = K * K, entry = (2 * K - 1) * (2 * K - 1) + 1;
    const Axis tall(s.h, K - 1 - s.padding), wide(s.w, K - 1 - s.padding);
    const auto weights = by_block(kernel, s.c, taps);
    const auto lags = lag_weights<K>(s, quad, offset, shift, tall, wide, threads);
    const int64_t rows = s.out(s.h, K), columns = s.out(s.w, K), edge = wide.edge, kinds = tall.kinds() * wide.kinds();
    const bool large = s.b * s.h * s.w * s.c >= LARGE;
    const Pieces pieces(s, s.h, s.w);
    share(pieces.count, threads, [&](int, int64_t first, int64_t last) {
        Plane z(pieces.height + 2 * K, s.w, s.padding + K - 1), grad(pieces.height + 2 * K, columns, K - 1);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t at = piece.block * PANEL, channels = std::min<int64_t>(PANEL, s.c - at);
            const int64_t of_grad = piece.image * rows * columns * s.c;
            fill(z, piece.first + 1 - K, piece.last + K - 1, x + piece.image * s.h * s.w * s.c, s, piece.block, centre, s.padding);
            fill_gradient(grad, piece.first + s.padding + 1 - K, piece.last + s.padding, rows, g + of_grad, y + of_grad, s,
                          piece.block, top);
            const float* w = &weights[at * taps];
            Ahead of_x(x, pieces, i + 1, s.h, s.w, 1, s.c), of_g(g, pieces, i + 1, rows, columns, 1, s.c);
            Ahead of_y(y, pieces, i + 1, rows, columns, 1, s.c);
            for (int64_t p = piece.first; p < piece.last; p++) {
                const float* of_row = &lags[(piece.block * kinds + tall.kind(p) * wide.kinds()) * entry * PANEL];
                T* to = dx + ((piece.image * s.h + p) * s.w) * s.c + at;
                for (int half = 0; half < PANEL && half < channels; half += LANES)
                    for (int64_t q = 0; q < s.w;) {
                        const float* of = of_row + wide.kind(q) * entry * PANEL;
                        const int64_t left = q >= edge ? s.w - edge - q : 0, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
                        if (!half) of_x.ask(step), of_g.ask(step), of_y.ask(step);
                        if (left >= 4) {
                            blend<K, 4>(z, grad, p, q, w, of, half, to + q * s.c, s.c, channels, s.padding, large), q += 4;
                        } else if (left >= 2) {
                            blend<K, 2>(z, grad, p, q, w, of, half, to + q * s.c, s.c, channels, s.padding, large), q += 2;
                        } else {
                            blend<K, 1>(z, grad, p, q, w, of, half, to + q * s.c, s.c, channels, s.padding, large), q += 1;
                        }
                    }
            }
        }
    });
}

// Which of 3 taps read a pixel at stride 2 and padding 1: of an even one the middle tap, of an odd one the two others, but
// for the last of an even map, which one tap reads.
struct Halved {
    int64_t out;
    int64_t kinds() const { return 3; }
    int64_t kind(int64_t q) const { return q % 2 == 0 ? 0 : (q + 1) / 2 < out ? 1 : 2; }
    bool allows(int64_t kind, int64_t t, int64_t, int64_t) const { return kind == 0 ? t == 1 : kind == 1 ? t != 1 : t == 2; }
};

// The same as `blend` for 3 taps at stride 2: N pixels, each second one, whose lags reach REACH_Y and REACH_X (1 for even ones).
template <int REACH_Y, int REACH_X, int N, class T>
INLINE void blend_halved(Plane& z, Plane& grad, int64_t y, int64_t x, const float* kernel, const float* lags, int half,
                         T* out, int64_t step, int64_t channels, bool large) {
    constexpr int side = 5, sums = N == 1 ? 4 : 2;
    vec acc[N][sums] = {};
    const vec constant = load(lags + side * side * PANEL + half);
    for (int n = 0; n < N; n++) acc[n][0] = constant;
#pragma GCC unroll 8
    for (int dy = -REACH_Y; dy <= REACH_Y; dy++) {
        const float *p = z.at(y + dy, x - REACH_X) + half, *w = lags + ((dy + 2) * side + 2 - REACH_X) * PANEL + half;
        vec v[2 * (REACH_X + N) - 1];
#pragma GCC unroll 32
        for (int i = 0; i < 2 * (REACH_X + N) - 1; i++) v[i] = load(p + i * PANEL);
#pragma GCC unroll 8
        for (int dx = 0; dx <= 2 * REACH_X; dx++) {
            const vec by = load(w + dx * PANEL);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][dx % sums] += by * v[dx + 2 * n];
        }
    }
#pragma GCC unroll 4
    for (int ty = 2 - REACH_Y; ty <= REACH_Y; ty += 2)
#pragma GCC unroll 4
        for (int tx = 2 - REACH_X; tx <= REACH_X; tx += 2) {
            const float* g = grad.at((y + 1 - ty) / 2, (x + 1 - tx) / 2) + half;
            const vec by = load(kernel + (ty * 3 + tx) * PANEL + half);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) acc[n][tx / 2] += by * load(g + n * PANEL);
        }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
#pragma GCC unroll 4
        for (int i = 1; i < sums; i++) acc[n][0] += acc[n][i];
        store_some(out + n * step + half, acc[n][0], channels - half, large);
    }
}

template <class T>
void input_grad_halved(const T* g, const T* y, const T* x, const Shape& s, const float* centre, const float* kernel,
                       const float* quad, const float* offset, const float* shift, float top, T* dx, int threads) {
    constexpr int taps = 9, entry = 26;
    const int64_t rows = s.out(s.h, 3), columns = s.out(s.w, 3);
    const Halved tall{rows}, wide{columns};
    const auto weights = by_block(kernel, s.c, taps);
    const auto lags = lag_weights<3>(s, quad, offset, shift, tall, wide, threads);
    const bool large = s.b * s.h * s.w * s.c >= LARGE;
    const Pieces pieces(s, s.h, s.w);
    share(pieces.count, threads, [&](int, int64_t first, int64_t last) {
        Plane z(pieces.height + 4, s.w, 3), grad(pieces.height / 2 + 3, columns, 2);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t at = piece.block * PANEL, channels = std::min<int64_t>(PANEL, s.c - at);
            const int64_t of_grad = piece.image * rows * columns * s.c;
            fill(z, piece.first - 2, piece.last + 2, x + piece.image * s.h * s.w * s.c, s, piece.block, centre, 1);
            fill_gradient(grad, std::max<int64_t>(0, piece.first - 1) / 2, piece.last / 2 + 1, rows, g + of_grad, y + of_grad, s,
                          piece.block, top);
            const float* w = &weights[at * taps];
            Ahead of_x(x, pieces, i + 1, s.h, s.w, 1, s.c);
            for (int64_t p = piece.first; p < piece.last; p++) {
                const float* of_row = &lags[(piece.block * 9 + tall.kind(p) * 3) * entry * PANEL];
                T* to = dx + ((piece.image * s.h + p) * s.w) * s.c + at;
                const auto some = [&](auto count, int64_t q, int half) __attribute__((always_inline)) {
                    constexpr int N = decltype(count)::value;
                    const float* of = of_row + wide.kind(q) * entry * PANEL;
                    const auto with = [&](auto reach_y, auto reach_x) __attribute__((always_inline)) {
                        blend_halved<decltype(reach_y)::value, decltype(reach_x)::value, N>(z, grad, p, q, w, of, half, to + q * s.c,
                                                                                          2 * s.c, channels, large);
                    };
                    const std::integral_constant<int, 1> near;
                    const std::integral_constant<int, 2> far;
                    if (p % 2) q % 2 ? with(far, far) : with(far, near);
                    else q % 2 ? with(near, far) : with(near, near);
                };
                for (int half = 0; half < PANEL && half < channels; half += LANES)
                    for (int64_t phase = 0; phase < 2; phase++) {
                        int64_t q = phase;
                        for (; q + 6 < s.w && wide.kind(q + 6) == phase; q += 8) {
                            if (!half) of_x.ask(4);
                            some(std::integral_constant<int, 4>(), q, half);
                        }
                        for (; q < s.w; q += 2) some(std::integral_constant<int, 1>(), q, half);
                    }
            }
        }
    });
}

// At any stride: every place adds its patch's gradient to the pixels that it read.
template <int K, class T>
void input_grad_by_place(const T* g, const T* y, const T* x, const Shape& s, const float* centre,
                         const float* kernel, const float* quad, const float* offset, const float* shift,
    float top, T* dx, int threads) {
    constexpr int taps = K * K;
    const auto weights = by_block(kernel, s.c, taps), quads = by_block(quad, s.c, taps * taps);
    const auto shifts = by_block(shift, s.c, taps), offsets = by_block(offset, s.c, taps);
    const int64_t rows = s.out(s.h, K), columns = s.out(s.w, K);
    const bool large = s.b * s.h * s.w * s.c >= LARGE;
    const Pieces pieces(s, s.h, s.w);
    share(pieces.count, threads, [&](int, int64_t first, int64_t last) {
        const int64_t most = pieces.height + 2 * (K + s.stride);
        Plane z(most, s.w, s.padding + K), grad(most, columns, 0), sum(most, s.w, s.padding + K);
        for (int64_t i = first; i < last; i++) {
            const Piece piece = pieces.at(i);
            const int64_t at = piece.block * PANEL, channels = std::min<int64_t>(PANEL, s.c - at);
            // The places that read rows first ... last-1; those at the rim also belong to the pieces beside.
            const int64_t low = std::max<int64_t>(0, (piece.first + s.padding - K) / s.stride);
            const int64_t high = std::min(rows, (piece.last - 1 + s.padding) / s.stride + 1);
            const int64_t from = std::min(piece.first, low * s.stride - s.padding);
            const int64_t to = std::max(piece.last, (high - 1) * s.stride - s.padding + K);
            const int64_t of_grad = piece.image * rows * columns * s.c;
            fill(z, from, to, x + piece.image * s.h * s.w * s.c, s, piece.block, centre, s.padding);
            fill_gradient(grad, low, high, rows, g + of_grad, y + of_grad, s, piece.block, top);
            sum.start(from, to, 0, 0);
            const float *w = &weights[at * taps], *q = &quads[at * taps * taps], *c = &shifts[at * taps], *m = &offsets[at * taps];
            Ahead of_x(x, pieces, i + 1, s.h, s.w, 1, s.c);
            for (int64_t p = low; p < high; p++)
                for (int64_t r = 0; r < columns; r++)
                    for (int half = 0; half < PANEL && half < channels; half += LANES) {
                        if (!half) of_x.ask(s.stride * s.stride);
                        const float* from = z.at(p * s.stride - s.padding, r * s.stride - s.padding) + half;
                        float* to = sum.at(p * s.stride - s.padding, r * s.stride - s.padding) + half;
                        const vec by = load(grad.at(p, r) + half);
                        vec v[taps];
#pragma GCC unroll 64
                        for (int t = 0; t < taps; t++)
                            v[t] = load(from + t / K * z.row() + t % K * PANEL) - load(m + t * PANEL + half);
                        for (int t = 0; t < taps; t++) {
                            vec acc = load(c + t * PANEL + half) + by * load(w + t * PANEL + half);
#pragma GCC unroll 64
                            for (int u = 0; u < taps; u++) acc += v[u] * load(q + (t * taps + u) * PANEL + half);
                            float* cell = to + t / K * sum.row() + t % K * PANEL;
                            store(cell, load(cell) + acc);
                        }
                    }
            for (int64_t p = piece.first; p < piece.last; p++)
                for (int64_t r = 0; r < s.w; r++) {
                    const float* from = sum.at(p, r);
                    T* to = dx + ((piece.image * s.h + p) * s.w + r) * s.c + at;
                    for (int half = 0; half < PANEL && half < channels; half += LANES)
                        store_some(to + half, load(from + half), channels - half, large);
                }
        }
    });
}

template <int K, class T>
void input_grad(const T* g, const T* y, const T* x, const Shape& s, const float* centre, const float* kernel,
                const float* quad, const float* offset, const float* shift,
    float top, T* dx, int threads) {
    const int64_t edge = K - 1 - s.padding;
    const bool lags = s.stride == 1 && edge >= 0 && s.h >= 2 * edge && s.w >= 2 * edge;
    auto pass = lags ? input_grad_by_lag<K, T> : input_grad_by_place<K, T>;
    if constexpr (K == 3)
        if (s.stride == 2 && s.padding == 1) pass = input_grad_halved<T>;
    pass(g, y, x, s, centre, kernel, quad, offset, shift, top, dx, threads);
}

}  // namespace

// CALL(size, type) for this size and type of the maps; maps in bfloat16 (`low`) have 3 x 3 kernels.
#define FOR_SIZE(K, CALL) \
    if (low) CALL(3, bf16); else if (K == 1) CALL(1, float); else if (K == 3) CALL(3, float); \
    else if (K == 5) CALL(5, float); else CALL(7, float)

// sum[c][t] and products[c][t][u] over all places of the patch less centre; centre is taken as zero unless centred.
API void depthwise_moments(const void* x, int64_t low, const int64_t* shape, int64_t taps, const float* centre, int64_t centred, double* sum,
                           double* products, int threads) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
#define CALL(K, T) moments<K>(static_cast<const T*>(x), s, centre, centred, sum, products, threads)
    FOR_SIZE(taps, CALL);
#undef CALL
}

// y = act(bias + kernel (patch - centre)); kernel is (C, taps).
API void depthwise_convolve(const void* x, int64_t low, const int64_t* shape, int64_t taps, const float* centre, const float* kernel,
                            const float* bias, float top, void* y, int threads) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
#define CALL(K, T) convolve<K>(static_cast<const T*>(x), s, centre, kernel, bias, top, static_cast<T*>(y), threads)
    FOR_SIZE(taps, CALL);
#undef CALL
}

// products[c][t] = sum over places of grad' (patch - centre)[t]; sum[c] = sum of grad'.
API void depthwise_kernel_grad(const void* g, const void* y, const void* x, int64_t low, const int64_t* shape, int64_t taps,
                               const float* centre, float top, double* products, double* sum, int threads) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
#define CALL(K, T) \
    kernel_grad<K>(static_cast<const T*>(g), static_cast<const T*>(y), static_cast<const T*>(x), s, centre, top, products, sum, threads)
    FOR_SIZE(taps, CALL);
#undef CALL
}

// dx = the sum over places of kernel grad' + quad (patch - centre - offset) + shift, at the pixels that they read.
API void depthwise_input_grad(const void* g, const void* y, const void* x, int64_t low, const int64_t* shape, int64_t taps,
                              const float* centre, const float* kernel, const float* quad, const float* offset,
                              const float* shift, float top, void* dx, int threads) {
    const Shape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]};
#define CALL(K, T) \
    input_grad<K>(static_cast<const T*>(g), static_cast<const T*>(y), static_cast<const T*>(x), s, centre, kernel, quad, offset, shift, top, \
                  static_cast<T*>(dx), threads)
    FOR_SIZE(taps, CALL);
#undef CALL
}
