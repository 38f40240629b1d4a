// The ops `upsample_bilinear` and `max_pool` (formulas: kernels/resample.py), one output row at a time. An upsampled row is first interpolated
// between two input rows, half as many pixels, and then along itself.
#include "resample.h"

#include "isa.h"

namespace dfe {
namespace DFE_ISA {
namespace {

// Of output row (or column) i: the input row before it, and the weight of the row after.
struct Place {
    int64_t before;
    float weight;
};

Place place_of(int64_t i, int64_t size) {
    const int64_t place = i * (size - 1), step = 2 * size - 1, before = place / step;
    return {before, static_cast<float>(place - before * step) / static_cast<float>(step)};
}

template <typename T>
void between_rows(const T* DFE_RESTRICT above, const T* DFE_RESTRICT below, float weight, int64_t count, float* DFE_RESTRICT out) {
    const float rest = 1.0f - weight;
    for (int64_t i = 0; i < count; ++i) out[i] = rest * load(above + i) + weight * load(below + i);
}

template <typename T>
void between_pixels(const float* DFE_RESTRICT left, const float* DFE_RESTRICT right, float weight, int64_t count, T* DFE_RESTRICT out) {
    const float rest = 1.0f - weight;
    for (int64_t i = 0; i < count; ++i) store(out + i, rest * left[i] + weight * right[i]);
}

template <typename T>
void upsample_rows(const ResampleArguments& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = p.channels, width = p.width, row_stride = width * p.x_stride;
    for (int64_t out_row = begin; out_row < end; ++out_row) {
        const int64_t n = out_row / (2 * p.height);
        const Place down = place_of(out_row % (2 * p.height), p.height);
        const T* const above = static_cast<const T*>(p.x) + (n * p.height + down.before) * row_stride;
        const T* const below = down.before + 1 < p.height ? above + row_stride : above;
        if (p.x_stride == channels) {
            between_rows(above, below, down.weight, width * channels, scratch);
        } else {
            for (int64_t i = 0; i < width; ++i) {
                between_rows(above + i * p.x_stride, below + i * p.x_stride, down.weight, channels, scratch + i * channels);
            }
        }
        // One pixel more, so that the last has a right neighbour.
        for (int64_t c = 0; c < channels; ++c) scratch[width * channels + c] = scratch[(width - 1) * channels + c];

        T* to = static_cast<T*>(p.y) + out_row * 2 * width * p.y_stride;
        T* const staged = reinterpret_cast<T*>(scratch + (width + 1) * channels);
        int64_t before = 0, rest = 0;  // place_of(i, width), step by step
        const int64_t step = 2 * width - 1;
        for (int64_t i = 0; i < 2 * width; ++i, to += p.y_stride) {
            const float* const left = scratch + before * channels;
            between_pixels(left, left + channels, static_cast<float>(rest) / static_cast<float>(step), channels, p.stream ? staged : to);
            if (p.stream) stream_copy(to, staged, channels * static_cast<int64_t>(sizeof(T)));
            rest += width - 1;
            if (rest >= step) rest -= step, ++before;
        }
    }
    if (p.stream) stream_fence();
}

// The larger, or whichever is not a number.
DFE_HD float larger(float a, float b) {
    const float most = b > a ? b : a;
    return b != b ? b : most;
}

// Of halves and bfloat16 the value chosen is exact in float, and so is its way back.
template <typename T>
void largest_of_four(const T* DFE_RESTRICT a, const T* DFE_RESTRICT b, const T* DFE_RESTRICT c, const T* DFE_RESTRICT d, int64_t count,
                     T* DFE_RESTRICT out) {
    for (int64_t i = 0; i < count; ++i) store(out + i, larger(larger(larger(load(a + i), load(b + i)), load(c + i)), load(d + i)));
}

template <typename T>
void pool_rows(const ResampleArguments& p, int64_t begin, int64_t end) {
    const int64_t height = p.height / 2, width = p.width / 2, row_stride = p.width * p.x_stride;
    for (int64_t out_row = begin; out_row < end; ++out_row) {
        const T* above = static_cast<const T*>(p.x) + (out_row / height * p.height + 2 * (out_row % height)) * row_stride;
        T* to = static_cast<T*>(p.y) + out_row * width * p.y_stride;
        for (int64_t i = 0; i < width; ++i, above += 2 * p.x_stride, to += p.y_stride) {
            const T* const below = above + row_stride;
            largest_of_four(above, above + p.x_stride, below, below + p.x_stride, p.channels, to);
        }
    }
}

}  // namespace

void upsample_bilinear_rows(const ResampleArguments& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.type) {
        case FloatType::float32: return upsample_rows<float>(p, begin, end, scratch);
        case FloatType::float16: return upsample_rows<half>(p, begin, end, scratch);
        case FloatType::bfloat16: return upsample_rows<bfloat16>(p, begin, end, scratch);
    }
}

void max_pool_rows(const ResampleArguments& p, int64_t begin, int64_t end, float*) {
    switch (p.type) {
        case FloatType::float32: return pool_rows<float>(p, begin, end);
        case FloatType::float16: return pool_rows<half>(p, begin, end);
        case FloatType::bfloat16: return pool_rows<bfloat16>(p, begin, end);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
