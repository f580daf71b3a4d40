// Norms in training, their sum and the activation, in one pass: y = act(sum over maps of gain (map - mean) + bias).
//
// Maps are rows (N, C), dense; a table is (maps, C). Sums over rows are float32 for FEW rows, then float64.
#include "vector.h"

namespace {

constexpr int FEW = 16, MOST = 8;  // rows summed in float32; maps of one sum


// Runs work(thread, first row, last row) on shares of whole runs of FEW rows.
template <class Work>
void share_rows(int64_t n, int threads, Work work) {
    share((n + FEW - 1) / FEW, threads, [&](int t, int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) work(t, i * FEW, std::min(n, (i + 1) * FEW));
    });
}

void add_up(std::vector<double>& totals, int threads, int64_t size, double* to) {
    for (int64_t i = 0; i < size; i++) {
        to[i] = 0;
        for (int t = 0; t < threads; t++) to[i] += totals[t * size + i];
    }
}

}  // namespace

// sum[c] and squares[c] of x - centre over the rows.
API void column_moments(const float* x, int64_t n, int64_t c, const float* centre, double* sum, double* squares, int threads) {
    std::vector<double> totals(size_t(threads) * 2 * c);
    share_rows(n, threads, [&](int t, int64_t first, int64_t last) {
        double *sums = &totals[t * 2 * c], *twos = sums + c;
        int64_t i = 0;
        for (; i + LANES <= c; i += LANES) {
            const vec middle = load(centre + i);
            vec one = {}, two = {};
            for (int64_t r = first; r < last; r++) {
                const vec v = load(x + r * c + i) - middle;
                one += v, two += v * v;
            }
            add(sums + i, one), add(twos + i, two);
        }
        for (; i < c; i++)
            for (int64_t r = first; r < last; r++) {
                const double v = x[r * c + i] - centre[i];
                sums[i] += v, twos[i] += v * v;
            }
    });
    std::vector<double> both(2 * c);
    add_up(totals, threads, 2 * c, both.data());
    std::copy_n(both.data(), c, sum), std::copy_n(both.data() + c, c, squares);
}

// out = act(bias + sum over maps of gain (map - mean)).
API void mix(const float** maps, int count, int64_t n, int64_t c, const float* mean, const float* gain, const float* bias,
             float top, float* out, int threads) {
    share(n, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            int64_t i = 0;
            for (; i + LANES <= c; i += LANES) {
                vec v = load(bias + i);
                for (int m = 0; m < count; m++)
                    v += load(gain + m * c + i) * (load(maps[m] + r * c + i) - load(mean + m * c + i));
                store(out + r * c + i, top < 0 ? v : clamp(v, top));
            }
            for (; i < c; i++) {
                float v = bias[i];
                for (int m = 0; m < count; m++) v += gain[m * c + i] * (maps[m][r * c + i] - mean[m * c + i]);
                out[r * c + i] = top < 0 ? v : std::min(std::max(v, 0.0f), top);
            }
        }
    });
}

// sums[m][c] = sum over rows of grad' (map - mean), and sums[count][c] that of grad', through the activation.
API void mix_sums(const float* g, const float* y, const float** maps, int count, int64_t n, int64_t c, const float* mean,
                  float top, double* sums, int threads) {
    const int64_t size = (count + 1) * c;
    std::vector<double> totals(size_t(threads) * size);
    share_rows(n, threads, [&](int t, int64_t first, int64_t last) {
        double* to = &totals[t * size];
        int64_t i = 0;
        for (; i + LANES <= c; i += LANES) {
            vec acc[MOST + 1] = {};
            for (int64_t r = first; r < last; r++) {
                const int64_t at = r * c + i;
                const vec v = top < 0 ? load(g + at) : through(load(g + at), load(y + at), top);
                acc[MOST] += v;
                for (int m = 0; m < count; m++) acc[m] += v * (load(maps[m] + at) - load(mean + m * c + i));
            }
            for (int m = 0; m < count; m++) add(to + m * c + i, acc[m]);
            add(to + count * c + i, acc[MOST]);
        }
        for (; i < c; i++)
            for (int64_t r = first; r < last; r++) {
                const int64_t at = r * c + i;
                const double v = top < 0 ? g[at] : through(g[at], y[at], top);
                to[count * c + i] += v;
                for (int m = 0; m < count; m++) to[m * c + i] += v * (maps[m][at] - mean[m * c + i]);
            }
    });
    add_up(totals, threads, size, sums);
}

// grads[m] = gain grad' + slope (map - mean) + constant, for each map.
API void mix_back(const float* g, const float* y, const float** maps, int count, int64_t n, int64_t c, const float* mean,
                  const float* gain, const float* slope, const float* constant, float top, float** grads, int threads) {
    share(n, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) {
            int64_t i = 0;
            for (; i + LANES <= c; i += LANES) {
                const int64_t at = r * c + i;
                const vec v = top < 0 ? load(g + at) : through(load(g + at), load(y + at), top);
                for (int m = 0; m < count; m++) {
                    const int64_t k = m * c + i;
                    const vec centred = load(maps[m] + at) - load(mean + k);
                    store(grads[m] + at, load(gain + k) * v + load(slope + k) * centred + load(constant + k));
                }
            }
            for (; i < c; i++) {
                const int64_t at = r * c + i;
                const float v = top < 0 ? g[at] : through(g[at], y[at], top);
                for (int m = 0; m < count; m++) {
                    const int64_t k = m * c + i;
                    grads[m][at] = gain[k] * v + slope[k] * (maps[m][at] - mean[k]) + constant[k];
                }
            }
        }
    });
}
