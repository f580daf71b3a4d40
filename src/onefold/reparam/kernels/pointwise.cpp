// The four passes for a pointwise unit, on rows: x is (N, C), y and its gradient (N, O), all dense and row-major.
//
// Sums over the batch are made in float32 over some rows, then over the runs of a SLAB, then in float64. A longer run would
// be biased: behind a ReLU many values are one and the same, and adding a constant rounds the same way every time.
#include "pointwise.h"

namespace {

constexpr int SLAB = 256;              // rows packed at a time
constexpr int FEW = 8;                 // rows that are read together
constexpr int64_t CACHE = 192 * 1024;  // bytes of a block of rows that should stay near the core

// out = x - centre, row by row.
void centre_rows(const float* x, int64_t rows, int64_t width, const float* centre, float* out, int64_t stride) {
    for (int64_t n = 0; n < rows; n++, x += width, out += stride)
        for (int64_t c = 0; c < width; c++) out[c] = x[c] - centre[c];
}

// out = the gradient through the activation, row by row.
void mask_rows(const float* g, const float* y, int64_t rows, int64_t width, float top, float* out, int64_t stride) {
    for (int64_t n = 0; n < rows; n++, g += width, y += width, out += stride) {
        int64_t c = 0;
        if (top < 0) c = width, std::copy(g, g + width, out);
        for (; c + LANES <= width; c += LANES) store(out + c, through(load(g + c), load(y + c), top));
        for (; c < width; c++) out[c] = through(g[c], y[c], top);
    }
}

// Floats that a group of `rows` rows takes when packed by W: a store may run over the last row's end.
template <int W>
int64_t group_of(int64_t rows) {
    return W % LANES ? rows * W + LANES : rows * W;
}

// x - centre in groups of W columns: [group][row][W], whatever past the last column; centre is padded. A few rows at a time,
// which stay near the core while the groups pick from them; row after row, since a store may run into the next.
template <int W>
void pack_centred(const float* x, int64_t rows, int64_t width, const float* centre, float* out) {
    constexpr int whole = (W + LANES - 1) / LANES * LANES;
    for (int64_t first = 0; first < rows; first += FEW) {
        const int64_t last = std::min<int64_t>(rows, first + FEW);
        for (int64_t c = 0; c < width; c += W) {
            float* group = out + c / W * group_of<W>(rows);
            for (int64_t n = first; n < last; n++) {
                const float *from = x + n * width + c, *middle = centre + c;
                float* to = group + n * W;
                if (c + whole <= (rows - n) * width) {  // past the last column stands the next row
                    for (int j = 0; j < W; j += LANES) store(to + j, load(from + j) - load(middle + j));
                } else {
                    for (int j = 0; j < W; j++) to[j] = c + j < width ? from[j] - middle[j] : 0;
                }
            }
        }
    }
}

// The gradient through the activation in panels: [panel][row][PANEL], zeros past the last column.
void pack_masked(const float* g, const float* y, int64_t rows, int64_t width, float top, float* out) {
    for (int64_t first = 0; first < rows; first += FEW) {
        const int64_t last = std::min<int64_t>(rows, first + FEW);
        int64_t c = 0;
        for (; c + PANEL <= width; c += PANEL)
            for (int64_t n = first; n < last; n++)
                for (int j = 0; j < PANEL; j += LANES) {
                    const int64_t at = n * width + c + j;
                    store(out + c * rows + n * PANEL + j, top < 0 ? load(g + at) : through(load(g + at), load(y + at), top));
                }
        if (c < width)
            for (int64_t n = first; n < last; n++)
                for (int j = 0; j < PANEL; j++) {
                    const int64_t at = n * width + c + j;
                    const bool inside = c + j < width;
                    out[c * rows + n * PANEL + j] = !inside ? 0 : top < 0 ? g[at] : through(g[at], y[at], top);
                }
    }
}

// sum[c] += the sums of the columns of panels, in float32 over a few rows.
void add_columns(const float* panels, int64_t rows, int64_t width, double* sum) {
    for (int64_t c = 0; c < width; c += PANEL, panels += rows * PANEL)
        for (int64_t from = 0; from < rows; from += 2 * FEW) {
            vec left = {}, right = {};
            for (int64_t n = from; n < std::min<int64_t>(rows, from + 2 * FEW); n++)
                left += load(panels + n * PANEL), right += load(panels + n * PANEL + LANES);
            add(sum + c, left), add(sum + c + LANES, right);
        }
}

// total[i][j] += sum over rows of a[row][i] * b[row][j], a packed by TILE_ROWS and b by PANEL; tiles below the diagonal
// are left out if half.
template <int RUN>
void add_products(int64_t rows, const float* a, int64_t wide_a, const float* b, int64_t wide_b, bool half, Next& next,
                  double* total) {
    const int64_t stride = up(wide_b, PANEL);
    for (int64_t j = 0; j < wide_b; j += PANEL)
        for (int64_t i = 0; i < wide_a && !(half && i >= j + PANEL); i += TILE_ROWS) {
            const float *left = a + i / TILE_ROWS * group_of<TILE_ROWS>(rows), *right = b + j * rows;
            vec out[TILE_ROWS][2];
            const bool narrow = wide_b - j <= LANES;
            tile_of<RUN>(TILE_ROWS, wide_b - j, rows, left, 1, TILE_ROWS, right, &next, out);
            for (int r = 0; r < TILE_ROWS; r++) {
                double* to = total + (i + r) * stride + j;
                add(to, out[r][0]);
                if (!narrow) add(to + LANES, out[r][1]);
            }
        }
}

// Columns of a (depth, width) matrix in panels: [panel][depth at start..][PANEL]; transposed reads b[column][k].
void pack_matrix(const float* b, int64_t depth, int64_t width, bool transposed, int64_t start, int64_t whole, float* out,
                 int threads) {
    share(up(width, PANEL) / PANEL, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t panel = first; panel < last; panel++) {
            const int64_t at = panel * PANEL, n = std::min<int64_t>(PANEL, width - at);
            float* to = out + (panel * whole + start) * PANEL;
            if (n < PANEL) std::fill_n(to, depth * PANEL, 0.0f);
            for (int64_t j = 0; transposed && j < n; j++)
                for (int64_t k = 0; k < depth; k++) to[k * PANEL + j] = b[(at + j) * depth + k];
            for (int64_t k = 0; !transposed && k < depth; k++) std::copy_n(b + k * width + at, n, to + k * PANEL);
        }
    });
}

