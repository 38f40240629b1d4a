// Activations and their derivatives in float32: straight-line code without library calls, so that a loop over it vectorises.
// Errors against float64 are below 4e-7 (derivatives) and 3e-7 max(1, |z|) (values).
#pragma once

#include "portable.h"

namespace dfe {

enum class Activation : int { none = 0, gelu = 1, silu = 2, relu = 3 };

// e^x for x <= 0, as 2^n times a polynomial of degree 5 interpolating 2^f at the Chebyshev points of [-1/2, 1/2]; e^-87 for smaller x.
DFE_HD float exp_of_negative(float x) {
    x = x > -87.0f ? x : -87.0f;
    const int32_t n = static_cast<int32_t>(x * 1.44269504f - 0.5f);
    const float f = x * 1.44269504f - static_cast<float>(n);
    const float power = 1.00000008f + f * (0.693147188f + f * (0.240221075f + f * (0.0555035711f + f * (0.00967603192f + f * 0.00133908634f))));
    return power * float_of(static_cast<uint32_t>(n + 127) << 23);
}

// Phi(-|z|) of the standard normal: half of erfc(|z| / sqrt 2) by Abramowitz and Stegun 7.1.26; `bell` is exp(-z^2 / 2).
DFE_HD float normal_tail(float magnitude, float bell) {
    const float t = 1.0f / (1.0f + 0.231641888f * magnitude);
    return bell * t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576014f + t * 0.530702714f))));
}

DFE_HD float magnitude_of(float z) {
#if defined(__CUDA_ARCH__)
    return fabsf(z);  // which instructions take with their operands
#else
    return float_of(bits_of(z) & 0x7fffffffu);
#endif
}

// min(m, 6) Phi(-m) for m >= 0, within 9e-8: 2 to the power of a polynomial of degree 6 that approximates log2 Phi(-m), weighted by the error it
// makes here, without a division. 2^f as above; adding 1.5 * 2^23 rounds to an integer, which is left in the low bits.
DFE_HD float gelu_deficit(float magnitude) {
    const float m = magnitude > 6.0f ? 6.0f : magnitude;
    const float exponent =
        -0.999993086f +
        m * (-1.15120173f + m * (-0.458770961f + m * (-0.0534121022f + m * (0.00808071531f + m * (-0.000769219419f + m * 3.30927869e-05f)))));
    const float rounder = exponent + 12582912.0f;
    const float f = exponent - (rounder - 12582912.0f);
    const float power = 1.00000008f + f * (0.693147188f + f * (0.240221075f + f * (0.0555035711f + f * (0.00967603192f + f * 0.00133908634f))));
    return m * float_of(bits_of(power) + (bits_of(rounder) << 23));
}

// z Phi(z) within 1.6e-5, for results of 16 bits: Phi(m) - 1/2 as an odd polynomial for m < 4.5, without exponential or division. Not a number
// stays one.
DFE_HD float gelu_to_16_bits(float z) {
    const float magnitude = magnitude_of(z), m = magnitude > 4.5f ? 4.5f : magnitude, s = m * m - 10.125f;
    float phi = 9.23607324e-9f + s * (-5.928118e-10f + s * (4.27647709e-11f + s * -1.46249907e-12f));
    phi = -3.87724504e-5f + s * (2.73715409e-6f + s * (-1.72352074e-7f + s * phi));
    phi = 0.156906322f + s * (-7.62315514e-3f + s * (5.32949809e-4f + s * phi));
    return (z > 0.0f ? z : 0.0f) - m * (0.5f - m * phi);
}

// 1 / (1 + e^-z); not a number stays one.
DFE_HD float sigmoid(float z) {
    const float e = exp_of_negative(-magnitude_of(z));
    const float share = 1.0f / (1.0f + e), value = z > 0.0f ? share : e * share;
    return z == z ? value : z;
}

template <Activation A>
DFE_HD float activated(float z) {
    if (A == Activation::gelu) return (z > 0.0f ? z : 0.0f) - gelu_deficit(magnitude_of(z));
    if (A == Activation::silu) {
        z = z < -86.0f ? -86.0f : z;  // below, 0 to rounding, where z times what is left of exp() would not be
        const float e = exp_of_negative(-magnitude_of(z));
        return z * (z > 0.0f ? 1.0f : e) / (1.0f + e);
    }
    if (A == Activation::relu) return z < 0.0f ? 0.0f : z;
    return z;
}

// The derivative; of relu at 0 it is 0.
template <Activation A>
DFE_HD float activation_slope(float z) {
    z = z > 86.0f ? 86.0f : z < -86.0f ? -86.0f : z;  // beyond, 0 and 1 to rounding, where z times what is left of exp() would not be
    if (A == Activation::gelu) {
        const float magnitude = magnitude_of(z), bell = exp_of_negative(-0.5f * z * z), tail = normal_tail(magnitude, bell);
        return (z > 0.0f ? 1.0f - tail : tail) + z * bell * 0.398942280f;
    }
    if (A == Activation::silu) {
        const float e = exp_of_negative(-magnitude_of(z));
        const float share = 1.0f / (1.0f + e), sigmoid = z > 0.0f ? share : e * share, rest = z > 0.0f ? e * share : share;
        return sigmoid * (1.0f + z * rest);
    }
    if (A == Activation::relu) return z > 0.0f ? 1.0f : 0.0f;
    return 1.0f;
}

}  // namespace dfe
