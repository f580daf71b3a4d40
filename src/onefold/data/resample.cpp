// A crop of 8-bit RGB pixels, resized with Pillow's antialiased triangle filter, mirrored if asked, and scaled to floats.
//
// For each row of the result the rows that count are summed first (every value of the crop's width at once), then the
// columns. Values are rounded to levels of 0 to 255 once, at the end; Pillow rounds after its first pass too.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

typedef float pixel __attribute__((vector_size(16), aligned(4)));

namespace {

struct Taps {
    std::vector<int> first, count;
    std::vector<float> weight;
    int most, longest = 0;  // room for weights; the most that one result needs: the others have weights of zero
};

// Which of `sides` values count for each of `size` results over [low, high), and how much.
Taps taps(int sides, float low, float high, int size) {
    const double scale = (double(high) - low) / size, reach = std::max(scale, 1.0);
    Taps t;
    t.most = int(std::ceil(reach)) * 2 + 1;
    t.first.resize(size), t.count.resize(size), t.weight.assign(size_t(size) * t.most, 0.f);
    std::vector<double> raw(t.most);
    for (int i = 0; i < size; ++i) {
        const double centre = low + (i + 0.5) * scale;
        const int from = std::max(int(centre - reach + 0.5), 0), to = std::min(int(centre + reach + 0.5), sides);
        double sum = 0;
        for (int j = from; j < to; ++j) {
            const double w = 1.0 - std::abs((j - centre + 0.5) / reach);
            sum += raw[j - from] = w > 0 ? w : 0;
        }
        t.first[i] = from, t.count[i] = to - from, t.longest = std::max(t.longest, to - from);
        for (int j = from; j < to; ++j) t.weight[size_t(i) * t.most + j - from] = float(raw[j - from] / sum);
    }
    return t;
}

template <int ROWS>
void add_rows(float* __restrict sum, const uint8_t* __restrict rows, int64_t stride, const float* weights, int count) {
    float w[ROWS];
    for (int k = 0; k < ROWS; ++k) w[k] = weights[k];
    for (int i = 0; i < count; ++i) {
        float s = sum[i];
        for (int k = 0; k < ROWS; ++k) s += w[k] * float(rows[k * stride + i]);
        sum[i] = s;
    }
}

// One row of the result from the sums of its rows: levels (size, 4), at most 255. TAPS is 0 where it is not known.
template <int TAPS>
void row_of(const float* sums, const Taps& across, int size, pixel* levels) {
    const int taps = TAPS ? TAPS : across.longest;
    const pixel zero = {}, half = {0.5f, 0.5f, 0.5f, 0}, top = {255, 255, 255, 0};
    for (int x = 0; x < size; ++x) {
        const float *w = &across.weight[size_t(x) * across.most], *from = sums + 3 * across.first[x];
        pixel value = half;
        for (int k = 0; k < taps; ++k) value += w[k] * *reinterpret_cast<const pixel*>(from + 3 * k);
        value = value > zero ? value : zero;
        levels[x] = value < top ? value : top;
    }
}

void row_by_taps(const float* sums, const Taps& across, int size, pixel* levels) {
    switch (across.longest) {
        case 2: return row_of<2>(sums, across, size, levels);
        case 3: return row_of<3>(sums, across, size, levels);
        case 4: return row_of<4>(sums, across, size, levels);
        case 5: return row_of<5>(sums, across, size, levels);
        case 6: return row_of<6>(sums, across, size, levels);
        default: return row_of<0>(sums, across, size, levels);
    }
}

}  // namespace

// pixels: (height, width, 3), rows `row_bytes` apart, pixels `pixel_bytes` apart - either may be negative.
// out: float (3, size, size) = level * gain[channel] + offset[channel]. box: left, top, right, bottom within the pixels.
extern "C" __attribute__((visibility("default"))) void resample(
    const uint8_t* pixels, int64_t row_bytes, int64_t pixel_bytes, int width, int height, const float* box, int size,
    int mirror, const float* gain, const float* offset, float* out) {
    const Taps across = taps(width, box[0], box[2], size), down = taps(height, box[1], box[3], size);
    const int values = 3 * width;
    std::vector<float> sums(values + 3 * across.longest + 4, 0.f);
    std::vector<uint8_t> packed;
    const bool strided = pixel_bytes != 3;
    if (strided) packed.resize(size_t(height) * values);
    for (int y = 0; strided && y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c)
                packed[size_t(y) * values + 3 * x + c] = pixels[y * row_bytes + x * pixel_bytes + c];
    const uint8_t* base = strided ? packed.data() : pixels;
    const int64_t stride = strided ? values : row_bytes;
    std::vector<pixel> levels(size);
    for (int y = 0; y < size; ++y) {
        const float* weights = &down.weight[size_t(y) * down.most];
        const uint8_t* rows = base + down.first[y] * stride;
        std::fill(sums.begin(), sums.end(), 0.f);
        int k = 0;
        for (; k + 3 < down.count[y]; k += 4) add_rows<4>(sums.data(), rows + k * stride, stride, weights + k, values);
        for (; k < down.count[y]; ++k) add_rows<1>(sums.data(), rows + k * stride, stride, weights + k, values);
        row_by_taps(sums.data(), across, size, levels.data());
        const float* level = reinterpret_cast<const float*>(levels.data());
        for (int c = 0; c < 3; ++c) {
            float* __restrict to = out + (size_t(c) * size + y) * size;
            const float g = gain[c], o = offset[c];
            if (mirror)
                for (int x = 0; x < size; ++x) to[x] = float(int(level[4 * (size - 1 - x) + c])) * g + o;
            else
                for (int x = 0; x < size; ++x) to[x] = float(int(level[4 * x + c])) * g + o;
        }
    }
}
