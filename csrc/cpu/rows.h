// Loops along rows of `lanes` values, lane l belonging to channel l % channels, that the norms share: sums down the rows of a chunk, and the
// affine map with the activation. In AVX-512 they are written out: the compiler would keep the sums in memory and spill around the GELU.
#pragma once

#include "../common/activation.h"
#include "../common/convert.h"
#include "isa.h"
#if defined(__AVX512F__)
#include "vector.h"
#endif

namespace dfe {
namespace DFE_ISA {

// Add up the lanes of each channel.
static inline void fold(const float* DFE_RESTRICT lanes, int64_t count, int64_t channels, float* DFE_RESTRICT sums) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = lanes[c];
    for (int64_t l = channels; l < count; l += channels) {
        for (int64_t c = 0; c < channels; ++c) sums[c] += lanes[l + c];
    }
}

// Repeat the values of the channels along the lanes after them.
static inline void spread(float* DFE_RESTRICT lanes, int64_t count, int64_t channels) {
    for (int64_t l = channels; l < count; ++l) lanes[l] = lanes[l - channels];
}

// Bring `count` values that will be read from x and written to y, either of them null, into the second-level cache; any address will do.
template <typename T>
inline void fetch_ahead([[maybe_unused]] const T* x, [[maybe_unused]] const T* y, [[maybe_unused]] int64_t count) {
#if defined(__AVX512F__)
    for (int64_t at = 0; at < count; at += 64 / static_cast<int64_t>(sizeof(T))) {
        if (x != nullptr) __builtin_prefetch(x + at, 0, 2);
        if (y != nullptr) __builtin_prefetch(y + at, 1, 2);
    }
#endif
}

static inline void clear(float* DFE_RESTRICT values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = 0.0f;
}

#if defined(__AVX512F__)

constexpr int64_t COLUMN = 8;  // vectors whose sums stay in registers down the rows

// Sums over a row of column `x` of vectors; `masks` are of the lanes that count, where Masked.
template <bool Masked, typename T>
inline void add_column(const T* x, const __mmask16* masks, __m512* sum) {
    for (int64_t k = 0; k < COLUMN; ++k) sum[k] = _mm512_add_ps(sum[k], Masked ? load_masked(x + 16 * k, masks[k]) : load_vector(x + 16 * k));
}

template <bool Masked, typename T>
inline void add_column_centred(const T* x, const __mmask16* masks, const __m512* centre, __m512* sum, __m512* squares) {
    for (int64_t k = 0; k < COLUMN; ++k) {
        const __m512 u = Masked ? load_masked(x + 16 * k, masks[k]) : load_vector(x + 16 * k);
        const __m512 d = Masked ? _mm512_maskz_sub_ps(masks[k], u, centre[k]) : _mm512_sub_ps(u, centre[k]);
        sum[k] = _mm512_add_ps(sum[k], d);
        squares[k] = _mm512_fmadd_ps(d, d, squares[k]);
    }
}

// sum[l] over `rows` rows of `lanes` values, `stride` apart; the last row has only `last` values.
template <typename T>
void add_rows(const T* x, int64_t rows, int64_t stride, int64_t lanes, int64_t last, float* sum) {
    for (int64_t l = 0; l < lanes; l += 16 * COLUMN) {
        __mmask16 all[COLUMN], final[COLUMN];
        __m512 sums[COLUMN];
        for (int64_t k = 0; k < COLUMN; ++k) {
            all[k] = mask_of(lanes - l - 16 * k), final[k] = mask_of(last - l - 16 * k);
            sums[k] = _mm512_setzero_ps();
        }
        if (lanes - l >= 16 * COLUMN) {
            for (int64_t r = 0; r < rows - 1; ++r) add_column<false>(x + r * stride + l, all, sums);
        } else {
            for (int64_t r = 0; r < rows - 1; ++r) add_column<true>(x + r * stride + l, all, sums);
        }
        add_column<true>(x + (rows - 1) * stride + l, final, sums);
        for (int64_t k = 0; k < COLUMN; ++k) _mm512_mask_storeu_ps(sum + l + 16 * k, all[k], sums[k]);
    }
}

// Sums of (x - centre) and (x - centre)^2, likewise; `ahead` elements further the next chunk is fetched into the second-level cache meanwhile.
template <typename T>
void add_rows_centred(const T* x, int64_t rows, int64_t stride, int64_t lanes, int64_t last, int64_t ahead, const float* centre, float* sum,
                      float* squares) {
    for (int64_t l = 0; l < lanes; l += 16 * COLUMN) {
        __mmask16 all[COLUMN], final[COLUMN];
        __m512 sums[COLUMN], square_sums[COLUMN], centres[COLUMN];
        for (int64_t k = 0; k < COLUMN; ++k) {
            all[k] = mask_of(lanes - l - 16 * k), final[k] = mask_of(last - l - 16 * k);
            sums[k] = square_sums[k] = _mm512_setzero_ps();
            centres[k] = _mm512_maskz_loadu_ps(all[k], centre + l + 16 * k);
        }
        if (lanes - l >= 16 * COLUMN) {
            for (int64_t r = 0; r < rows - 1; ++r) {
                const T* const row = x + r * stride + l;
                for (int64_t at = 0; at < 16 * COLUMN; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + ahead + at, 0, 2);
                add_column_centred<false>(row, all, centres, sums, square_sums);
            }
        } else {
            for (int64_t r = 0; r < rows - 1; ++r) add_column_centred<true>(x + r * stride + l, all, centres, sums, square_sums);
        }
        add_column_centred<true>(x + (rows - 1) * stride + l, final, centres, sums, square_sums);
        for (int64_t k = 0; k < COLUMN; ++k) {
            _mm512_mask_storeu_ps(sum + l + 16 * k, all[k], sums[k]);
            _mm512_mask_storeu_ps(squares + l + 16 * k, all[k], square_sums[k]);
        }
    }
}

// y = act((x - centre) scale + offset); a null centre is 0.
template <typename T, Activation A, bool Centred>
void activate_row(const T* x, int64_t count, const float* centre, const float* scale, const float* offset, T* y) {
    int64_t l = 0;
    for (; l + 32 <= count; l += 32) {
        __m512 low = load_vector(x + l), high = load_vector(x + l + 16);
        if (Centred) low = _mm512_sub_ps(low, _mm512_loadu_ps(centre + l)), high = _mm512_sub_ps(high, _mm512_loadu_ps(centre + l + 16));
        low = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(low, _mm512_loadu_ps(scale + l), _mm512_loadu_ps(offset + l)));
        high = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(high, _mm512_loadu_ps(scale + l + 16), _mm512_loadu_ps(offset + l + 16)));
        store_two(y + l, low, high);
    }
    for (; l < count; l += 16) {
        const __mmask16 mask = mask_of(count - l);
        __m512 u = load_masked(x + l, mask);
        if (Centred) u = _mm512_sub_ps(u, _mm512_maskz_loadu_ps(mask, centre + l));
        u = _mm512_fmadd_ps(u, _mm512_maskz_loadu_ps(mask, scale + l), _mm512_maskz_loadu_ps(mask, offset + l));
        store_masked(y + l, activated<static_cast<int>(A), digits_of<T>()>(u), mask);
    }
}

