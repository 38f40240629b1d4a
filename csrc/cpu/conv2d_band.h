// The input of a band of the op `conv2d` (csrc/cpu/conv2d.h): normalised, activated, resampled, concatenated and padded with zeros.
#pragma once

#include "conv2d.h"
#include "vector.h"

namespace dfe {
namespace DFE_ISA {
namespace {

constexpr int64_t AHEAD = 4096;  // values that are asked for before they are needed

// How a value stands in the band: as it is, or as a number of steps from the lower end of its range.
template <typename G>
struct Steps {
    explicit Steps(const Conv2dArguments&) {}
    Floats operator()(Floats value) const { return value; }
};
template <>
struct Steps<uint8_t> {
    float per_unit, zero;
    explicit Steps(const Conv2dArguments& p) : per_unit(p.steps_per_unit), zero(p.zero) {}
    Floats operator()(Floats value) const { return value * per_unit + zero; }
};

// Sixteen channels of `pixels` pixels, or the first `count` of them.
template <typename T, typename G, Activation A, Digits D, bool Full>
DFE_HD void apply_chunk(const T* x, int64_t pixels, int64_t pitch, int count, Floats scale, Floats offset, Steps<G> steps, G* out,
                        int64_t out_pitch) {
    for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
        __builtin_prefetch(x + AHEAD);
        const Floats z = (Full ? load_vector(x) : load_some(x, count)) * scale + offset;
        const Floats value = steps(activated<static_cast<int>(A), D>(z));
        if (Full) {
            store_vector(out, value);
        } else {
            store_some(out, value, count);
        }
    }
}

// out = act(scale x + offset) of `pixels` pixels; scale may be null. Many channels in the order of memory; few in turn, each for all pixels.
template <typename T, typename G, Activation A, Digits D>
void apply(const T* x, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset, Steps<G> steps, G* out,
           int64_t out_pitch) {
    if (channels >= 4 * WIDTH && channels % WIDTH == 0 && scale != nullptr) {
        for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
            for (int64_t c = 0; c < channels; c += WIDTH) {
                __builtin_prefetch(x + c + AHEAD);
                const Floats z = load_vector(x + c) * load_vector(scale + c) + load_vector(offset + c);
                store_vector(out + c, steps(activated<static_cast<int>(A), D>(z)));
            }
        }
        return;
    }
    const int64_t step = 4096 / channels + 1;
    for (int64_t i = 0; i < pixels; i += step, x += step * pitch, out += step * out_pitch) {
        const int64_t size = pixels - i < step ? pixels - i : step;
        for (int64_t c = 0; c < channels; c += WIDTH) {
            Floats factor = broadcast(1.0f), term = {};
            if (channels - c >= WIDTH) {
                if (scale != nullptr) factor = load_vector(scale + c), term = load_vector(offset + c);
                apply_chunk<T, G, A, D, true>(x + c, size, pitch, WIDTH, factor, term, steps, out + c, out_pitch);
            } else {
                const int count = static_cast<int>(channels - c);
                if (scale != nullptr) factor = load_some(scale + c, count), term = load_some(offset + c, count);
                apply_chunk<T, G, A, D, false>(x + c, size, pitch, count, factor, term, steps, out + c, out_pitch);
            }
        }
    }
}

// The mean of act(scale x + offset) over 2 x 2 pixels: rows x and x + below, `pixels` results.
template <typename T, typename G, Activation A, Digits D>
void apply_mean(const T* x, int64_t below, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset,
                Steps<G> steps, G* out, int64_t out_pitch) {
    const int64_t places[4] = {0, pitch, below, below + pitch};
    for (int64_t i = 0; i < pixels; ++i, x += 2 * pitch, out += out_pitch) {
        for (int64_t c = 0; c < channels; c += WIDTH) {
            const int count = static_cast<int>(channels - c < WIDTH ? channels - c : WIDTH);
            const bool full = count == WIDTH;
            Floats sum = {}, factor = broadcast(1.0f), term = {};
            if (scale != nullptr) {
                factor = full ? load_vector(scale + c) : load_some(scale + c, count);
                term = full ? load_vector(offset + c) : load_some(offset + c, count);
            }
            for (int64_t place : places) {
                const Floats z = full ? load_vector(x + place + c) : load_some(x + place + c, count);
                sum += activated<static_cast<int>(A), D>(z * factor + term);
            }
            if (full) {
                store_vector(out + c, steps(0.25f * sum));
            } else {
                store_some(out + c, steps(0.25f * sum), count);
            }
        }
    }
}

// Values that stand for 0.
template <typename G>
void clear(const Conv2dArguments& p, G* out, int64_t count) {
    memset(static_cast<void*>(out), sizeof(G) == 1 ? static_cast<int>(p.zero) : 0, static_cast<size_t>(count) * sizeof(G));
}

// `pixels` pixels of `channels` values as they are.
template <typename T>
void copy_pixels(const T* x, int64_t pixels, int64_t pitch, int64_t channels, T* out, int64_t out_pitch) {
    if (pitch == channels && out_pitch == channels) {
        memcpy(out, x, static_cast<size_t>(pixels * channels) * sizeof(T));
        return;
    }
    constexpr int64_t PIECE = 32 / static_cast<int64_t>(sizeof(T));
    const int64_t whole = channels / PIECE * PIECE;
    for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
        for (int64_t c = 0; c < whole; c += PIECE) memcpy(out + c, x + c, 32);  // of a size that the compiler knows
        if (whole < channels) memcpy(out + whole, x + whole, static_cast<size_t>(channels - whole) * sizeof(T));
    }
}

