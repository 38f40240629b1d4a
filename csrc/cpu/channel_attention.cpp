// The op `channel_attention` (formula: kernels/channel_attention.py). x is read to pool it, and then a few rows at a time: their maps, the spatial
// gate of the rows that have all their neighbours, and y of those rows, whose x is still in the cache.
#include "channel_attention.h"

#include "../common/channel_attention.h"
#include "isa.h"
#if defined(__AVX512F__)
#include "vector.h"
#endif

namespace dfe {
namespace DFE_ISA {
namespace {

constexpr int64_t LANES = 32;        // side by side in a sum over channels; GCC takes loops of up to 16 turns apart before it vectorises
constexpr int64_t POOL_PIXELS = 64;  // summed on their own, to keep the digits of a sum over many
constexpr int64_t POOL_AHEAD = 8;    // pixels that are fetched before their turn: processors lose track of four short rows side by side

void fill(float* DFE_RESTRICT values, int64_t count, float value) {
    for (int64_t i = 0; i < count; ++i) values[i] = value;
}

// Fetch what will be read soon.
void prefetch(const void* from, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
#endif
}

template <typename T>
void pool_four(const T* DFE_RESTRICT a, int64_t stride, int64_t count, float* DFE_RESTRICT sum, float* DFE_RESTRICT top) {
    const T *DFE_RESTRICT b = a + stride, *DFE_RESTRICT c = b + stride, *DFE_RESTRICT d = c + stride;
    for (int64_t i = 0; i < count; ++i) {
        const float va = load(a + i), vb = load(b + i), vc = load(c + i), vd = load(d + i);
        sum[i] += (va + vb) + (vc + vd);
        top[i] = dfe::larger(dfe::larger(dfe::larger(va, vb), dfe::larger(vc, vd)), top[i]);
    }
}

template <typename T>
void pool_one(const T* DFE_RESTRICT a, int64_t count, float* DFE_RESTRICT sum, float* DFE_RESTRICT top) {
    for (int64_t i = 0; i < count; ++i) {
        const float value = load(a + i);
        sum[i] += value;
        top[i] = dfe::larger(value, top[i]);
    }
}

template <typename T>
void pool(const ChannelAttentionArguments& p, int64_t n, int64_t begin, int64_t end, float* scratch) {
    const int64_t count = end - begin, pixels = p.height * p.width;
    const T* const x = static_cast<const T*>(p.x) + n * pixels * p.x_stride + begin;
    float *const total = p.pooled + n * 2 * p.channels + begin, *const top = total + p.channels;
    fill(total, count, 0.0f);
    fill(top, count, lowest());
    for (int64_t first = 0; first < pixels; first += POOL_PIXELS) {
        const int64_t after = pixels - first < POOL_PIXELS ? pixels : first + POOL_PIXELS;
        fill(scratch, count, 0.0f);
        int64_t pixel = first;
        for (; pixel + 4 <= after; pixel += 4) {
            for (int64_t ahead = pixel + POOL_AHEAD; ahead < pixel + POOL_AHEAD + 4 && ahead < pixels; ++ahead) {
                prefetch(x + ahead * p.x_stride, count * static_cast<int64_t>(sizeof(T)));
            }
            pool_four(x + pixel * p.x_stride, p.x_stride, count, scratch, top);
        }
        for (; pixel < after; ++pixel) pool_one(x + pixel * p.x_stride, count, scratch, top);
        for (int64_t c = 0; c < count; ++c) total[c] += scratch[c];
    }
}

// Fold the sums and the other sums, or maxima, of 2 * Width lanes into the first.
template <int64_t Width, bool Maxima>
inline void fold(float* DFE_RESTRICT sums, float* DFE_RESTRICT others) {
    for (int64_t l = 0; l < Width; ++l) {
        sums[l] += sums[l + Width];
        others[l] = Maxima ? dfe::larger(others[l], others[l + Width]) : others[l] + others[l + Width];
    }
    if constexpr (Width > 1) fold<Width / 2, Maxima>(sums, others);
}

// The sums of a * w and b * w.
void two_products(const float* DFE_RESTRICT a, const float* DFE_RESTRICT b, const float* DFE_RESTRICT w, int64_t count, float* DFE_RESTRICT of_a,
                  float* DFE_RESTRICT of_b) {
    float lanes_a[LANES] = {}, lanes_b[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        for (int64_t l = 0; l < LANES; ++l) {
            lanes_a[l] += a[i + l] * w[i + l];
            lanes_b[l] += b[i + l] * w[i + l];
        }
    }
    for (int64_t l = 0; i + l < count; ++l) {
        lanes_a[l] += a[i + l] * w[i + l];
        lanes_b[l] += b[i + l] * w[i + l];
    }
    fold<LANES / 2, false>(lanes_a, lanes_b);
    *of_a = lanes_a[0];
    *of_b = lanes_b[0];
}

// gate += the sum of the hidden values times rows of w2, four rows at a time.
void add_rows(const float* DFE_RESTRICT hidden, const float* DFE_RESTRICT w2, int64_t rows, int64_t channels, float* DFE_RESTRICT gate) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const float *DFE_RESTRICT a = w2 + r * channels, *DFE_RESTRICT b = a + channels, *DFE_RESTRICT c = b + channels, *DFE_RESTRICT d = c + channels;
        const float ha = hidden[r], hb = hidden[r + 1], hc = hidden[r + 2], hd = hidden[r + 3];
        for (int64_t i = 0; i < channels; ++i) gate[i] += (ha * a[i] + hb * b[i]) + (hc * c[i] + hd * d[i]);
    }
    for (; r < rows; ++r) {
        const float* DFE_RESTRICT a = w2 + r * channels;
        const float h = hidden[r];
        for (int64_t i = 0; i < channels; ++i) gate[i] += h * a[i];
    }
}

void make_gate(const ChannelAttentionArguments& p, int64_t n, float* scratch) {
    const int64_t channels = p.channels;
    float *const gate = p.gate + n * channels, *const average = scratch;
    float *DFE_RESTRICT const hidden = scratch + channels, *DFE_RESTRICT const of_top = hidden + p.hidden;
    if (p.w1 == nullptr) return fill(gate, channels, 1.0f);
    const float* const sums = p.pooled + n * 2 * channels;
    const float share = 1.0f / static_cast<float>(p.height * p.width);
    for (int64_t c = 0; c < channels; ++c) average[c] = sums[c] * share;
    for (int64_t r = 0; r < p.hidden; ++r) {
        two_products(average, sums + channels, p.w1 + r * channels, channels, hidden + r, of_top + r);
    }
    for (int64_t r = 0; r < p.hidden; ++r) hidden[r] = dfe::activated<Activation::gelu>(hidden[r]) + dfe::activated<Activation::gelu>(of_top[r]);
    fill(gate, channels, 0.0f);
    add_rows(hidden, p.w2, p.hidden, channels, gate);
    for (int64_t c = 0; c < channels; ++c) gate[c] = sigmoid(gate[c]);
}

#if defined(__AVX512F__)
constexpr int64_t MAPPED = 4;  // pixels side by side, so that no sum waits for the one before

// The sums, or maxima, of the sixteen lanes of four vectors.
template <bool Maxima>
inline __m128 folded(const __m512* values) {
    const auto join = [](auto a, auto b) {
        if constexpr (sizeof(a) == 64) return Maxima ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b);
        else return Maxima ? _mm_max_ps(a, b) : _mm_add_ps(a, b);
    };
    // Quarters of two vectors to one of each other, twice: quarter k of the result belongs to vector k.
    const __m512 first = join(_mm512_shuffle_f32x4(values[0], values[1], 0x44), _mm512_shuffle_f32x4(values[0], values[1], 0xee));
    const __m512 second = join(_mm512_shuffle_f32x4(values[2], values[3], 0x44), _mm512_shuffle_f32x4(values[2], values[3], 0xee));
    const __m512 all = join(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
    __m128 a = _mm512_castps512_ps128(all), b = _mm512_extractf32x4_ps(all, 1), c = _mm512_extractf32x4_ps(all, 2), d = _mm512_extractf32x4_ps(all, 3);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    return join(join(a, b), join(c, d));
}

// The means and maxima over the channels of x * gate of `count` pixels.
template <typename T>
void map_pixels(const T* x, int64_t stride, const float* gate, int64_t channels, int64_t count, float* means, float* tops) {
    const __m128 size = _mm_set1_ps(static_cast<float>(channels));
    for (int64_t i = 0; i < count; i += MAPPED) {
        const int64_t left = count - i < MAPPED ? count - i : MAPPED;
        const T* from[MAPPED];  // the last pixel again, where there are not so many
        __m512 sum[MAPPED], top[MAPPED];
        for (int64_t k = 0; k < MAPPED; ++k) {
            from[k] = x + (i + (k < left ? k : left - 1)) * stride;
            sum[k] = _mm512_setzero_ps(), top[k] = _mm512_set1_ps(lowest());
        }
        int64_t c = 0;
        for (; c + WIDTH <= channels; c += WIDTH) {
            const __m512 g = _mm512_loadu_ps(gate + c);
            for (int64_t k = 0; k < MAPPED; ++k) {
                const __m512 u = _mm512_mul_ps(load_vector(from[k] + c), g);
                sum[k] = _mm512_add_ps(sum[k], u), top[k] = _mm512_max_ps(u, top[k]);
            }
        }
        if (c < channels) {
            const __mmask16 mask = mask_of(channels - c);
            const __m512 g = _mm512_maskz_loadu_ps(mask, gate + c);
            for (int64_t k = 0; k < MAPPED; ++k) {
                const __m512 u = _mm512_mul_ps(load_masked(from[k] + c, mask), g);
                sum[k] = _mm512_add_ps(sum[k], u), top[k] = _mm512_mask_max_ps(top[k], mask, u, top[k]);
            }
        }
        const __mmask8 these = static_cast<__mmask8>((1u << left) - 1u);
        _mm_mask_storeu_ps(means + i, these, _mm_div_ps(folded<false>(sum), size));
        _mm_mask_storeu_ps(tops + i, these, folded<true>(top));
    }
}

template <typename T, bool Residual>
void write_pixel(const T* x, const float* gate, float s, const T* residual, int64_t channels, T* y) {
    const __m512 share = _mm512_set1_ps(s);
    int64_t c = 0;
    for (; c + 2 * WIDTH <= channels; c += 2 * WIDTH) {
        __m512 low = _mm512_mul_ps(_mm512_mul_ps(load_vector(x + c), _mm512_loadu_ps(gate + c)), share);
        __m512 high = _mm512_mul_ps(_mm512_mul_ps(load_vector(x + c + WIDTH), _mm512_loadu_ps(gate + c + WIDTH)), share);
        if (Residual) low = _mm512_add_ps(low, load_vector(residual + c)), high = _mm512_add_ps(high, load_vector(residual + c + WIDTH));
        store_two(y + c, low, high);
    }
    for (; c < channels; c += WIDTH) {
        const __mmask16 mask = mask_of(channels - c);
        __m512 value = _mm512_mul_ps(_mm512_mul_ps(load_masked(x + c, mask), _mm512_maskz_loadu_ps(mask, gate + c)), share);
        if (Residual) value = _mm512_add_ps(value, load_masked(residual + c, mask));
        store_masked(y + c, value, mask);
    }
}
#else
// The mean and maximum over the channels of x * gate at a pixel.
template <typename T>
void map_pixel(const T* DFE_RESTRICT x, const float* DFE_RESTRICT gate, int64_t channels, float* DFE_RESTRICT mean, float* DFE_RESTRICT top) {
    float sums[LANES] = {}, tops[LANES];
    for (int64_t l = 0; l < LANES; ++l) tops[l] = lowest();
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
        for (int64_t l = 0; l < LANES; ++l) {
            const float u = load(x + c + l) * gate[c + l];
            sums[l] += u;
            tops[l] = dfe::larger(u, tops[l]);
        }
    }
    for (int64_t l = 0; c + l < channels; ++l) {
        const float u = load(x + c + l) * gate[c + l];
        sums[l] += u;
        tops[l] = dfe::larger(u, tops[l]);
    }
    fold<LANES / 2, true>(sums, tops);
    *mean = sums[0] / static_cast<float>(channels);
    *top = tops[0];
}

