// The algebra of a unit between its passes over the batch: from moments to one kernel, and back to all gradients.
//
// A unit is B branches with a kernel and perhaps a skip; branch B is the skip. Rows are the kernels on the unit's patch,
// (B, O, K) with K = channels a group * taps; see `branches.py` and `moments.py` for the formulas.
#include "pointwise.h"

namespace {

struct Unit {
    int64_t groups, outs, inputs, tall, wide, above, beside, kernels, skip;  // outs and inputs a group; the patch's taps
    int64_t taps() const { return tall * wide; }
    int64_t k() const { return inputs * taps(); }
    int64_t o() const { return groups * outs; }
    int64_t branches() const { return kernels + skip; }
    // Where the skip's one stands in row o of the patch.
    int64_t one(int64_t o) const { return o % outs * taps() + above * wide + beside; }
};

// A branch's window: its taps and where they lie on the unit's.
struct Window {
    int64_t tall, wide, down, right;
};

// Runs work(value of the row, weight's index in the row) for every weight of one row.
template <class Work>
void each_weight(const Unit& u, const Window& w, Work work) {
    int64_t at = 0;
    for (int64_t i = 0; i < u.inputs; i++)
        for (int64_t y = 0; y < w.tall; y++)
            for (int64_t x = 0; x < w.wide; x++) work((i * u.tall + w.down + y) * u.wide + w.right + x, at++);
}

// The sum of a[i] b[i] in float64: several sums side by side, for one would wait for itself.
template <class A>
double dot(const A* a, const float* b, int64_t n) {
    constexpr int many = 16;
    double sums[many] = {}, total = 0;
    int64_t i = 0;
    for (; i + many <= n; i += many)
        for (int j = 0; j < many; j++) sums[j] += double(a[i + j]) * b[i + j];
    for (; i < n; i++) total += double(a[i]) * b[i];
    for (int j = 0; j < many; j++) total += sums[j];
    return total;
}

}  // namespace

// rows, rows S, the norms' 1 / sqrt(v + eps) and gains (branches, O), the kernel (O, K) and bias (O,). The running
// statistics, if given, move by factor towards the batch's.
API void fold_unit(const int64_t* unit, const int64_t* windows, const float** weights, const double* mean,
                   const double* covariance, int64_t count, const float** gamma, const float** beta, const double* eps,
                   float** running_mean, float** running_var, const double* factor, float* rows, float* spread,
                   double* inverse, double* gain, float* kernel, double* bias, int threads) {
    const Unit& u = *reinterpret_cast<const Unit*>(unit);
    const Window* window = reinterpret_cast<const Window*>(windows);
    const int64_t k = u.k(), o = u.o();
    share(u.kernels * o, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t at = first; at < last; at++) {
            const int64_t b = at / o, size = u.inputs * window[b].tall * window[b].wide;
            const float* from = weights[b] + at % o * size;
            float* to = rows + at * k;
            if (size == k) {
                std::copy_n(from, k, to);
                continue;
            }
            std::fill_n(to, k, 0.0f);
            each_weight(u, window[b], [&](int64_t value, int64_t weight) { to[value] = from[weight]; });
        }
    });
    if (u.groups == 1) {
        std::vector<float> square(covariance, covariance + k * k), zero(std::max(k, o));
        pointwise_convolve(rows, u.kernels * o, k, zero.data(), square.data(), zero.data(), k, -1, nullptr, spread, threads);
    } else {
        share(u.kernels * o, threads, [&](int, int64_t first, int64_t last) {
            std::vector<double> sum(k);
            for (int64_t at = first; at < last; at++) {
                const double* square = covariance + at % o / u.outs * k * k;
                std::fill(sum.begin(), sum.end(), 0.0);
                for (int64_t i = 0; i < k; i++)
                    for (int64_t j = 0; j < k; j++) sum[j] += rows[at * k + i] * square[i * k + j];
                std::copy_n(sum.begin(), k, spread + at * k);
            }
        });
    }
    share(o, threads, [&](int, int64_t first, int64_t last) {
        std::vector<double> sum(k);
        for (int64_t r = first; r < last; r++) {
            const double *centre = mean + r / u.outs * k, *square = covariance + r / u.outs * k * k;
            std::fill(sum.begin(), sum.end(), 0.0);
            double total = 0;
            for (int64_t b = 0; b < u.branches(); b++) {
                double m, v;
                if (b < u.kernels) {
                    const float *row = rows + (b * o + r) * k, *with = spread + (b * o + r) * k;
                    m = dot(centre, row, k), v = dot(row, with, k);
                } else {
                    m = centre[u.one(r)], v = square[u.one(r) * (k + 1)];
                }
                v = std::max(v, 0.0);
                const double i = 1 / std::sqrt(v + eps[b]), g = gamma[b] ? gamma[b][r] * i : i;
                inverse[b * o + r] = i, gain[b * o + r] = g;
                if (beta[b]) total += beta[b][r];
                if (running_mean[b]) {
                    const double unbiased = v * count / (count - 1);
                    running_mean[b][r] = float(running_mean[b][r] + factor[b] * (m - running_mean[b][r]));
                    running_var[b][r] = float(running_var[b][r] + factor[b] * (unbiased - running_var[b][r]));
                }
                if (b < u.kernels) {
                    const float* row = rows + (b * o + r) * k;
                    for (int64_t j = 0; j < k; j++) sum[j] += g * row[j];
                } else {
                    sum[u.one(r)] += g;
                }
            }
            bias[r] = total;
            for (int64_t j = 0; j < k; j++) kernel[r * k + j] = float(sum[j]);
        }
    });
}

