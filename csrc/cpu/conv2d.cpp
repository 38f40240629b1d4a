// The op `conv2d` (csrc/cpu/conv2d.h): the band's input, the product in float32, and what follows the sums.
#include "conv2d.h"

#include "vector.h"

namespace dfe {
namespace DFE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define DFE_UNROLL _Pragma("GCC unroll 32")

template <int Rows, int Vectors>
void float_block_at(const BlockArguments& p, int64_t at) {
    const float* DFE_RESTRICT b = static_cast<const float*>(p.b);
    float* const c = p.c + at * Vectors * LANES;
    const int64_t pitch = p.pitch;
    Vector sums[Rows][Vectors] = {};
    for (int64_t r = 0; r < p.runs; ++r) {
        const float* a = static_cast<const float*>(p.a) + at * pitch + p.starts[r];
        for (const float* const end = a + p.length; a != end; ++a, b += Vectors * LANES) {
            Vector weights[Vectors];
            DFE_UNROLL
            for (int j = 0; j < Vectors; ++j) weights[j] = *reinterpret_cast<const Vector*>(b + j * LANES);
            DFE_UNROLL
            for (int i = 0; i < Rows; ++i) {
                const float value = a[i * pitch];
                DFE_UNROLL
                for (int j = 0; j < Vectors; ++j) sums[i][j] += value * weights[j];
            }
        }
    }
    DFE_UNROLL
    for (int i = 0; i < Rows; ++i) {
        DFE_UNROLL
        for (int j = 0; j < Vectors; ++j) *reinterpret_cast<Vector*>(c + (i * Vectors + j) * LANES) = sums[i][j];
    }
}

template <int Rows, int Vectors>
void float_block(const BlockArguments& p) {
    for (int64_t i = 0; i < p.count; ++i) float_block_at<Rows, Vectors>(p, i * Rows);
}

constexpr int64_t AHEAD = 4096;  // values that are asked for before they are needed

// Sixteen channels of `pixels` pixels, or the first `count` of them.
template <typename T, typename G, Activation A, bool Full>
DFE_HD void apply_chunk(const T* x, int64_t pixels, int64_t pitch, int count, Floats scale, Floats offset, G* out, int64_t out_pitch) {
    for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
        __builtin_prefetch(x + AHEAD);
        const Floats z = (Full ? load_vector(x) : load_some(x, count)) * scale + offset;
        const Floats value = activated<static_cast<int>(A), digits_of<T>()>(z);
        if (Full) {
            store_vector(out, value);
        } else {
            store_some(out, value, count);
        }
    }
}

// out = act(scale x + offset) of `pixels` pixels; scale may be null. Many channels in the order of memory; few in turn, each for all pixels.
template <typename T, typename G, Activation A>
void apply(const T* x, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset, G* out, int64_t out_pitch) {
    if (channels >= 4 * WIDTH && channels % WIDTH == 0 && scale != nullptr) {
        for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
            for (int64_t c = 0; c < channels; c += WIDTH) {
                __builtin_prefetch(x + c + AHEAD);
                const Floats z = load_vector(x + c) * load_vector(scale + c) + load_vector(offset + c);
                store_vector(out + c, activated<static_cast<int>(A), digits_of<T>()>(z));
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
                apply_chunk<T, G, A, true>(x + c, size, pitch, WIDTH, factor, term, out + c, out_pitch);
            } else {
                const int count = static_cast<int>(channels - c);
                if (scale != nullptr) factor = load_some(scale + c, count), term = load_some(offset + c, count);
                apply_chunk<T, G, A, false>(x + c, size, pitch, count, factor, term, out + c, out_pitch);
            }
        }
    }
}

// The mean of act(scale x + offset) over 2 x 2 pixels: rows x and x + below, `pixels` results.
template <typename T, typename G, Activation A>
void apply_mean(const T* x, int64_t below, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset, G* out,
                int64_t out_pitch) {
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
                sum += activated<static_cast<int>(A), digits_of<T>()>(z * factor + term);
            }
            if (full) {
                store_vector(out + c, 0.25f * sum);
            } else {
                store_some(out + c, 0.25f * sum, count);
            }
        }
    }
}