template <typename T>
void map_pixels(const T* x, int64_t stride, const float* gate, int64_t channels, int64_t count, float* means, float* tops) {
    for (int64_t i = 0; i < count; ++i) map_pixel(x + i * stride, gate, channels, means + i, tops + i);
}

// One copy of it: another could round differently.
template <typename T, bool Residual>
DFE_NOINLINE void write_pixel(const T* DFE_RESTRICT x, const float* DFE_RESTRICT gate, float s, const T* DFE_RESTRICT residual, int64_t channels,
                 T* DFE_RESTRICT y) {
    for (int64_t c = 0; c < channels; ++c) store(y + c, load(x + c) * gate[c] * s + (Residual ? load(residual + c) : 0.0f));
}
#endif

// s for the `count` values from one of a plane on: those between two rows of the image come out too, and are not used.
void spatial_gate(const ChannelAttentionArguments& p, const float* DFE_RESTRICT means, const float* DFE_RESTRICT tops, int64_t count,
                  float* DFE_RESTRICT s) {
    fill(s, count, p.spatial_bias[0]);
    for (int64_t dy = 0; dy < SPATIAL_SIZE; ++dy) {
        const float* const weight = p.spatial_weight + dy * 2 * SPATIAL_SIZE;
        float w[2 * SPATIAL_SIZE];
        for (int64_t i = 0; i < 2 * SPATIAL_SIZE; ++i) w[i] = weight[i];
        const float *DFE_RESTRICT mean = means + dy * p.pitch, *DFE_RESTRICT top = tops + dy * p.pitch;
        for (int64_t i = 0; i < count; ++i) {
            s[i] += w[0] * mean[i] + w[1] * top[i] + w[2] * mean[i + 1] + w[3] * top[i + 1] + w[4] * mean[i + 2] + w[5] * top[i + 2] +
                    w[6] * mean[i + 3] + w[7] * top[i + 3] + w[8] * mean[i + 4] + w[9] * top[i + 4] + w[10] * mean[i + 5] +
                    w[11] * top[i + 5] + w[12] * mean[i + 6] + w[13] * top[i + 6];
        }
    }
    for (int64_t i = 0; i < count; ++i) s[i] = sigmoid(s[i]);
}