// out (rows, width) = a (rows, depth) times the panels, plus bias, clamped where top >= 0; plus `more` where there is one.
void rows_times(const float* a, int64_t rows, int64_t depth, const float* panels, const float* bias, int64_t width,
                float top, const float* more, bool large, Next& next, float* out) {
    for (int64_t c = 0; c < width; c += PANEL) {
        const float* panel = panels + c * depth;
        const vec left = load(bias + c), right = load(bias + c + LANES);
        for (int64_t n = 0; n < rows; n += TILE_ROWS) {
            const int count = int(std::min<int64_t>(TILE_ROWS, rows - n));
            vec acc[TILE_ROWS][2];
            tile_of<64>(count, width - c, depth, a + n * depth, depth, 1, panel, &next, acc);
            for (int r = 0; r < count; r++) {
                vec u = acc[r][0] + left, v = acc[r][1] + right;
                if (top >= 0) u = clamp(u, top), v = clamp(v, top);
                float* to = out + (n + r) * width + c;
                const float* other = more ? more + (n + r) * width + c : nullptr;
                if (c + PANEL <= width) {
                    if (other) u += load(other), v += load(other + LANES);
                    large ? stream(to, u) : store(to, u);
                    large ? stream(to + LANES, v) : store(to + LANES, v);
                } else if (c + LANES == width) {
                    store(to, other ? u + load(other) : u);
                } else {
                    for (int j = 0; c + j < width; j++)
                        to[j] = (j < LANES ? u[j] : v[j - LANES]) + (other ? other[j] : 0);
                }
            }
        }
    }
}

int64_t block_rows(int64_t depth) {
    return std::max<int64_t>(2 * TILE_ROWS, CACHE / (4 * depth) / TILE_ROWS * TILE_ROWS);
}

// The runs of products of a slab or block, about: the next rows are asked for at each of them.
int64_t runs_of(int64_t tall, int64_t wide, int64_t depth = SLAB, int64_t run = 32) {
    return up(tall, TILE_ROWS) / TILE_ROWS * (up(wide, PANEL) / PANEL) * (up(depth, run) / run);
}

// With zeros behind them, as many as a group of columns may reach past the last.
Buffer<float> padded(const float* values, int64_t n) {
    auto out = buffer<float>(n + PANEL);
    std::copy_n(values, n, out.get()), std::fill_n(out.get() + n, PANEL, 0.0f);
    return out;
}

// One float64 matrix a thread, all zero at first; at() adds them up in the order of the threads.
struct Totals {
    int threads;
    int64_t size;
    std::vector<double> all;
    Totals(int threads, int64_t size) : threads(threads), size(size), all(size_t(threads) * size) {}
    double* of(int thread) { return all.data() + thread * size; }
    double at(int64_t i) const {
        double sum = all[i];
        for (int t = 1; t < threads; t++) sum += all[t * size + i];
        return sum;
    }
};

