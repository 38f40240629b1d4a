// The normals of sixteen pixels at a time in AVX-512 (formulas: kernels/ingest.py, ../common/philox.h). Products of 32-bit words are made in lanes of 64
// bits, of which only the lower halves are multiplied: even and odd pixels go through the rounds side by side, and no half is moved but the upper one.
#pragma once

#include "../common/philox.h"
#include "isa.h"
#include "log_table.h"

#if defined(__AVX512F__)

namespace dfe {
namespace DFE_ISA {

constexpr int ROUNDS = 10;

// What the words of all pixels share: the keys of the rounds, and in the first two the words that no pixel changes.
struct PhiloxStart {
    uint32_t key0[ROUNDS], key1[ROUNDS];
    uint32_t first_2;             // xored into the upper half of the pixel's product, word 2 after round 1
    uint32_t second_0, second_2;  // likewise into words 0 and 2 of round 2
    uint32_t second_3;            // word 3 after round 2
};

static inline PhiloxStart philox_start(uint32_t group, uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1) {
    PhiloxStart start;
    for (int round = 0; round < ROUNDS; ++round) {
        start.key0[round] = key0 + static_cast<uint32_t>(round) * 0x9E3779B9u;
        start.key1[round] = key1 + static_cast<uint32_t>(round) * 0xBB67AE85u;
    }
    const uint32_t word_0 = multiply_high(0xCD9E8D57u, step_scale) ^ group ^ key0;  // of the counter after round 1
    start.first_2 = draw ^ key1;
    start.second_0 = 0xCD9E8D57u * step_scale ^ start.key0[1];
    start.second_2 = multiply_high(0xD2511F53u, word_0) ^ start.key1[1];
    start.second_3 = 0xD2511F53u * word_0;
    return start;
}

// The words of the pixels in the lower halves of eight lanes; what the upper halves hold is of no use.
static inline void philox_8(const PhiloxStart& start, __m512i pixel, __m512i* DFE_RESTRICT words) {
    const __m512i first = _mm512_set1_epi64(0xD2511F53), second = _mm512_set1_epi64(0xCD9E8D57);
    const auto each = [](uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); };
    const auto upper = [](__m512i product) { return _mm512_srli_epi64(product, 32); };
    constexpr int XOR = 0x96;  // of three
    __m512i from_0 = _mm512_mul_epu32(pixel, first);
    __m512i from_2 = _mm512_mul_epu32(_mm512_xor_si512(upper(from_0), each(start.first_2)), second);
    __m512i x0 = _mm512_xor_si512(upper(from_2), each(start.second_0)), x1 = from_2;
    __m512i x2 = _mm512_xor_si512(from_0, each(start.second_2)), x3 = each(start.second_3);
    for (int round = 2; round < ROUNDS; ++round) {
        from_0 = _mm512_mul_epu32(x0, first), from_2 = _mm512_mul_epu32(x2, second);
        x0 = _mm512_ternarylogic_epi32(upper(from_2), x1, each(start.key0[round]), XOR), x1 = from_2;
        x2 = _mm512_ternarylogic_epi32(upper(from_0), x3, each(start.key1[round]), XOR), x3 = from_0;
    }
    words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// The square root of -2 ln u, u of the word's upper 23 bits, with ln(1 + t) as t - t^2 / 2 + t^3 / 3 - t^4 / 4, |t| <= 1/64.
static inline __m512 radius_16(__m512i word) {
    const __m512 count = _mm512_cvtepi32_ps(_mm512_srli_epi32(word, 9));
    const __m512 u = _mm512_fmadd_ps(count, _mm512_set1_ps(0x1p-23f), _mm512_set1_ps(0x1p-24f));
    const __m512i piece = _mm512_srli_epi32(_mm512_castps_si512(u), 18);  // in the low five bits
    const auto looked_up = [&](const float* table) {
        return _mm512_permutex2var_ps(_mm512_load_ps(table), piece, _mm512_load_ps(table + 16));
    };
    const __m512 m = _mm512_getmant_ps(u, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
    const __m512 t = _mm512_fmsub_ps(m, looked_up(log_table.reciprocal), _mm512_set1_ps(1.0f));
    const __m512 base = _mm512_fnmadd_ps(_mm512_getexp_ps(u), _mm512_set1_ps(MINUS_TWO_LOG_HALF), looked_up(log_table.offset));
    __m512 sum = _mm512_fmadd_ps(t, _mm512_set1_ps(0.5f), _mm512_set1_ps(-0.666666667f));
    sum = _mm512_fmadd_ps(t, sum, _mm512_set1_ps(1.0f));
    sum = _mm512_fmadd_ps(t, sum, _mm512_set1_ps(-2.0f));
    return _mm512_sqrt_ps(_mm512_fmadd_ps(t, sum, base));
}

// (cos, sin)(2 pi u), u likewise: the nearest quadrant in the upper two bits of the word plus half a quadrant, and the rest of the word, four times
// as large, as a signed fraction of one. Polynomials within 2e-9 for angles up to pi / 4.
static inline void cos_sin_16(__m512i word, __m512* cosine, __m512* sine) {
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    const __m512i middle = _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(~511), _mm512_set1_epi32(256), 0xEA);  // word & ~511 | 256
    const __m512i quadrant = _mm512_add_epi32(word, _mm512_set1_epi32(0x20000000)), next = _mm512_add_epi32(quadrant, _mm512_set1_epi32(0x40000000));
    const __mmask16 odd = _mm512_test_epi32_mask(quadrant, _mm512_set1_epi32(0x40000000));
    const __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_slli_epi32(middle, 2)), _mm512_set1_ps(1.57079633f * 0x1p-32f));
    const __m512 q = _mm512_mul_ps(x, x);
    __m512 s = _mm512_fmadd_ps(q, _mm512_set1_ps(-0.000194956025f), _mm512_set1_ps(0.00833197869f));
    s = _mm512_fmadd_ps(_mm512_mul_ps(x, q), _mm512_fmadd_ps(q, s, _mm512_set1_ps(-0.166666508f)), x);
    __m512 c = _mm512_fmadd_ps(q, _mm512_set1_ps(2.44384155e-05f), _mm512_set1_ps(-0.00138873677f));
    c = _mm512_fmadd_ps(q, _mm512_fmadd_ps(q, c, _mm512_set1_ps(0.0416666456f)), _mm512_set1_ps(-0.5f));
    c = _mm512_fmadd_ps(q, c, _mm512_set1_ps(1.0f));
    const auto with_sign = [&](__m512 value, __m512i of) {
        return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), of, sign, 0x78));  // value ^ (of & sign)
    };
    *cosine = with_sign(_mm512_mask_blend_ps(odd, c, s), next);
    *sine = with_sign(_mm512_mask_blend_ps(odd, s, c), quadrant);
}

