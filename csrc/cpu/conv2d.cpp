// The op `conv2d` (csrc/cpu/conv2d.h): the band's input, the product in float32, and what follows the sums.
#include "conv2d.h"

#include "isa.h"

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

#if defined(__GNUC__)
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define DFE_UNROLL _Pragma("GCC unroll 32")
#else
struct Vector {
    float lanes[LANES];
    Vector& operator+=(const Vector& other) {
        for (int l = 0; l < LANES; ++l) lanes[l] += other.lanes[l];
        return *this;
    }
};
inline Vector operator*(float value, Vector vector) {
    for (int l = 0; l < LANES; ++l) vector.lanes[l] *= value;
    return vector;
}
#define DFE_UNROLL
#endif

template <int Rows, int Vectors>
void float_block(const BlockArguments& p) {
    const float* DFE_RESTRICT b = static_cast<const float*>(p.b);
    const int64_t pitch = p.pitch;
    Vector sums[Rows][Vectors] = {};
    for (int64_t r = 0; r < p.runs; ++r) {
        const float* a = static_cast<const float*>(p.a) + p.starts[r];
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
        for (int j = 0; j < Vectors; ++j) *reinterpret_cast<Vector*>(p.c + (i * Vectors + j) * LANES) = sums[i][j];
    }
}

constexpr int CHUNK = 16;  // values to a step of the loops below: a whole number of vectors

template <typename T>
DFE_HD float rounded(float value) {
    T result;
    store(&result, value);
    return load(&result);
}

template <Activation A>
DFE_HD float finished(float z) {
    if (static_cast<int>(A) == SIGMOID) {
        const float e = exp_of_negative(-magnitude_of(z));
        return (z > 0.0f ? 1.0f : e) / (1.0f + e);
    }
    return activated<A>(z);
}

// out = act(scale x + offset), for `count` channels; scale may be null.
template <typename T, typename G, Activation A>
DFE_HD void apply_chunk(const T* DFE_RESTRICT x, const float* DFE_RESTRICT scale, const float* DFE_RESTRICT offset, int count, G* DFE_RESTRICT out) {
    if (scale == nullptr) {
        for (int c = 0; c < count; ++c) store(out + c, activated<A>(load(x + c)));
    } else {
        for (int c = 0; c < count; ++c) store(out + c, activated<A>(load(x + c) * scale[c] + offset[c]));
    }
}

template <typename T, typename G, Activation A>
void apply(const T* x, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset, G* out, int64_t out_pitch) {
    const int64_t whole = channels / CHUNK * CHUNK;
    for (int64_t i = 0; i < pixels; ++i, x += pitch, out += out_pitch) {
        if (scale == nullptr) {
            for (int64_t c = 0; c < whole; c += CHUNK) apply_chunk<T, G, A>(x + c, nullptr, nullptr, CHUNK, out + c);
            if (whole < channels) apply_chunk<T, G, A>(x + whole, nullptr, nullptr, static_cast<int>(channels - whole), out + whole);
        } else {
            for (int64_t c = 0; c < whole; c += CHUNK) apply_chunk<T, G, A>(x + c, scale + c, offset + c, CHUNK, out + c);
            if (whole < channels) {
                apply_chunk<T, G, A>(x + whole, scale + whole, offset + whole, static_cast<int>(channels - whole), out + whole);
            }
        }
    }
}

// The mean of act(scale x + offset) over 2 x 2 pixels: rows x and x + below, `pixels` results.
template <typename T, typename G, Activation A>
void apply_mean(const T* x, int64_t below, int64_t pixels, int64_t pitch, int64_t channels, const float* scale, const float* offset, G* out,
                int64_t out_pitch) {
    for (int64_t i = 0; i < pixels; ++i, x += 2 * pitch, out += out_pitch) {
        const int64_t places[4] = {0, pitch, below, below + pitch};
        for (int64_t first = 0; first < channels; first += CHUNK) {
            const int count = static_cast<int>(channels - first < CHUNK ? channels - first : CHUNK);
            float sum[CHUNK] = {}, value[CHUNK];
            for (int64_t place : places) {
                const T* const from = x + place + first;
                if (scale == nullptr) {
                    apply_chunk<T, float, A>(from, nullptr, nullptr, count, value);
                } else {
                    apply_chunk<T, float, A>(from, scale + first, offset + first, count, value);
                }
                for (int c = 0; c < count; ++c) sum[c] += value[c];
            }
            for (int c = 0; c < count; ++c) store(out + first + c, 0.25f * sum[c]);
        }
    }
}

