// Sixteen floats at a time, in whatever vectors the level has: the compiler divides them. For loops that it vectorises badly by itself, such as
// those from 16-bit to 32-bit values. The rules of isa.h hold.
#pragma once

#include "../common/activation.h"
#include "../common/convert.h"
#include "gelu_tables.h"
#include "isa.h"

namespace dfe {
namespace DFE_ISA {

constexpr int WIDTH = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

DFE_HD Floats broadcast(float value) { return value - Floats{}; }

DFE_HD Floats load_vector(const float* in) {
    Floats result;
    memcpy(&result, in, sizeof result);
    return result;
}
DFE_HD Floats load_vector(const bfloat16* in) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))), 16));
#else
    Halves bits;
    memcpy(&bits, in, sizeof bits);
    return reinterpret_cast<Floats>(__builtin_convertvector(bits, Words) << 16);
#endif
}
DFE_HD Floats load_vector(const half* in) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#else
    Floats result;
    for (int i = 0; i < WIDTH; ++i) result[i] = load(in + i);
    return result;
#endif
}

// The bits of what `value` rounds to in bfloat16, in the upper halves; the lower ones are left over.
DFE_HD Words bfloat16_words(Floats value) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value == value ? nearest : Words{} + 0x7fc00000u;
}

#if defined(__AVX512F__)
DFE_HD __m256i bfloat16_bits(Floats value) {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(value);  // subnormal numbers, below 2^-126, become 0
#else
    return _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bfloat16_words(value) >> 16));
#endif
}
#endif

DFE_HD void store_vector(float* out, Floats value) { memcpy(out, &value, sizeof value); }
DFE_HD void store_vector(bfloat16* out, Floats value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bfloat16_bits(value));
#else
    const Halves narrow = __builtin_convertvector(bfloat16_words(value) >> 16, Halves);
    memcpy(out, &narrow, sizeof narrow);
#endif
}
DFE_HD void store_vector(half* out, Floats value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < WIDTH; ++i) store(out + i, value[i]);
#endif
}

#if defined(__AVX512F__)
// To the nearest of 0 to 255.
DFE_HD __m128i bytes_of(Floats value) { return _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_max_ps(value, _mm512_setzero_ps()))); }
DFE_HD void store_vector(uint8_t* out, Floats value) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes_of(value)); }

// Those of a mask; of the others 0 is loaded.
DFE_HD Floats load_masked(const float* in, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, in); }
DFE_HD Floats load_masked(const bfloat16* in, __mmask16 mask) {
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in)), 16));
}
DFE_HD Floats load_masked(const half* in, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, in)); }
DFE_HD void store_masked(float* out, Floats value, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, value); }
DFE_HD void store_masked(uint8_t* out, Floats value, __mmask16 mask) { _mm_mask_storeu_epi8(out, mask, bytes_of(value)); }
DFE_HD void store_masked(bfloat16* out, Floats value, __mmask16 mask) { _mm256_mask_storeu_epi16(out, mask, bfloat16_bits(value)); }
DFE_HD void store_masked(half* out, Floats value, __mmask16 mask) {
    _mm256_mask_storeu_epi16(out, mask, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

DFE_HD __mmask16 first_of(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
// Of the sixteen from where `left` are left, any number.
DFE_HD __mmask16 mask_of(int64_t left) { return left >= WIDTH ? 0xffff : first_of(left > 0 ? static_cast<int>(left) : 0); }

// Two vectors, one after the other.
template <typename T>
DFE_HD void store_two(T* out, Floats low, Floats high) {
    store_vector(out, low);
    store_vector(out + WIDTH, high);
}
DFE_HD void store_two(bfloat16* out, Floats low, Floats high) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    const __m512i odd_words = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33,  //
                                               31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    const __m512i first = reinterpret_cast<__m512i>(bfloat16_words(low)), second = reinterpret_cast<__m512i>(bfloat16_words(high));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(first, odd_words, second));
#endif
}
#endif

// The first `count` of the sixteen, 0 to 16.
template <typename T>
DFE_HD Floats load_some(const T* in, int count) {
#if defined(__AVX512F__)
    return load_masked(in, first_of(count));
#else
    Floats result = {};
    for (int i = 0; i < count; ++i) result[i] = load(in + i);
    return result;
#endif
}
template <typename T>
DFE_HD void store_some(T* out, Floats value, int count) {
#if defined(__AVX512F__)
    store_masked(out, value, first_of(count));
#else
    for (int i = 0; i < count; ++i) store(out + i, value[i]);
#endif
}

// What is read back after a store.
DFE_HD Floats rounded(Floats value, const float*) { return value; }
DFE_HD Floats rounded(Floats value, const bfloat16*) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<Floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16_bits(value)), 16));
#else
    return reinterpret_cast<Floats>(bfloat16_words(value) & 0xffff0000u);