// See `pointwise.h`; of a symmetric product the half below the diagonal is left out, and copied.
void column_products(const float* g, const float* y, const float* x, int64_t n, int64_t c, int64_t o, const float* mean,
                     float top, bool half, double* products, double* sum, int threads) {
    const int64_t tall = up(c, TILE_ROWS), wide = up(o, PANEL);
    Totals totals(threads, tall * wide), sums(threads, wide);
    const auto middle = padded(mean, c);
    share(n, threads, [&](int t, int64_t first, int64_t last) {
        auto a = buffer<float>(tall / TILE_ROWS * group_of<TILE_ROWS>(SLAB)), b = buffer<float>(SLAB * wide);
        for (int64_t at = first; at < last; at += SLAB) {
            const int64_t rows = std::min<int64_t>(SLAB, last - at);
            pack_centred<TILE_ROWS>(x + at * c, rows, c, middle.get(), a.get());
            pack_masked(g + at * o, y + at * o, rows, o, top, b.get());
            add_columns(b.get(), rows, o, sums.of(t));
            // A stem's patches hold the image's border, which is far from the mean: shorter runs there.
            auto pass = c <= 64 ? add_products<16> : add_products<32>;
            const int64_t ahead = at + rows, more = std::min<int64_t>(SLAB, last - ahead), runs = runs_of(tall, wide);
            Next next;
            next.add(x + ahead * c, more * c, runs), next.add(g + ahead * o, more * o, runs);
            if (top >= 0) next.add(y + ahead * o, more * o, runs);
            pass(rows, a.get(), c, b.get(), o, half, next, totals.of(t));
        }
    });
    share(wide / LANES, threads, [&](int, int64_t first, int64_t last) {  // some columns at a time, which are read together
        for (int64_t block = first; block < last; block++) {
            const int64_t from = block * LANES, to = std::min<int64_t>(o, from + LANES);
            for (int64_t j = from; j < to; j++) sum[j] = sums.at(j);
            for (int64_t i = 0; i < c; i++)
                for (int64_t j = half ? std::max(i, from) : from; j < to; j++) {
                    products[j * c + i] = totals.at(i * wide + j);
                    if (half) products[i * c + j] = products[j * c + i];
                }
        }
    });
}

}  // namespace

// sum[c] and products[c][d]: sums over the rows of x - centre, and of its products.
API void pointwise_moments(const float* x, int64_t n, int64_t c, const float* centre, double* sum, double* products,
                           int threads) {
    const int64_t tall = up(c, TILE_ROWS), wide = up(c, PANEL);
    Totals totals(threads, tall * wide), sums(threads, wide);
    const auto middle = padded(centre, c);
    share(n, threads, [&](int t, int64_t first, int64_t last) {
        auto a = buffer<float>(tall / TILE_ROWS * group_of<TILE_ROWS>(SLAB)), b = buffer<float>(SLAB * wide);
        for (int64_t at = first; at < last; at += SLAB) {
            const int64_t rows = std::min<int64_t>(SLAB, last - at);
            pack_centred<TILE_ROWS>(x + at * c, rows, c, middle.get(), a.get());
            pack_centred<PANEL>(x + at * c, rows, c, middle.get(), b.get());
            add_columns(b.get(), rows, c, sums.of(t));
            Next next;
            next.add(x + (at + rows) * c, std::min<int64_t>(SLAB, last - at - rows) * c, runs_of(tall, wide) / 2);
            add_products<32>(rows, a.get(), c, b.get(), c, true, next, totals.of(t));
        }
    });
    share(c, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            sum[i] = sums.at(i);
            for (int64_t j = i; j < c; j++) products[i * c + j] = products[j * c + i] = totals.at(i * wide + j);
        }
    });
}

API void pointwise_convolve(const float* x, int64_t n, int64_t c, const float* mean, const float* kernel,
                            const float* bias, int64_t o, float top, const float* more, float* y, int threads) {
    auto panels = buffer<float>(up(o, PANEL) * c);
    pack_matrix(kernel, c, o, true, 0, c, panels.get(), threads);
    auto shift = padded(bias, o);
    const int64_t block = block_rows(c);
    share(n, threads, [&](int, int64_t first, int64_t last) {
        auto a = buffer<float>(block * c);
        for (int64_t at = first; at < last; at += block) {
            const int64_t rows = std::min(block, last - at);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < c; i++) a[r * c + i] = x[(at + r) * c + i] - mean[i];
            Next next;
            next.add(x + (at + rows) * c, std::min(block, last - at - rows) * c, runs_of(rows, o, c, 64));
            rows_times(a.get(), rows, c, panels.get(), shift.get(), o, top, more ? more + at * o : nullptr, n * o >= LARGE, next, y + at * o);
        }
    });
}

API void pointwise_kernel_grad(const float* g, const float* y, const float* x, int64_t n, int64_t c, int64_t o,
                               const float* mean, float top, double* products, double* sum, int threads) {
    column_products(g, y, x, n, c, o, mean, top, false, products, sum, threads);
}