template <typename G>
void clear(G* out, int64_t count) {
    memset(static_cast<void*>(out), 0, static_cast<size_t>(count) * sizeof(G));
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
            memcpy(out + (i + 1) * p.padded, out + i * p.padded, static_cast<size_t>(channels) * sizeof(G));
        }
        return;
    }
    const T* const from = x + (n * p.height + row) * p.width * pitch;
    if (same<T, G>() && A == Activation::none && scale == nullptr) {
        const bool packed = pitch == channels && p.padded == channels;
        const int64_t pieces = packed ? 1 : p.width, size = packed ? p.width * channels : channels;
        for (int64_t i = 0; i < pieces; ++i) memcpy(out + i * p.padded, from + i * pitch, static_cast<size_t>(size) * sizeof(G));
        return;
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

template <Activation A>
DFE_HD void activate_chunk(float* DFE_RESTRICT c, const float* DFE_RESTRICT bias, int count) {
    for (int j = 0; j < count; ++j) c[j] = finished<A>(c[j] + bias[j]);
}

template <Activation A>
void activate(const Conv2dArguments& p, const Run& run) {
    static const float zeros[CHUNK] = {};
    const float* const bias = p.bias == nullptr ? nullptr : p.bias + run.n * p.bias_pitch + run.first;
    for (int64_t j = 0; j < run.outputs; j += CHUNK) {
        const float* const from = bias == nullptr ? zeros : bias + j;
        if (run.outputs - j >= CHUNK) {
            for (int64_t i = 0; i < run.pixels; ++i) activate_chunk<A>(run.c + i * run.pitch + j, from, CHUNK);
        } else {
            for (int64_t i = 0; i < run.pixels; ++i) activate_chunk<A>(run.c + i * run.pitch + j, from, static_cast<int>(run.outputs - j));
        }
    }
}

void activate_run(const Conv2dArguments& p, const Run& run) {
    switch (static_cast<int>(p.activation)) {
        case static_cast<int>(Activation::gelu): return activate<Activation::gelu>(p, run);
        case static_cast<int>(Activation::silu): return activate<Activation::silu>(p, run);
        case static_cast<int>(Activation::relu): return activate<Activation::relu>(p, run);
        case SIGMOID: return activate<static_cast<Activation>(SIGMOID)>(p, run);
        default:
            if (p.bias != nullptr) activate<Activation::none>(p, run);
    }
}

template <typename T>
DFE_HD void add_chunk(float* DFE_RESTRICT c, const T* DFE_RESTRICT residual, float share, int count) {
    for (int j = 0; j < count; ++j) c[j] += share * load(residual + j);
}

template <typename T>
void add_pixel(float* c, const T* residual, float share, int64_t count) {
    const int64_t whole = count / CHUNK * CHUNK;
    for (int64_t j = 0; j < whole; j += CHUNK) add_chunk(c + j, residual + j, share, CHUNK);
    if (whole < count) add_chunk(c + whole, residual + whole, share, static_cast<int>(count - whole));
}

template <typename T>
void add_residual(const Conv2dArguments& p, const Run& run) {
    const T* const residual = static_cast<const T*>(p.residual) + run.first;
    const int64_t pitch = p.pitch_residual;
    for (int64_t i = 0; i < run.pixels; ++i) {
        float* const c = run.c + i * run.pitch;
        const int64_t column = run.column + i;
        if (p.residual_resample == Resample::none) {
            add_pixel(c, residual + ((run.n * p.height + run.row) * p.width + column) * pitch, 1.0f, run.outputs);
        } else if (p.residual_resample == Resample::up) {
            add_pixel(c, residual + ((run.n * (p.height / 2) + run.row / 2) * (p.width / 2) + column / 2) * pitch, 1.0f, run.outputs);
        } else {
            const T* const from = residual + ((run.n * 2 * p.height + 2 * run.row) * 2 * p.width + 2 * column) * pitch;
            const int64_t places[4] = {0, pitch, 2 * p.width * pitch, 2 * p.width * pitch + pitch};
            for (int64_t place : places) add_pixel(c, from + place, 0.25f, run.outputs);
        }
    }
}

template <typename T, bool Keep>
DFE_HD void write_chunk(float* DFE_RESTRICT c, T* DFE_RESTRICT y, int count) {
    for (int j = 0; j < count; ++j) {
        store(y + j, c[j]);
        if (Keep) c[j] = rounded<T>(c[j]);
    }
}

template <typename T, bool Keep>
void write(const Conv2dArguments& p, const Run& run) {
    T* const y = static_cast<T*>(p.y) + ((run.n * p.height + run.row) * p.width + run.column) * p.pitch_y + run.first;
    const int64_t whole = run.outputs / CHUNK * CHUNK;
    for (int64_t i = 0; i < run.pixels; ++i) {
        float* const c = run.c + i * run.pitch;
        for (int64_t j = 0; j < whole; j += CHUNK) write_chunk<T, Keep>(c + j, y + i * p.pitch_y + j, CHUNK);
        if (whole < run.outputs) write_chunk<T, Keep>(c + whole, y + i * p.pitch_y + whole, static_cast<int>(run.outputs - whole));
    }
}

// Merge mean and squared differences of `pixels` values, given as they lie in c, into those of the `before` values before them in their tile
// (Chan, Golub and LeVeque 1979).
DFE_HD void merge_chunk(const float* DFE_RESTRICT c, int64_t pixels, int64_t pitch, int64_t before, float* DFE_RESTRICT mean, float* DFE_RESTRICT m2,
                        int count) {
    float centre[CHUNK] = {}, squares[CHUNK] = {};
    for (int64_t i = 0; i < pixels; ++i) {
        for (int j = 0; j < count; ++j) centre[j] += c[i * pitch + j];
    }
    const float each = 1.0f / static_cast<float>(pixels);
    for (int j = 0; j < count; ++j) centre[j] *= each;
    for (int64_t i = 0; i < pixels; ++i) {
        for (int j = 0; j < count; ++j) {
            const float d = c[i * pitch + j] - centre[j];
            squares[j] += d * d;
        }
    }
    if (before == 0) {
        for (int j = 0; j < count; ++j) {
            mean[j] = centre[j];
            m2[j] = squares[j];
        }
        return;
    }
    const float share = static_cast<float>(pixels) / static_cast<float>(before + pixels), spread = static_cast<float>(before) * share;
    for (int j = 0; j < count; ++j) {
        const float d = centre[j] - mean[j];
        mean[j] += d * share;
        m2[j] += squares[j] + d * d * spread;
    }
}

// Values c (pixels, pitch) of outputs [first, first + outputs) at pixel `pixel` of sample n, into its tile's moments.
void add_moments(const Conv2dArguments& p, int64_t n, int64_t pixel, int64_t pixels, int64_t first, int64_t outputs, const float* c, int64_t pitch) {
    const int64_t tiles = (p.height * p.width + p.tile_pixels - 1) / p.tile_pixels;
    float* const mean = p.moments + (n * tiles + pixel / p.tile_pixels) * 2 * p.outputs + first;
    for (int64_t j = 0; j < outputs; j += CHUNK) {
        if (outputs - j >= CHUNK) {
            merge_chunk(c + j, pixels, pitch, pixel % p.tile_pixels, mean + j, mean + p.outputs + j, CHUNK);
        } else {
            merge_chunk(c + j, pixels, pitch, pixel % p.tile_pixels, mean + j, mean + p.outputs + j, static_cast<int>(outputs - j));
        }
    }
}

// The sums c of the block of pixels that starts at `start` in the band, `end` being where the band's results end.
template <typename T>
void finish(const Conv2dArguments& p, int64_t n, int64_t top, int64_t start, int64_t end, int64_t block, float* c) {
    const int64_t pitch = p.multiplier.outputs, first = block * pitch;
    const int64_t outputs = p.outputs - first < pitch ? p.outputs - first : pitch;
    const int64_t last = start + p.multiplier.pixels < end ? start + p.multiplier.pixels : end;
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
        activate_run(p, run);
        if (p.residual != nullptr) add_residual<T>(p, run);
        if (p.fused_moments) {
            write<T, true>(p, run);
            add_moments(p, n, pixel, pixels, first, outputs, run.c, pitch);
        } else {
            write<T, false>(p, run);
        }
        at += pixels;
    }
}