template <typename T, bool Residual>
void apply(const ChannelAttentionArguments& p, int64_t n, int64_t begin, int64_t end, float* scratch) {
    const int64_t width = p.width, channels = p.channels, rows = end - begin + 2 * SPATIAL_REACH;
    const int64_t row_bytes = channels * static_cast<int64_t>(sizeof(T));
    float *const means = scratch, *const tops = scratch + rows * p.pitch, *const s = tops + rows * p.pitch;
    T* const staged = reinterpret_cast<T*>(s + p.step_rows * p.pitch);
    const float* const gate = p.gate + n * channels;
    const int64_t origin = n * p.height * width;
    const T* const x = static_cast<const T*>(p.x) + origin * p.x_stride;
    const T* const residual = static_cast<const T*>(p.residual) + (Residual ? origin * p.residual_stride : 0);
    T* const y = static_cast<T*>(p.y) + origin * p.y_stride;
    const bool spatial = p.spatial_weight != nullptr;
    if (spatial) fill(means, 2 * rows * p.pitch, 0.0f);
    else fill(s, p.step_rows * p.pitch, 1.0f);

    int64_t mapped = begin > SPATIAL_REACH ? begin - SPATIAL_REACH : 0;
    for (int64_t row = begin; row < end; row += p.step_rows) {
        const int64_t after = end - row < p.step_rows ? end : row + p.step_rows;
        if (spatial) {
            const int64_t needed = after + SPATIAL_REACH < p.height ? after + SPATIAL_REACH : p.height;
            for (; mapped < needed; ++mapped) {
                const int64_t at = (mapped - begin + SPATIAL_REACH) * p.pitch + SPATIAL_REACH;
                const T* const from = x + mapped * width * p.x_stride;
                map_pixels(from, p.x_stride, gate, channels, width, means + at, tops + at);
            }
            const int64_t from = (row - begin) * p.pitch;
            spatial_gate(p, means + from, tops + from, (after - row) * p.pitch - 2 * SPATIAL_REACH, s);
        }
        for (int64_t at = row; at < after; ++at) {
            for (int64_t i = 0; i < width; ++i) {
                const int64_t pixel = at * width + i;
                T* const to = p.stream ? staged : y + pixel * p.y_stride;
                write_pixel<T, Residual>(x + pixel * p.x_stride, gate, s[(at - row) * p.pitch + i], residual + pixel * p.residual_stride,
                                         channels, to);
                if (p.stream) stream_copy(y + pixel * p.y_stride, staged, row_bytes);
            }
        }
    }
    if (p.stream) stream_fence();
}

template <typename T>
ChannelAttentionPasses passes(const ChannelAttentionArguments& p) {
    return {pool<T>, make_gate, p.residual == nullptr ? apply<T, false> : apply<T, true>};
}

}  // namespace

ChannelAttentionPasses channel_attention(const ChannelAttentionArguments& p) {
    switch (p.type) {
        case FloatType::float16: return passes<half>(p);
        case FloatType::bfloat16: return passes<bfloat16>(p);
        default: return passes<float>(p);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
