// The loops of group_norm's gradient along a row of values, lane l belonging to channel l % channels (formulas: kernels/group_norm.py). In AVX-512
// they are written out, for the sake of the tables of GELU's derivative and of 16-bit values.
#pragma once

#include "rows.h"

namespace dfe {
namespace DFE_ISA {

// Values for each lane: xhat = (x - centre) rstd, z = weight xhat + bias; sums of dz, dz xhat and xhat; dx = dz weight rstd + xhat of_hat + constant.
struct GradientLanes {
    float *centre, *rstd, *weight, *bias;
    float *sum, *product, *normalised;
    const float *constant, *of_hat;
};

#if defined(__AVX512F__)

template <typename T>
inline __m512 normalised_16(const GradientLanes& lanes, const T* x, int64_t l, __mmask16 mask) {
    return _mm512_maskz_mul_ps(mask, _mm512_sub_ps(load_masked(x + l, mask), _mm512_loadu_ps(lanes.centre + l)), _mm512_loadu_ps(lanes.rstd + l));
}

// dz of the lanes from l on, 0 where `mask` leaves them out.
template <typename T, typename G, Activation A>
inline __m512 before_activation_16(const GradientLanes& lanes, __m512 hat, const G* dy, int64_t l, __mmask16 mask) {
    const __m512 gradient = load_masked(dy + l, mask);
    if (A == Activation::none) return gradient;
    return gradient * slope<A, digits_of<T>()>(_mm512_fmadd_ps(hat, _mm512_loadu_ps(lanes.weight + l), _mm512_loadu_ps(lanes.bias + l)));
}

template <typename T, Activation A, bool Keep>
inline void add_gradients_16(const GradientLanes& lanes, const T* x, const T* dy, int64_t l, __mmask16 mask, float* kept) {
    const __m512 hat = normalised_16(lanes, x, l, mask), dz = before_activation_16<T, T, A>(lanes, hat, dy, l, mask);
    if (Keep) _mm512_mask_storeu_ps(kept + l, mask, dz);
    _mm512_storeu_ps(lanes.sum + l, _mm512_add_ps(_mm512_loadu_ps(lanes.sum + l), dz));
    _mm512_storeu_ps(lanes.product + l, _mm512_fmadd_ps(dz, hat, _mm512_loadu_ps(lanes.product + l)));
    _mm512_storeu_ps(lanes.normalised + l, _mm512_add_ps(_mm512_loadu_ps(lanes.normalised + l), hat));
}

// Add `count` values to the sums of their lanes, of which there is a whole number of vectors; Keep: leave dz in `kept`.
template <typename T, Activation A, bool Keep>
void add_gradients(const GradientLanes& lanes, const T* x, const T* dy, int64_t count, float* kept) {
    int64_t l = 0;
    for (; l + 16 <= count; l += 16) add_gradients_16<T, A, Keep>(lanes, x, dy, l, 0xffff, kept);
    if (l < count) add_gradients_16<T, A, Keep>(lanes, x, dy, l, mask_of(count - l), kept);
}

template <typename T, typename G, Activation A>
inline void write_gradients_16(const GradientLanes& lanes, const T* x, const G* dy, int64_t l, __mmask16 mask, T* dx) {
    const __m512 hat = normalised_16(lanes, x, l, mask), dz = before_activation_16<T, G, A>(lanes, hat, dy, l, mask);
    const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(lanes.weight + l), _mm512_loadu_ps(lanes.rstd + l));
    const __m512 rest = _mm512_fmadd_ps(hat, _mm512_loadu_ps(lanes.of_hat + l), _mm512_loadu_ps(lanes.constant + l));
    store_masked(dx + l, _mm512_fmadd_ps(dz, scale, rest), mask);
}

// dx of `count` values; dy is of type T, or dz itself, with A none.
template <typename T, typename G, Activation A>
void write_gradients(const GradientLanes& lanes, const T* x, const G* dy, int64_t count, T* dx) {
    int64_t l = 0;
    for (; l + 16 <= count; l += 16) write_gradients_16<T, G, A>(lanes, x, dy, l, 0xffff, dx);
    if (l < count) write_gradients_16<T, G, A>(lanes, x, dy, l, mask_of(count - l), dx);
}

#else

template <typename T, Activation A, bool Keep>
inline void add_gradients(const T* DFE_RESTRICT x, const T* DFE_RESTRICT dy, int64_t count, const float* DFE_RESTRICT centre,
                          const float* DFE_RESTRICT rstd, const float* DFE_RESTRICT weight, const float* DFE_RESTRICT bias,
                          float* DFE_RESTRICT sum, float* DFE_RESTRICT product, float* DFE_RESTRICT normalised, float* DFE_RESTRICT kept) {
    for (int64_t l = 0; l < count; ++l) {
        const float hat = (load(x + l) - centre[l]) * rstd[l];
        const float dz = load(dy + l) * activation_slope<A>(hat * weight[l] + bias[l]);
        if (Keep) kept[l] = dz;
        sum[l] += dz;
        product[l] += dz * hat;
        normalised[l] += hat;
    }
}

template <typename T, Activation A, bool Keep>
void add_gradients(const GradientLanes& lanes, const T* x, const T* dy, int64_t count, float* kept) {
    add_gradients<T, A, Keep>(x, dy, count, lanes.centre, lanes.rstd, lanes.weight, lanes.bias, lanes.sum, lanes.product, lanes.normalised, kept);
}

template <typename T, typename G, Activation A>
inline void write_gradients(const T* DFE_RESTRICT x, const G* DFE_RESTRICT dy, int64_t count, const float* DFE_RESTRICT centre,
                            const float* DFE_RESTRICT rstd, const float* DFE_RESTRICT weight, const float* DFE_RESTRICT bias,
                            const float* DFE_RESTRICT constant, const float* DFE_RESTRICT of_hat, T* DFE_RESTRICT dx) {
    for (int64_t l = 0; l < count; ++l) {
        const float hat = (load(x + l) - centre[l]) * rstd[l];
        const float dz = load(dy + l) * activation_slope<A>(hat * weight[l] + bias[l]);
        store(dx + l, dz * (weight[l] * rstd[l]) + (hat * of_hat[l] + constant[l]));
    }
}

template <typename T, typename G, Activation A>
void write_gradients(const GradientLanes& lanes, const T* x, const G* dy, int64_t count, T* dx) {
    write_gradients<T, G, A>(x, dy, count, lanes.centre, lanes.rstd, lanes.weight, lanes.bias, lanes.constant, lanes.of_hat, dx);
}

#endif

}  // namespace DFE_ISA
}  // namespace dfe
