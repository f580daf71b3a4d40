// Images from channel by channel (NCHW) to channels last (NHWC): copied, or quantized to int8. See litert.py.

#include <cmath>
#include <cstdint>

namespace {

constexpr std::int64_t BLOCK_BYTES = 65536;  // of one channel at a time: long sequential reads, and results stay in cache
constexpr std::int64_t MAX_CHANNELS = 4;

template <class T>
constexpr std::int64_t BLOCK = BLOCK_BYTES / sizeof(T);  // pixels

template <class T, class Convert>
void convert_block(const float* planes, T* out, std::int64_t channels, std::int64_t pixels, std::int64_t count,
                   Convert convert) {
    T converted[MAX_CHANNELS][BLOCK<T>];
    for (std::int64_t c = 0; c < channels; ++c)
        for (std::int64_t i = 0; i < count; ++i) converted[c][i] = convert(planes[c * pixels + i]);
    if (channels == 3) {  // with a constant number of channels the compiler vectorizes the interleaving
        for (std::int64_t i = 0; i < count; ++i)
            for (int c = 0; c < 3; ++c) out[3 * i + c] = converted[c][i];
        return;
    }
    for (std::int64_t i = 0; i < count; ++i)
        for (std::int64_t c = 0; c < channels; ++c) out[channels * i + c] = converted[c][i];
}

template <class T, class Convert>
void convert_images(const float* planes, T* out, std::int64_t batch, std::int64_t channels, std::int64_t pixels,
                    Convert convert) {
    for (std::int64_t image = 0; image < batch; ++image, planes += channels * pixels, out += channels * pixels)
        for (std::int64_t start = 0; start < pixels; start += BLOCK<T>) {
            const std::int64_t count = pixels - start < BLOCK<T> ? pixels - start : BLOCK<T>;
            convert_block(planes + start, out + channels * start, channels, pixels, count, convert);
        }
}

}  // namespace

extern "C" {

void copy_channels_last(const float* planes, float* out, std::int64_t batch, std::int64_t channels,
                        std::int64_t pixels) {
    convert_images(planes, out, batch, channels, pixels, [](float x) { return x; });
}

void quantize_channels_last(const float* planes, std::int8_t* out, std::int64_t batch, std::int64_t channels,
                            std::int64_t pixels, float inverse_scale, float zero_point) {
    convert_images(planes, out, batch, channels, pixels, [=](float x) {
        const float q = std::nearbyint(x * inverse_scale) + zero_point;
        return static_cast<std::int8_t>(static_cast<std::int32_t>(q < -128.0f ? -128.0f : q > 127.0f ? 127.0f : q));
    });
}

}  // extern "C"