void symmetric_product(const float* a, const float* b, int64_t n, int64_t k, double* products, int threads) {
    const std::vector<float> zero(k);
    std::vector<double> sum(k);
    column_products(a, a, b, n, k, k, zero.data(), -1, true, products, sum.data(), threads);
}

// dx = grad' kernel + (x - mean) quad + shift: one product over O + C columns side by side.
API void pointwise_input_grad(const float* g, const float* y, const float* x, int64_t n, int64_t c, int64_t o,
                              const float* kernel, const float* mean, const float* quad, const float* shift, float top,
                              float* dx, int threads) {
    const int64_t depth = o + c, block = block_rows(depth);
    auto panels = buffer<float>(up(c, PANEL) * depth);
    pack_matrix(kernel, o, c, false, 0, depth, panels.get(), threads);
    pack_matrix(quad, c, c, false, o, depth, panels.get(), threads);
    auto bias = padded(shift, c);
    share(n, threads, [&](int, int64_t first, int64_t last) {
        auto a = buffer<float>(block * depth);
        for (int64_t at = first; at < last; at += block) {
            const int64_t rows = std::min(block, last - at);
            for (int64_t r = 0; r < rows; r++) {
                float* to = a.get() + r * depth;
                mask_rows(g + (at + r) * o, y + (at + r) * o, 1, o, top, to, o);
                centre_rows(x + (at + r) * c, 1, c, mean, to + o, c);
            }
            const int64_t ahead = at + rows, more = std::min(block, last - ahead), runs = runs_of(rows, c, depth, 64);
            Next next;
            next.add(x + ahead * c, more * c, runs), next.add(g + ahead * o, more * o, runs);
            if (top >= 0) next.add(y + ahead * o, more * o, runs);
            rows_times(a.get(), rows, depth, panels.get(), bias.get(), c, -1, nullptr, n * c >= LARGE, next, dx + at * c);
        }
    });
}

// Maps in bfloat16: out = the gradient through the activation, sum[c] = its sum over the rows. Without y the sums of g.
API void masked_sums(const bf16* g, const bf16* y, int64_t n, int64_t c, float top, bf16* out, double* sum, int threads) {
    constexpr int64_t together = 64;  // rows summed in float32, then in float64
    Totals sums(threads, up(c, LANES));
    share(n, threads, [&](int t, int64_t first, int64_t last) {
        double* total = sums.of(t);
        for (int64_t at = first; at < last; at += together) {
            const int64_t end = std::min(last, at + together);
            int64_t j = 0;
            for (; j + LANES <= c; j += LANES) {
                vec acc = {};
                for (int64_t i = at * c + j; i < end * c; i += c) {
                    vec v = load(g + i);
                    if (y) store(out + i, v = top < 0 ? v : through(v, load(y + i), top));
                    acc += v;
                }
                add(total + j, acc);
            }
            for (; j < c; j++)
                for (int64_t i = at * c + j; i < end * c; i += c) {
                    float v = value(g[i]);
                    if (y) put(out + i, v = top < 0 ? v : through(v, value(y[i]), top));
                    total[j] += v;
                }
        }
    });
    for (int64_t j = 0; j < c; j++) sum[j] = sums.at(j);
}

// What a dense unit of `taps` x `taps` reads at each place, one row each: rows is (places, C * taps * taps), x (B, H, W, C).
API void write_patches(const float* x, const int64_t* shape, int64_t taps, float* rows, int threads) {
    const int64_t h = shape[1], w = shape[2], c = shape[3], stride = shape[4], reach = shape[5];
    const int64_t tall = (h + 2 * reach - taps) / stride + 1, wide = (w + 2 * reach - taps) / stride + 1;
    const int64_t high = h + 2 * reach, row = (w + 2 * reach) * c;
    share(shape[0], threads, [&](int, int64_t first, int64_t last) {
        auto image = buffer<float>(high * row);  // with its border, so that no place asks where it is
        std::fill_n(image.get(), high * row, 0.0f);
        for (int64_t b = first; b < last; b++) {
            for (int64_t y = 0; y < h; y++)
                std::copy_n(x + (b * h + y) * w * c, w * c, &image[(y + reach) * row + reach * c]);
            float* to = rows + b * tall * wide * c * taps * taps;
            for (int64_t p = 0; p < tall * wide; p++) {
                const float* corner = &image[p / wide * stride * row + p % wide * stride * c];
                for (int64_t i = 0; i < c; i++)
                    for (int64_t ty = 0; ty < taps; ty++)
                        for (int64_t tx = 0; tx < taps; tx++) *to++ = corner[ty * row + tx * c + i];
            }
        }
    });
}