#endif
}
DFE_HD Floats rounded(Floats value, const half*) {
    half bits[WIDTH];
    store_vector(bits, value);
    return load_vector(bits);
}

// Digits of an activation: those of float32; four, for results that are rounded to bfloat16; three, for those that become bytes of wide ranges.
enum class Digits { all, few, fewest };
template <typename T>
constexpr Digits digits_of() {
    return Digits::all;
}
template <>
constexpr Digits digits_of<bfloat16>() {
    return Digits::few;
}

DFE_HD Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);  // b where either is NaN
#else
    return a > b ? a : b;
#endif
}

// Whether a > b in any of the sixteen.
DFE_HD bool any_larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
#else
    bool found = false;
    for (int i = 0; i < WIDTH; ++i) found = found || a[i] > b[i];
    return found;
#endif
}

template <Digits D>
DFE_HD Floats reciprocal(Floats value) {
#if defined(__AVX512F__)
    const Floats near = _mm512_rcp14_ps(value);
    return D == Digits::all ? near * (2.0f - value * near) : near;
#else
    return 1.0f / value;
#endif
}

DFE_HD Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);  // b where it is NaN
#else
    return a < b ? a : b;
#endif
}

// 2^f for f in [-1/2, 1/2], by polynomials through its Chebyshev points.
template <Digits D>
DFE_HD Floats power_of_fraction(Floats f) {
    if (D == Digits::all) return 1.00000008f + f * (0.693147188f + f * (0.240221075f + f * (0.0555035711f + f * (0.00967603192f + f * 0.00133908634f))));
    return 0.999924557f + f * (0.693136734f + f * (0.242639479f + f * 0.055838283f));
}

// 2^x for x in [-125, 0], as 2^n 2^f: adding 1.5 * 2^23 rounds to an integer, which is left in the low bits. Of NaN, anything.
template <Digits D>
DFE_HD Floats power_of_two_in_range(Floats x) {
    const Floats rounder = x + 12582912.0f, power = power_of_fraction<D>(x - (rounder - 12582912.0f));
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(power) + (reinterpret_cast<Words>(rounder) << 23));
}

// 2^x for x <= 0; 2^-125 for x below -125; NaN stays.
template <Digits D>
DFE_HD Floats power_of_two(Floats x) {
    x = larger(broadcast(-125.0f), x);
#if defined(__AVX512F__)
    const Floats n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
    return _mm512_scalef_ps(power_of_fraction<D>(x - n), n);
#else
    const Floats power = power_of_two_in_range<D>(x);
    return x == x ? power : x;
#endif
}

DFE_HD Floats magnitude_of(Floats z) { return reinterpret_cast<Floats>(reinterpret_cast<Words>(z) & 0x7fffffffu); }

#if defined(__AVX512F__)
DFE_HD __m512 looked_up(const float* table, __m512i piece) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), piece, _mm512_load_ps(table + 16));
}

// A function of gelu_tables.h at m >= 0, of which it has the table for these digits. NaN stays.
template <Digits D, int Powers>
DFE_HD Floats piecewise(const float (&table)[Powers][GELU_PIECES], Floats m) {
    constexpr float step = D == Digits::all ? GELU_STEP : GELU_COARSE_STEP;
    m = smaller(broadcast((GELU_PIECES - 1) * step), m);
    const Floats rounder = m * (1.0f / step) + 12582912.0f;  // leaves the number of the piece in the low bits
    const Floats t = D == Digits::all ? m - (rounder - 12582912.0f) * step : m;
    const __m512i piece = reinterpret_cast<__m512i>(rounder);
    Floats sum = looked_up(table[Powers - 1], piece);
    for (int power = Powers - 2; power >= 0; --power) sum = sum * t + static_cast<Floats>(looked_up(table[power], piece));
    return sum;
}
#endif