template <typename G>
void clear(G* out, int64_t count) {
    memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(G));
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
template <typename T, typename G, Activation A>
void source_row(const Conv2dArguments& p, const T* x, int64_t pitch, int64_t channels, const float* scale, const float* offset, int64_t n,
                int64_t row, G* out) {
    if (p.resample == Resample::down) {
        const T* const from = x + (n * 2 * p.height + 2 * row) * 2 * p.width * pitch;
        return apply_mean<T, G, A>(from, 2 * p.width * pitch, p.width, pitch, channels, scale, offset, out, p.padded);
    }
    if (p.resample == Resample::up) {
        const T* const from = x + (n * (p.height / 2) + row / 2) * (p.width / 2) * pitch;
        apply<T, G, A>(from, p.width / 2, pitch, channels, scale, offset, out, 2 * p.padded);
        for (int64_t i = 0; i < p.width; i += 2) {
            copy_pixels(out + i * p.padded, 1, p.padded, channels, out + (i + 1) * p.padded, p.padded);
        }
        return;
    }
    const T* const from = x + (n * p.height + row) * p.width * pitch;
    if (same<T, G>() && A == Activation::none && scale == nullptr) {
        return copy_pixels(from, p.width, pitch, channels, reinterpret_cast<T*>(out), p.padded);
    }
    apply<T, G, A>(from, p.width, pitch, channels, scale, offset, out, p.padded);
}

// Rows [first, last) of the band whose row `halo` is row `top` of the image, each with the zeros right of it.
template <typename T, typename G, Activation A>
void fill_rows(const Conv2dArguments& p, int64_t n, int64_t top, int64_t first, int64_t last, G* band) {
    const int64_t channels = p.channels_1 + p.channels_2;
    const float *const scale = p.scale == nullptr ? nullptr : p.scale + n * channels, *const offset = p.scale == nullptr ? nullptr : p.offset + n * channels;
    for (int64_t r = first; r < last; ++r) {
        G* const out = band + (p.margin + r * p.row) * p.padded;
        const int64_t row = top + r - p.margin;
        clear(out + p.width * p.padded, (p.row - p.width) * p.padded);
        if (row < 0 || row >= p.height) {
            clear(out, p.width * p.padded);
            continue;
        }
        if (p.padded > channels) {
            for (int64_t i = 0; i < p.width; ++i) clear(out + i * p.padded + channels, p.padded - channels);
        }
        if (p.resample == Resample::up && row % 2 == 1 && r > first) {
            memcpy(static_cast<void*>(out), out - p.row * p.padded, static_cast<size_t>(p.width * p.padded) * sizeof(G));
            continue;
        }
        source_row<T, G, A>(p, static_cast<const T*>(p.x), p.pitch_x, p.channels_1, scale, offset, n, row, out);
        if (p.channels_2 == 0) continue;
        const float *const scale_2 = scale == nullptr ? nullptr : scale + p.channels_1, *const offset_2 = scale == nullptr ? nullptr : offset + p.channels_1;
        source_row<T, G, A>(p, static_cast<const T*>(p.x2), p.pitch_x2, p.channels_2, scale_2, offset_2, n, row, out + p.channels_1);
    }
}

template <typename T, typename G>
void fill(const Conv2dArguments& p, int64_t n, int64_t top, int64_t first, int64_t last, G* band) {
    switch (p.prologue) {
        case Activation::gelu: return fill_rows<T, G, Activation::gelu>(p, n, top, first, last, band);
        case Activation::silu: return fill_rows<T, G, Activation::silu>(p, n, top, first, last, band);
        case Activation::relu: return fill_rows<T, G, Activation::relu>(p, n, top, first, last, band);
        default: return fill_rows<T, G, Activation::none>(p, n, top, first, last, band);
    }
}

