// Philox4x32-10 (Salmon et al., SC 2011) and the normals made of its words; the formula is in kernels/ingest.py.
// Straight-line code without branches or library calls: the host compiler vectorises a loop over it.
#pragma once

#include "portable.h"

namespace dfe {

struct Words {
    uint32_t x0, x1, x2, x3;
};

struct Normals {
    float n0, n1, n2, n3;
};

DFE_HD uint32_t multiply_high(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

DFE_HD Words philox4x32(Words c, uint32_t key0, uint32_t key1) {
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = multiply_high(0xD2511F53u, c.x0), low0 = 0xD2511F53u * c.x0;
        const uint32_t high2 = multiply_high(0xCD9E8D57u, c.x2), low2 = 0xCD9E8D57u * c.x2;
        c = {high2 ^ c.x1 ^ key0, low2, high0 ^ c.x3 ^ key1, low0};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return c;
}

// The middle of one of 2^23 equal cells of (0, 1); exact.
DFE_HD float uniform(uint32_t word) {
    return (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 0x1p-23f;
}

// -2 ln u for u in [2^-24, 1): u = 2^e m with m in [sqrt(1/2), sqrt(2)), ln m = 2 artanh(s), s = (m - 1) / (m + 1), |s| < 0.172.
// The series is cut after s^9, a relative error below 2e-9.
DFE_HD float minus_two_log(float u) {
    const uint32_t bits = bits_of(u);
    const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
    const float m = float_of(bits - (static_cast<uint32_t>(exponent) << 23));
    const float s = (m - 1.0f) / (m + 1.0f);
    const float q = s * s;
    const float tail = q * (0.333333333f + q * (0.2f + q * (0.142857143f + q * 0.111111111f)));
    return static_cast<float>(exponent) * -1.38629436f - 4.0f * (s + s * tail);
}

// (cos, sin)(2 pi u) for u in (0, 1): 4 u is split exactly into a quadrant and f in [-1/2, 1/2]; Taylor series of the angle f pi / 2
// up to x^9 and x^10, cut below 2e-9.
DFE_HD void cos_sin_turn(float u, float* cosine, float* sine) {
    const float quarters = 4.0f * u;
    const int32_t quadrant = static_cast<int32_t>(quarters + 0.5f);
    const float x = (quarters - static_cast<float>(quadrant)) * 1.57079633f;
    const float q = x * x;
    const float s = x + x * q * (-1.66666667e-1f + q * (8.33333333e-3f + q * (-1.98412698e-4f + q * 2.75573192e-6f)));
    const float c =
        1.0f + q * (-0.5f + q * (4.16666667e-2f + q * (-1.38888889e-3f + q * (2.48015873e-5f + q * -2.75573192e-7f))));
    const bool odd = (quadrant & 1) != 0;
    const uint32_t cosine_sign = (static_cast<uint32_t>(quadrant + 1) & 2u) << 30;
    const uint32_t sine_sign = (static_cast<uint32_t>(quadrant) & 2u) << 30;
    *cosine = float_of(bits_of(odd ? s : c) ^ cosine_sign);
    *sine = float_of(bits_of(odd ? c : s) ^ sine_sign);
}

DFE_HD void box_muller(uint32_t radius_word, uint32_t angle_word, float* first, float* second) {
    const float radius = sqrtf(minus_two_log(uniform(radius_word)));
    float cosine, sine;
    cos_sin_turn(uniform(angle_word), &cosine, &sine);
    *first = radius * cosine;
    *second = radius * sine;
}

// The four normals of channels 4 group .. 4 group + 3 at a pixel.
DFE_HD Normals normals(uint32_t pixel, uint32_t group, uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1) {
    const Words words = philox4x32({pixel, group, step_scale, draw}, key0, key1);
    Normals n;
    box_muller(words.x0, words.x1, &n.n0, &n.n1);
    box_muller(words.x2, words.x3, &n.n2, &n.n3);
    return n;
}

}  // namespace dfe