template <typename T, typename G>
void items(const Conv2dArguments& p, int64_t begin, int64_t end, float* scratch) {
    float* const c = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    G* const band = reinterpret_cast<G*>(c + p.multiplier.pixels * p.multiplier.outputs);
    alignas(64) char state[STATE_BYTES];
    const int64_t halo = 2 * p.margin, block_size = p.runs * p.length * p.multiplier.outputs;
    if (p.multiplier.begin != nullptr) p.multiplier.begin(p.step, state);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t index = item % p.bands, n = item / p.bands % p.batch, split = item / p.bands / p.batch;
        const int64_t top = index * p.band_rows, rows = p.height - top < p.band_rows ? p.height - top : p.band_rows;
        if (item > begin && index > 0) {  // the last rows of the band before are the first of this one
            memmove(static_cast<void*>(band), band + p.band_rows * p.row * p.padded, static_cast<size_t>((p.margin + halo * p.row) * p.padded) * sizeof(G));
            fill<T, G>(p, n, top, halo, rows + halo, band);
        } else {
            clear(band, p.margin * p.padded);
            fill<T, G>(p, n, top, 0, rows + halo, band);
        }
        const int64_t last = (rows - 1) * p.row + p.width, pixels = p.multiplier.pixels;
        const int64_t from = split * p.split_blocks, to = from + p.split_blocks < p.blocks ? from + p.split_blocks : p.blocks;
        const auto run = [&](int64_t start, int64_t block) {
            p.multiplier.block({band + start * p.padded, p.padded, p.starts, p.runs, p.length, static_cast<const G*>(p.weights) + block * block_size, c, p.step});
            finish<T>(p, n, top, start, last, block, c);
        };
        if (p.inner_blocks) {
            for (int64_t start = 0; start < last; start += pixels) {
                for (int64_t block = from; block < to; ++block) run(start, block);
            }
        } else {
            for (int64_t block = from; block < to; ++block) {
                for (int64_t start = 0; start < last; start += pixels) run(start, block);
            }
        }
    }
    if (p.multiplier.end != nullptr) p.multiplier.end(state);
}

