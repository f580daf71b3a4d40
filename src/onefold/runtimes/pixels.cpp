// Images channel by channel made pixel by pixel: as they are, or on a grid of int8. See pixels.py.

#include <cmath>
#include <cstdint>

namespace {

constexpr std::int64_t ROOM = 65536;  // bytes of a channel at a time: long runs of reading, and what is made stays near
constexpr std::int64_t MOST = 4;      // channels that are done so

template <class T>
constexpr std::int64_t BLOCK = ROOM / sizeof(T);  // pixels

template <class T, class Value>
void block(const float* planes, T* out, std::int64_t channels, std::int64_t pixels, std::int64_t count, Value value) {
    T made[MOST][BLOCK<T>];
    for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t i = 0; i < count; ++i) made[c][i] = value(planes[c * pixels + i]);
    if (channels == 3) {  // of a known width the compiler makes whole vectors
        for (std::int64_t i = 0; i < count; ++i)
            for (int c = 0; c < 3; ++c) out[3 * i + c] = made[c][i];
        return;
    }
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t c = 0; c < channels; ++c) out[channels * i + c] = made[c][i];
}

template <class T, class Value>
void images(const float* planes, T* out, std::int64_t batch, std::int64_t channels, std::int64_t pixels, Value value) {
    for (std::int64_t image = 0; image < batch; ++image, planes += channels * pixels, out += channels * pixels)
        for (std::int64_t start = 0; start < pixels; start += BLOCK<T>) {
            const std::int64_t count = pixels - start < BLOCK<T> ? pixels - start : BLOCK<T>;
            block(planes + start, out + channels * start, channels, pixels, count, value);
        }
}

}  // namespace

extern "C" {

void as_they_are(const float* planes, float* out, std::int64_t batch, std::int64_t channels, std::int64_t pixels) {
    images(planes, out, batch, channels, pixels, [](float x) { return x; });
}

void on_grid(const float* planes, std::int8_t* out, std::int64_t batch, std::int64_t channels, std::int64_t pixels,
             float steps, float zero) {
    images(planes, out, batch, channels, pixels, [=](float x) {
        const float q = std::nearbyint(x * steps) + zero;
        return static_cast<std::int8_t>(static_cast<std::int32_t>(q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q));
    });
}

}  // extern "C"