// What follows the sums, for consecutive pixels of a row; `c` (pixels, pitch) holds their sums and then what of y the moments see.
struct Run {
    int64_t n, row, column, pixels;  // the first pixel
    int64_t first, outputs;          // outputs [first, first + outputs)
    float* c;
    int64_t pitch;
};

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

// Outputs from `j` of the run on: bias, residual of y's size, y, moments. Chunks: sixteen outputs each, of which the first `count` exist.
template <typename T, bool Residual, bool Moments, int Chunks, bool Full>
DFE_HD void write_chunks(const Conv2dArguments& p, const Run& run, int64_t j) {
    const int count = Full ? WIDTH : static_cast<int>(run.outputs - j);
    const int64_t pixel = run.row * p.width + run.column, first = run.first + j, at = run.n * p.height * p.width + pixel;
    const bool biased = p.bias != nullptr && p.activation == Activation::none;
    const T* residual = Residual ? static_cast<const T*>(p.residual) + at * p.pitch_residual + first : nullptr;
    T* y = static_cast<T*>(p.y) + at * p.pitch_y + first;
    float* c = run.c + j;
    Floats term[Chunks], centre[Chunks], sum[Chunks], squares[Chunks];
    for (int k = 0; k < Chunks; ++k) {
        const float* const bias = biased ? p.bias + run.n * p.bias_pitch + first + k * WIDTH : nullptr;
        term[k] = !biased ? Floats{} : Full ? load_vector(bias) : load_some(bias, count);
        sum[k] = squares[k] = Floats{};
        if (Moments) {
            centre[k] = guess_of(run.pixels, [&](int64_t i) {
                const Floats value = load_vector(c + i * run.pitch + k * WIDTH) + term[k];
                if (!Residual) return value;
                const T* const from = residual + i * p.pitch_residual;
                return value + (Full ? load_vector(from + k * WIDTH) : load_some(from, count));
            });
        }
    }
    const T* const stored = y;
    for (int64_t i = 0; i < run.pixels; ++i, c += run.pitch, y += p.pitch_y) {
        for (int k = 0; k < Chunks; ++k) {
            Floats value = load_vector(c + k * WIDTH) + term[k];
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

template <typename T, bool Residual, bool Moments>
void write(const Conv2dArguments& p, const Run& run) {
    const int64_t pairs = run.outputs / (2 * WIDTH) * (2 * WIDTH), whole = run.outputs / WIDTH * WIDTH;
    for (int64_t j = 0; j < pairs; j += 2 * WIDTH) write_chunks<T, Residual, Moments, 2, true>(p, run, j);
    if (pairs < whole) write_chunks<T, Residual, Moments, 1, true>(p, run, pairs);
    if (whole < run.outputs) write_chunks<T, Residual, Moments, 1, false>(p, run, whole);
}

// The sums c of the band's pixels [start, last).
template <typename T>
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
        activate_run<T>(p, run);
        const bool plain = p.residual != nullptr && p.residual_resample == Resample::none;
        if (p.residual != nullptr && !plain) add_resampled<T>(p, run);
        if (plain) {
            (p.fused_moments ? write<T, true, true> : write<T, true, false>)(p, run);
        } else {
            (p.fused_moments ? write<T, false, true> : write<T, false, false>)(p, run);
        }
        at += pixels;
    }
}

template <typename T, typename G>
void items(const Conv2dArguments& p, int64_t begin, int64_t end, float* scratch) {
    float* const c = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    const int64_t sums = p.multiplier.most * p.multiplier.pixels * p.multiplier.outputs;
    G* const band = reinterpret_cast<G*>(c + 2 * sums);
    alignas(64) char state[STATE_BYTES];
    const int64_t halo = 2 * p.margin, block_size = p.runs * p.length * p.multiplier.outputs;
    if (p.multiplier.begin != nullptr) p.multiplier.begin(p.step, state);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t index = item % p.bands, n = item / p.bands % p.batch, split = item / p.bands / p.batch;
        const int64_t top = index * p.band_rows, rows = p.height - top < p.band_rows ? p.height - top : p.band_rows;
        const T* const from_x = static_cast<const T*>(p.x) + (n * p.height + top) * p.width * p.pitch_x;
        if (p.direct) {
            // nothing to prepare
        } else if (item > begin && index > 0) {  // the last rows of the band before are the first of this one
            memmove(static_cast<void*>(band), band + p.band_rows * p.row * p.padded, static_cast<size_t>((p.margin + halo * p.row) * p.padded) * sizeof(G));
            fill<T, G>(p, n, top, halo, rows + halo, band);
        } else {
            clear(band, p.margin * p.padded);
            fill<T, G>(p, n, top, 0, rows + halo, band);
        }
        const int64_t last = (rows - 1) * p.row + p.width, step = p.multiplier.pixels * p.multiplier.most;
        const int64_t from = split * p.split_blocks, to = from + p.split_blocks < p.blocks ? from + p.split_blocks : p.blocks;
        // A block's sums are finished while the next one's are made: the processor has products and vectors at work together.
        int64_t waiting = -1, waiting_stop = 0, waiting_block = 0, turn = 0;
        const auto finish_waiting = [&]() {
            if (waiting >= 0) finish<T>(p, n, top, waiting, waiting_stop, waiting_block, c + (turn ^ 1) * sums);
        };
        const auto run = [&](int64_t start, int64_t block) {
            const int64_t stop = start + step < last ? start + step : last, count = (stop - start + p.multiplier.pixels - 1) / p.multiplier.pixels;
            const G* const weights = static_cast<const G*>(p.weights) + block * block_size;
            const void* a = band + start * p.padded;
            int64_t pitch = p.padded;
            if (p.direct && (n * p.height + top) * p.width + start + count * p.multiplier.pixels <= p.batch * p.height * p.width) {
                a = from_x + start * p.pitch_x;
                pitch = p.pitch_x;
            } else if (p.direct) {  // the block would read past the end of x
                for (int64_t i = 0; i < stop - start; ++i) {
                    memcpy(static_cast<void*>(band + i * p.padded), from_x + (start + i) * p.pitch_x, static_cast<size_t>(p.padded) * sizeof(T));
                }
                a = band;
            }
            p.multiplier.block({a, pitch, p.starts, p.runs, p.length, weights, c + turn * sums, p.step, count});
            finish_waiting();
            waiting = start, waiting_stop = stop, waiting_block = block, turn ^= 1;
        };
        if (p.inner_blocks) {
            for (int64_t start = 0; start < last; start += step) {
                for (int64_t block = from; block < to; ++block) run(start, block);
            }
        } else {
            for (int64_t block = from; block < to; ++block) {
                for (int64_t start = 0; start < last; start += step) run(start, block);
            }
        }
        finish_waiting();
    }
    if (p.multiplier.end != nullptr) p.multiplier.end(state);
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

Multiplier float_multiplier(int64_t outputs) {
    constexpr int WIDE = LANES == 16 ? 2 * ROWS : ROWS;  // rows of a block of 16 outputs
    if (outputs == 32 && LANES == 16) return {float_block<ROWS, 2>, ROWS, 8, 32, nullptr, nullptr};
    return {float_block<WIDE, 16 / LANES>, WIDE, 96 / WIDE, 16, nullptr, nullptr};
}

Conv2dPasses conv2d_passes(const Conv2dArguments& p) {
    switch (p.type) {
        case FloatType::float16: return {items<half, float>, moments<half>};
        case FloatType::bfloat16: return {p.product == Product::float32 ? items<bfloat16, float> : items<bfloat16, bfloat16>, moments<bfloat16>};
        default: return {items<float, float>, moments<float>};
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