template <typename T>
void moments(const Conv2dArguments& p, int64_t begin, int64_t end) {
    const int64_t size = p.height * p.width, tiles = (size + p.tile_pixels - 1) / p.tile_pixels;
    constexpr int64_t STEP = 64;
    float values[STEP * CHUNK];
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t n = tile / tiles, from = tile % tiles * p.tile_pixels, to = from + p.tile_pixels < size ? from + p.tile_pixels : size;
        for (int64_t pixel = from; pixel < to; pixel += STEP) {
            const int64_t pixels = to - pixel < STEP ? to - pixel : STEP;
            for (int64_t first = 0; first < p.outputs; first += CHUNK) {
                const int count = static_cast<int>(p.outputs - first < CHUNK ? p.outputs - first : CHUNK);
                for (int64_t i = 0; i < pixels; ++i) {
                    const T* const y = static_cast<const T*>(p.y) + (n * size + pixel + i) * p.pitch_y + first;
                    for (int j = 0; j < count; ++j) values[i * CHUNK + j] = load(y + j);
                }
                add_moments(p, n, pixel, pixels, first, count, values, CHUNK);
            }
        }
    }
}

}  // namespace

Multiplier float_multiplier(int64_t outputs) {
    if (outputs == 32 && LANES >= 16) return {float_block<ROWS, 32 / LANES>, ROWS, 32, nullptr, nullptr};
    return {float_block<LANES == 16 ? 2 * ROWS : ROWS, 16 / LANES>, LANES == 16 ? 2 * ROWS : ROWS, 16, nullptr, nullptr};
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