// The mean of the activated values of four rows.
template <typename T, Activation A>
void activate_and_pool(const T* upper, const T* lower, int64_t stride, int64_t count, const float* scale, const float* offset, T* y) {
    for (int64_t l = 0; l < count; l += 16) {
        const __mmask16 mask = mask_of(count - l);
        const __m512 s = _mm512_maskz_loadu_ps(mask, scale + l), o = _mm512_maskz_loadu_ps(mask, offset + l);
        const __m512 a = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(load_masked(upper + l, mask), s, o));
        const __m512 b = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(load_masked(upper + stride + l, mask), s, o));
        const __m512 c = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(load_masked(lower + l, mask), s, o));
        const __m512 d = activated<static_cast<int>(A), digits_of<T>()>(_mm512_fmadd_ps(load_masked(lower + stride + l, mask), s, o));
        store_masked(y + l, _mm512_mul_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), _mm512_set1_ps(0.25f)), mask);
    }
}

#else

template <typename T>
void add_rows(const T* DFE_RESTRICT x, int64_t rows, int64_t stride, int64_t lanes, int64_t last, float* DFE_RESTRICT sum) {
    clear(sum, lanes);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = r + 1 < rows ? lanes : last;
        for (int64_t l = 0; l < count; ++l) sum[l] += load(x + r * stride + l);
    }
}

template <typename T>
void add_rows_centred(const T* DFE_RESTRICT x, int64_t rows, int64_t stride, int64_t lanes, int64_t last, int64_t /*ahead*/,
                      const float* DFE_RESTRICT centre, float* DFE_RESTRICT sum, float* DFE_RESTRICT squares) {
    clear(sum, lanes);
    clear(squares, lanes);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t count = r + 1 < rows ? lanes : last;
        for (int64_t l = 0; l < count; ++l) {
            const float d = load(x + r * stride + l) - centre[l];
            sum[l] += d;
            squares[l] += d * d;
        }
    }
}

template <typename T, Activation A, bool Centred>
void activate_row(const T* DFE_RESTRICT x, int64_t count, const float* DFE_RESTRICT centre, const float* DFE_RESTRICT scale,
                  const float* DFE_RESTRICT offset, T* DFE_RESTRICT y) {
    for (int64_t l = 0; l < count; ++l) {
        const float u = Centred ? load(x + l) - centre[l] : load(x + l);
        store(y + l, dfe::activated<A>(u * scale[l] + offset[l]));
    }
}

template <typename T, Activation A>
void activate_and_pool(const T* DFE_RESTRICT upper, const T* DFE_RESTRICT lower, int64_t stride, int64_t count, const float* DFE_RESTRICT scale,
                       const float* DFE_RESTRICT offset, T* DFE_RESTRICT y) {
    for (int64_t l = 0; l < count; ++l) {
        const float a = dfe::activated<A>(load(upper + l) * scale[l] + offset[l]), b = dfe::activated<A>(load(upper + stride + l) * scale[l] + offset[l]);
        const float c = dfe::activated<A>(load(lower + l) * scale[l] + offset[l]), d = dfe::activated<A>(load(lower + stride + l) * scale[l] + offset[l]);
        store(y + l, ((a + b) + (c + d)) * 0.25f);
    }
}

#endif

}  // namespace DFE_ISA
}  // namespace dfe