template <typename T, typename G>
constexpr bool same() {
    return sizeof(T) == sizeof(G);  // float in float32, bfloat16 in bfloat16; half is never multiplied as it is
}

// Row `row` of the convolution's input, from one source of `channels`, into `out`.
template <typename T, typename G, Activation A, Digits D>
void source_row(const Conv2dArguments& p, const T* x, int64_t pitch, int64_t channels, const float* scale, const float* offset, int64_t n,
                int64_t row, G* out) {
    const Steps<G> steps(p);
    if (p.resample == Resample::down) {
        const T* const from = x + (n * 2 * p.height + 2 * row) * 2 * p.width * pitch;
        return apply_mean<T, G, A, D>(from, 2 * p.width * pitch, p.width, pitch, channels, scale, offset, steps, out, p.padded);
    }
    if (p.resample == Resample::up) {
        const T* const from = x + (n * (p.height / 2) + row / 2) * (p.width / 2) * pitch;
        apply<T, G, A, D>(from, p.width / 2, pitch, channels, scale, offset, steps, out, 2 * p.padded);
        for (int64_t i = 0; i < p.width; i += 2) {
            copy_pixels(out + i * p.padded, 1, p.padded, channels, out + (i + 1) * p.padded, p.padded);
        }
        return;
    }
    const T* const from = x + (n * p.height + row) * p.width * pitch;
    if (same<T, G>() && A == Activation::none && scale == nullptr) {
        return copy_pixels(from, p.width, pitch, channels, reinterpret_cast<T*>(out), p.padded);
    }
    apply<T, G, A, D>(from, p.width, pitch, channels, scale, offset, steps, out, p.padded);
}

// Rows [first, last) of the band whose row `halo` is row `top` of the image, each with the zeros right of it.
template <typename T, typename G, Activation A, Digits D>
void fill_rows(const Conv2dArguments& p, int64_t n, int64_t top, int64_t first, int64_t last, G* band) {
    const int64_t channels = p.channels_1 + p.channels_2;
    const float *const scale = p.scale == nullptr ? nullptr : p.scale + n * channels, *const offset = p.scale == nullptr ? nullptr : p.offset + n * channels;
    for (int64_t r = first; r < last; ++r) {
        G* const out = band + (p.margin + r * p.row) * p.padded;
        const int64_t row = top + r - p.margin;
        clear(p, out + p.width * p.padded, (p.row - p.width) * p.padded);
        if (row < 0 || row >= p.height) {
            clear(p, out, p.width * p.padded);
            continue;
        }
        if (p.padded > channels) {
            for (int64_t i = 0; i < p.width; ++i) clear(p, out + i * p.padded + channels, p.padded - channels);
        }
        if (p.resample == Resample::up && row % 2 == 1 && r > first) {
            memcpy(static_cast<void*>(out), out - p.row * p.padded, static_cast<size_t>(p.width * p.padded) * sizeof(G));
            continue;
        }
        source_row<T, G, A, D>(p, static_cast<const T*>(p.x), p.pitch_x, p.channels_1, scale, offset, n, row, out);
        if (p.channels_2 == 0) continue;
        const float *const scale_2 = scale == nullptr ? nullptr : scale + p.channels_1, *const offset_2 = scale == nullptr ? nullptr : offset + p.channels_1;
        source_row<T, G, A, D>(p, static_cast<const T*>(p.x2), p.pitch_x2, p.channels_2, scale_2, offset_2, n, row, out + p.channels_1);
    }
}

template <typename T, typename G, Digits D>
void fill_with(const Conv2dArguments& p, int64_t n, int64_t top, int64_t first, int64_t last, G* band) {
    switch (p.prologue) {
        case Activation::gelu: return fill_rows<T, G, Activation::gelu, D>(p, n, top, first, last, band);
        case Activation::silu: return fill_rows<T, G, Activation::silu, D>(p, n, top, first, last, band);
        case Activation::relu: return fill_rows<T, G, Activation::relu, D>(p, n, top, first, last, band);
        default: return fill_rows<T, G, Activation::none, D>(p, n, top, first, last, band);
    }
}

// Of bytes: with digits for a tenth of a step.
template <typename T, typename G>
void fill(const Conv2dArguments& p, int64_t n, int64_t top, int64_t first, int64_t last, G* band) {
    if constexpr (sizeof(G) > 1) {
        fill_with<T, G, digits_of<T>()>(p, n, top, first, last, band);
    } else if (p.steps_per_unit <= 125.0f) {
        fill_with<T, G, Digits::fewest>(p, n, top, first, last, band);
    } else if (p.steps_per_unit <= 2000.0f) {
        fill_with<T, G, Digits::few>(p, n, top, first, last, band);
    } else {
        fill_with<T, G, Digits::all>(p, n, top, first, last, band);
    }
}

}  // namespace
}  // namespace DFE_ISA
}  // namespace dfe
