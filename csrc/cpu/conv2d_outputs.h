// What follows the sums of the op `conv2d` (csrc/cpu/conv2d.h): bias, activation, residual, y, and moments for the next norm.
#pragma once

#include "conv2d.h"
#include "vector.h"

namespace dfe {
namespace DFE_ISA {
namespace {

// What follows the sums, for consecutive pixels of a row; `c` (pixels, pitch) holds their sums and then what of y the moments see.
struct Run {
    int64_t n, row, column, pixels;  // the first pixel
    int64_t first, outputs;          // outputs [first, first + outputs)
    float* c;
    int64_t pitch;
};

// What sums of bytes mean (Conv2dArguments::factors); other sums mean what they are.
template <bool Bytes>
DFE_HD Floats meant(const float* c, Floats factor) {
    if (!Bytes) return load_vector(c);
    Integers sums;
    memcpy(&sums, c, sizeof sums);
    return __builtin_convertvector(sums, Floats) * factor;
}

// Puts in place of a run's sums of bytes what they mean.
void to_units(const Conv2dArguments& p, const Run& run) {
    const float *const factors = p.factors + run.first, *const terms = factors + p.blocks * p.multiplier.outputs;
    for (int64_t j = 0; j < run.outputs; j += WIDTH) {
        const Floats factor = load_vector(factors + j), term = load_vector(terms + j);
        for (int64_t i = 0; i < run.pixels; ++i) {
            float* const c = run.c + i * run.pitch + j;
            store_vector(c, meant<true>(c, factor) + term);
        }
    }
}

template <typename T, int A>
void activate(const Conv2dArguments& p, const Run& run) {
    const float* const bias = p.bias == nullptr ? nullptr : p.bias + run.n * p.bias_pitch + run.first;
    for (int64_t j = 0; j < run.outputs; j += WIDTH) {
        const int64_t left = run.outputs - j;
        const Floats term = bias == nullptr ? Floats{} : left >= WIDTH ? load_vector(bias + j) : load_some(bias + j, static_cast<int>(left));
        for (int64_t i = 0; i < run.pixels; ++i) {
            float* const c = run.c + i * run.pitch + j;
            store_vector(c, activated<A, digits_of<T>()>(load_vector(c) + term));
        }
    }
}

template <typename T>
void activate_run(const Conv2dArguments& p, const Run& run) {
    switch (static_cast<int>(p.activation)) {
        case static_cast<int>(Activation::gelu): return activate<T, static_cast<int>(Activation::gelu)>(p, run);
        case static_cast<int>(Activation::silu): return activate<T, static_cast<int>(Activation::silu)>(p, run);
        case static_cast<int>(Activation::relu): return activate<T, static_cast<int>(Activation::relu)>(p, run);
        case SIGMOID: return activate<T, SIGMOID>(p, run);
    }
}

template <typename T>
DFE_HD void add_pixel(float* c, const T* from, float share, int64_t count) {
    for (int64_t j = 0; j < count; j += WIDTH) {
        const int64_t left = count - j;
        const Floats value = left >= WIDTH ? load_vector(from + j) : load_some(from + j, static_cast<int>(left));
        store_vector(c + j, load_vector(c + j) + share * value);
    }
}

// A residual of half or twice the size.
template <typename T>
void add_resampled(const Conv2dArguments& p, const Run& run) {
    const T* const residual = static_cast<const T*>(p.residual) + run.first;
    const int64_t pitch = p.pitch_residual;
    for (int64_t i = 0; i < run.pixels; ++i) {
        float* const c = run.c + i * run.pitch;
        const int64_t column = run.column + i;
        if (p.residual_resample == Resample::up) {
            add_pixel(c, residual + ((run.n * (p.height / 2) + run.row / 2) * (p.width / 2) + column / 2) * pitch, 1.0f, run.outputs);
        } else {
            const T* const from = residual + ((run.n * 2 * p.height + 2 * run.row) * 2 * p.width + 2 * column) * pitch;
            const int64_t places[4] = {0, pitch, 2 * p.width * pitch, 2 * p.width * pitch + pitch};
            for (int64_t place : places) add_pixel(c, from + place, 0.25f, run.outputs);
        }
    }
}

// A first guess at the mean of `pixels` values: of four of them, none at an end, where the zeros around an image show.
template <typename At>
DFE_HD Floats guess_of(int64_t pixels, const At& at) {
    return 0.25f * at(pixels / 8) + 0.25f * at(3 * pixels / 8) + 0.25f * at(5 * pixels / 8) + 0.25f * at(7 * pixels / 8);
}

// Where the guess was so far off that subtracting its square would cost digits, the sums are taken again from the mean.
template <typename At>
DFE_HD void settle(Floats& centre, Floats& sum, Floats& squares, int64_t pixels, const At& at) {
    const Floats off = sum * (1.0f / static_cast<float>(pixels));
    if (!any_larger(sum * off, 0.75f * squares)) return;
    centre += off;
    sum = squares = Floats{};
    for (int64_t i = 0; i < pixels; ++i) {
        const Floats d = at(i) - centre;
        sum += d;
        squares += d * d;
    }
}

// Merge the mean and the squared differences of `pixels` values, given the sums of their differences from `centre` and of those differences'
// squares, into those of the `before` values before them in their tile (Chan, Golub and LeVeque 1979).
DFE_HD void merge(Floats centre, Floats sum, Floats squares, int64_t pixels, int64_t before, float* mean, float* m2, int count) {
    const Floats off = sum * (1.0f / static_cast<float>(pixels));
    centre += off;
    squares = larger(Floats{}, squares - sum * off);
    Floats mean_before = {}, m2_before = {};
    if (before > 0) {
        mean_before = count == WIDTH ? load_vector(mean) : load_some(mean, count);
        m2_before = count == WIDTH ? load_vector(m2) : load_some(m2, count);
    }
    const float share = static_cast<float>(pixels) / static_cast<float>(before + pixels), spread = static_cast<float>(before) * share;
    const Floats d = centre - mean_before, merged = before > 0 ? mean_before + d * share : centre, merged_m2 = m2_before + squares + d * d * spread;
    if (count == WIDTH) {
        store_vector(mean, merged);
        store_vector(m2, merged_m2);
    } else {
        store_some(mean, merged, count);
        store_some(m2, merged_m2, count);
    }
}

// The mean of output `output` in the tile of pixel `pixel`; its squared differences lie p.outputs further on.
float* moments_of(const Conv2dArguments& p, int64_t n, int64_t pixel, int64_t output) {
    const int64_t tiles = (p.height * p.width + p.tile_pixels - 1) / p.tile_pixels;
    return p.moments + (n * tiles + pixel / p.tile_pixels) * 2 * p.outputs + output;
}

// Outputs from `j` of the run on: bias, residual of y's size, y, moments. Chunks: sixteen outputs each, of which the first `count` exist. Bytes:
// whether the sums are still those of bytes.
template <typename T, bool Residual, bool Moments, bool Bytes, int Chunks, bool Full>
DFE_HD void write_chunks(const Conv2dArguments& p, const Run& run, int64_t j) {
    const int count = Full ? WIDTH : static_cast<int>(run.outputs - j);
    const int64_t pixel = run.row * p.width + run.column, first = run.first + j, at = run.n * p.height * p.width + pixel;
    const bool biased = p.bias != nullptr && p.activation == Activation::none;
    const T* residual = Residual ? static_cast<const T*>(p.residual) + at * p.pitch_residual + first : nullptr;
    T* y = static_cast<T*>(p.y) + at * p.pitch_y + first;
    float* c = run.c + j;
    Floats factor[Chunks], term[Chunks], centre[Chunks], sum[Chunks], squares[Chunks];
    for (int k = 0; k < Chunks; ++k) {
        const float* const bias = biased ? p.bias + run.n * p.bias_pitch + first + k * WIDTH : nullptr;
        term[k] = !biased ? Floats{} : Full ? load_vector(bias) : load_some(bias, count);
        if (Bytes) {
            const float* const factors = p.factors + first + k * WIDTH;  // as many as the blocks have outputs
            factor[k] = load_vector(factors);
            term[k] += load_vector(factors + p.blocks * p.multiplier.outputs);
        }
        sum[k] = squares[k] = Floats{};
        if (Moments) {
            centre[k] = guess_of(run.pixels, [&](int64_t i) {
                const Floats value = meant<Bytes>(c + i * run.pitch + k * WIDTH, factor[k]) + term[k];
                if (!Residual) return value;
                const T* const from = residual + i * p.pitch_residual;
                return value + (Full ? load_vector(from + k * WIDTH) : load_some(from, count));
            });
        }
    }
    const T* const stored = y;
    for (int64_t i = 0; i < run.pixels; ++i, c += run.pitch, y += p.pitch_y) {
        for (int k = 0; k < Chunks; ++k) {
            Floats value = meant<Bytes>(c + k * WIDTH, factor[k]) + term[k];
            if (Residual) value += Full ? load_vector(residual + k * WIDTH) : load_some(residual, count);
            if (Full) {
                store_vector(y + k * WIDTH, value);
            } else {
                store_some(y, value, count);
            }
            if (Moments) {
                const Floats d = rounded(value, y) - centre[k];
                sum[k] += d;
                squares[k] += d * d;
            }
        }
        if (Residual) residual += p.pitch_residual;
    }
    for (int k = 0; Moments && k < Chunks; ++k) {
        settle(centre[k], sum[k], squares[k], run.pixels, [&](int64_t i) {
            return Full ? load_vector(stored + i * p.pitch_y + k * WIDTH) : load_some(stored + i * p.pitch_y, count);
        });
        float* const mean = moments_of(p, run.n, pixel, first + k * WIDTH);
        merge(centre[k], sum[k], squares[k], run.pixels, pixel % p.tile_pixels, mean, mean + p.outputs, count);
    }
}

template <typename T, bool Residual, bool Moments, bool Bytes>
void write(const Conv2dArguments& p, const Run& run) {
    const int64_t pairs = run.outputs / (2 * WIDTH) * (2 * WIDTH), whole = run.outputs / WIDTH * WIDTH;
    for (int64_t j = 0; j < pairs; j += 2 * WIDTH) write_chunks<T, Residual, Moments, Bytes, 2, true>(p, run, j);
    if (pairs < whole) write_chunks<T, Residual, Moments, Bytes, 1, true>(p, run, pairs);
    if (whole < run.outputs) write_chunks<T, Residual, Moments, Bytes, 1, false>(p, run, whole);
}

template <typename T, bool Bytes>
void write_run(const Conv2dArguments& p, const Run& run) {
    if (p.residual != nullptr && p.residual_resample == Resample::none) {
        return (p.fused_moments ? write<T, true, true, Bytes> : write<T, true, false, Bytes>)(p, run);
    }
    (p.fused_moments ? write<T, false, true, Bytes> : write<T, false, false, Bytes>)(p, run);
}

// The sums c of the band's pixels [start, last).
template <typename T, bool Bytes>
void finish(const Conv2dArguments& p, int64_t n, int64_t top, int64_t start, int64_t last, int64_t block, float* c) {
    const int64_t pitch = p.multiplier.outputs, first = block * pitch;
    const int64_t outputs = p.outputs - first < pitch ? p.outputs - first : pitch;
    for (int64_t at = start; at < last;) {
        const int64_t row = at / p.row, column = at % p.row;
        if (column >= p.width) {
            at = (row + 1) * p.row;
            continue;
        }
        int64_t pixels = p.width - column < last - at ? p.width - column : last - at;
        const int64_t pixel = (top + row) * p.width + column;
        if (p.fused_moments) {
            const int64_t left = p.tile_pixels - pixel % p.tile_pixels;
            pixels = pixels < left ? pixels : left;
        }
        const Run run{n, top + row, column, pixels, first, outputs, c + (at - start) * pitch, pitch};
        const bool resampled = p.residual != nullptr && p.residual_resample != Resample::none;
        if (Bytes && p.activation == Activation::none && !resampled) {
            write_run<T, Bytes>(p, run);
        } else {
            if (Bytes) to_units(p, run);
            activate_run<T>(p, run);
            if (resampled) add_resampled<T>(p, run);
            write_run<T, false>(p, run);
        }
        at += pixels;
    }
}

template <typename T>
void moments(const Conv2dArguments& p, int64_t begin, int64_t end) {
    const int64_t size = p.height * p.width, tiles = (size + p.tile_pixels - 1) / p.tile_pixels;
    constexpr int64_t STEP = 64;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t n = tile / tiles, from = tile % tiles * p.tile_pixels, to = from + p.tile_pixels < size ? from + p.tile_pixels : size;
        for (int64_t pixel = from; pixel < to; pixel += STEP) {
            const int64_t pixels = to - pixel < STEP ? to - pixel : STEP;
            for (int64_t first = 0; first < p.outputs; first += WIDTH) {
                const int count = static_cast<int>(p.outputs - first < WIDTH ? p.outputs - first : WIDTH);
                const T* const y = static_cast<const T*>(p.y) + (n * size + pixel) * p.pitch_y + first;
                const auto at = [&](int64_t i) { return count == WIDTH ? load_vector(y + i * p.pitch_y) : load_some(y + i * p.pitch_y, count); };
                Floats centre = guess_of(pixels, at), sum = {}, squares = {};
                for (int64_t i = 0; i < pixels; ++i) {
                    const Floats d = at(i) - centre;
                    sum += d;
                    squares += d * d;
                }
                settle(centre, sum, squares, pixels, at);
                float* const mean = moments_of(p, n, pixel, first);
                merge(centre, sum, squares, pixels, pixel - from, mean, mean + p.outputs, count);
            }
        }
    }
}

}  // namespace
}  // namespace DFE_ISA
}  // namespace dfe