// The four normals of pixels first .. first + 15.
static inline void normals_16(const PhiloxStart& start, uint32_t first, __m512* n) {
    const __m512i even = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
    __m512i low[4], high[4], word[4];
    philox_8(start, even, low);
    philox_8(start, _mm512_add_epi64(even, _mm512_set1_epi64(1)), high);
    for (int k = 0; k < 4; ++k) word[k] = _mm512_mask_shuffle_epi32(low[k], 0xAAAA, high[k], _MM_PERM_CCAA);
    for (int k = 0; k < 4; k += 2) {
        const __m512 radius = radius_16(word[k]);
        __m512 cosine, sine;
        cos_sin_16(word[k + 1], &cosine, &sine);
        n[k] = _mm512_mul_ps(radius, cosine), n[k + 1] = _mm512_mul_ps(radius, sine);
    }
}

// a, b and c in turn: 48 values.
static inline void three_in_turn(__m512 a, __m512 b, __m512 c, __m512* out) {
    const __m512i ab_0 = _mm512_set_epi32(5, 0, 20, 4, 0, 19, 3, 0, 18, 2, 0, 17, 1, 0, 16, 0);
    const __m512i ab_1 = _mm512_set_epi32(26, 10, 0, 25, 9, 0, 24, 8, 0, 23, 7, 0, 22, 6, 0, 21);
    const __m512i ab_2 = _mm512_set_epi32(0, 31, 15, 0, 30, 14, 0, 29, 13, 0, 28, 12, 0, 27, 11, 0);
    const __m512i c_0 = _mm512_set_epi32(0, 4, 0, 0, 3, 0, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0);
    const __m512i c_1 = _mm512_set_epi32(0, 0, 9, 0, 0, 8, 0, 0, 7, 0, 0, 6, 0, 0, 5, 0);
    const __m512i c_2 = _mm512_set_epi32(15, 0, 0, 14, 0, 0, 13, 0, 0, 12, 0, 0, 11, 0, 0, 10);
    out[0] = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, ab_0, b), 0x4924, c_0, c);
    out[1] = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, ab_1, b), 0x2492, c_1, c);
    out[2] = _mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, ab_2, b), 0x9249, c_2, c);
}

}  // namespace DFE_ISA
}  // namespace dfe

#endif