// From A (O, K) and the sum of the gradient (O,): the gradients of every weight and norm, d S (G, K, K) in quad, and
// kernel^T sum (G, K) in pull.
API void unfold_unit(const int64_t* unit, const int64_t* windows, const float* rows, const float* spread,
                     const double* inverse, const double* gain, const float* kernel, const double* products,
                     const double* total, float** d_weights, float** d_gamma, double* quad, double* pull, int threads) {
    const Unit& u = *reinterpret_cast<const Unit*>(unit);
    const Window* window = reinterpret_cast<const Window*>(windows);
    const int64_t k = u.k(), o = u.o(), branches = u.branches();
    std::vector<double> d_var(branches * o);
    auto weighted = buffer<float>(u.groups == 1 ? u.kernels * o * k : 0);
    share(o, threads, [&](int, int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++)
            for (int64_t b = 0; b < branches; b++) {
                const double* a = products + r * k;
                const int64_t at = b * o + r;
                const float *row = rows + at * k, *with = spread + at * k;
                const double slope = b < u.kernels ? dot(a, row, k) : a[u.one(r)];
                if (d_gamma[b]) d_gamma[b][r] = float(slope * inverse[at]);
                const double d = -0.5 * slope * gain[at] * inverse[at] * inverse[at];
                d_var[at] = d;
                if (b == u.kernels) continue;
                const int64_t size = u.inputs * window[b].tall * window[b].wide;
                float* to = d_weights[b] + r * size;
                const auto gradient = [&](int64_t value, int64_t weight) {
                    to[weight] = float(gain[at] * a[value] + 2 * d * with[value]);
                };
                for (int64_t i = 0; size == k && i < k; i++) gradient(i, i);
                if (size < k) each_weight(u, window[b], gradient);
                if (u.groups == 1)
                    for (int64_t i = 0; i < k; i++) weighted[at * k + i] = float(d * row[i]);
            }
    });
    if (u.groups == 1) {
        symmetric_product(weighted.get(), rows, u.kernels * o, k, quad, threads);
    } else {
        share(u.groups, threads, [&](int, int64_t first, int64_t last) {
            std::fill_n(quad + first * k * k, (last - first) * k * k, 0.0);
            for (int64_t b = 0; b < u.kernels; b++)
                for (int64_t r = first * u.outs; r < last * u.outs; r++) {
                    const float* row = rows + (b * o + r) * k;
                    double* to = quad + r / u.outs * k * k;
                    for (int64_t i = 0; i < k; i++)
                        for (int64_t j = 0; j < k; j++) to[i * k + j] += d_var[b * o + r] * row[i] * row[j];
                }
        });
    }
    std::fill_n(pull, u.groups * k, 0.0);
    for (int64_t r = 0; r < o; r++) {
        double* to = pull + r / u.outs * k;
        for (int64_t i = 0; i < k; i++) to[i] += kernel[r * k + i] * total[r];
        if (u.skip) quad[r / u.outs * k * k + u.one(r) * (k + 1)] += d_var[u.kernels * o + r];
    }
}