constexpr int SIGMOID = 4;  // beside those of Activation

// The formulas of activation.h; GELU in AVX-512 from the tables of gelu_tables.h, elsewhere for few digits with m Phi(-m) as a polynomial in
// m = min(|z|, 4.25): within 5e-5, and within a tenth of the rounding to bfloat16 where that is more. For the fewest with m up to 3.5: within 8e-4.
template <int A, Digits D>
DFE_HD Floats activated(Floats z) {
    if (A == static_cast<int>(Activation::gelu) && D == Digits::fewest) {
        const Floats m = smaller(broadcast(3.5f), magnitude_of(z));
        const Floats tail = 0.510269748f + m * (-0.444876997f + m * (0.056894255f + m * (0.0552139336f + m * (-0.0210672739f + m * 0.00217887467f))));
        return larger(z, Floats{}) - m * tail;
    }
#if defined(__AVX512F__)
    if (A == static_cast<int>(Activation::gelu) && D == Digits::few) return larger(z, Floats{}) - piecewise<D>(gelu_tables.coarse_deficit, magnitude_of(z));
    if (A == static_cast<int>(Activation::gelu)) return larger(z, Floats{}) - piecewise<D>(gelu_tables.deficit, magnitude_of(z));
#endif
    if (A == static_cast<int>(Activation::gelu) && D == Digits::few) {
        const Floats m = smaller(broadcast(4.25f), magnitude_of(z));
        const Floats high = -0.0427231938f + m * (0.0166969113f + m * (-0.00334770139f + m * (0.000348421978f + m * -1.50023807e-05f)));
        const Floats tail = 0.499976784f + m * (-0.399736822f + m * (0.00771080749f + m * (0.0423430167f + m * (0.0373867899f + m * high))));
        return larger(z, Floats{}) - m * tail;
    }
    if (A == static_cast<int>(Activation::gelu)) {
        const Floats m = smaller(broadcast(6.0f), magnitude_of(z));
        const Floats exponent =
            -0.999993086f +
            m * (-1.15120173f + m * (-0.458770961f + m * (-0.0534121022f + m * (0.00808071531f + m * (-0.000769219419f + m * 3.30927869e-05f)))));
        return larger(z, Floats{}) - m * power_of_two_in_range<D>(exponent);
    }
    if (A == static_cast<int>(Activation::silu) || A == SIGMOID) {
        const Floats e = power_of_two_in_range<D>(larger(broadcast(-125.0f), magnitude_of(z) * -1.44269504f));
        const Floats share = (z > 0.0f ? broadcast(1.0f) : e) * reciprocal<D>(1.0f + e);
        if (A == SIGMOID) return z == z ? share : z;  // a comparison with a NaN is false
        return larger(broadcast(-90.0f), z) * share;  // below, e is no smaller, and the product would grow
    }
    if (A == static_cast<int>(Activation::relu)) return z < 0.0f ? Floats{} : z;
    return z;
}

#if defined(__AVX512F__)
// The derivative of an activation; of relu at 0 it is 0. For few digits that of GELU is within 3.3e-5.
template <Activation A, Digits D>
DFE_HD Floats slope(Floats z) {
    if (A == Activation::gelu) {
        const Floats m = magnitude_of(z), rise = D == Digits::few ? piecewise<D>(gelu_tables.coarse_rise, m) : piecewise<D>(gelu_tables.rise, m);
        return 0.5f + reinterpret_cast<Floats>(reinterpret_cast<Words>(rise) ^ (reinterpret_cast<Words>(z) & 0x80000000u));
    }
    if (A == Activation::silu) {
        const Floats m = smaller(broadcast(86.0f), magnitude_of(z));  // beyond, 0 and 1 to rounding
        const Floats e = power_of_two_in_range<D>(m * -1.44269504f);
        const Floats share = reciprocal<D>(1.0f + e), other = e * share;
        return z > 0.0f ? share * (1.0f + m * other) : other * (1.0f - m * share);
    }
    if (A == Activation::relu) return z > 0.0f ? broadcast(1.0f) : Floats{};
    return broadcast(1.0f);
}
#endif

}  // namespace DFE_ISA
}  // namespace dfe
