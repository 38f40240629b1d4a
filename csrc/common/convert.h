// float to the two half precisions, rounding to nearest even, and back. On the host without hardware support: branch-free, so that loops over it
// vectorise. On a GPU float16 is converted by its instructions, which round the same way and keep what is subnormal in float16 even where float32 is
// flushed to zero; the multiplication of the host's way back would lose it there. The types below are storage only.
#pragma once

#include "portable.h"

namespace dfe {

enum class FloatType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

struct half {
    uint16_t bits;
};
struct bfloat16 {
    uint16_t bits;
};

DFE_HD uint16_t half_bits(float value) {
#if defined(__CUDA_ARCH__)
    uint16_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
    return result;
#else
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14 the result is a multiple of 2^-24, which is the spacing of floats in [0.5, 1): adding 0.5 rounds to it.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return static_cast<uint16_t>(sign | result);
#endif
}

DFE_HD uint16_t bfloat16_bits(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

DFE_HD float load(const float* in) { return *in; }
DFE_HD float load(const bfloat16* in) { return float_of(static_cast<uint32_t>(in->bits) << 16); }
DFE_HD float load(const half* in) {
#if defined(__CUDA_ARCH__)
    float value;  // exact, whatever the compiler flushes to zero
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(in->bits));
    return value;
#else
    const uint32_t magnitude = in->bits & 0x7fffu;
    // The exponent is rebiased by a multiplication, which is exact for subnormals too.
    const float finite = float_of(magnitude << 13) * 0x1p112f;
    const uint32_t bits = magnitude < 0x7c00u ? bits_of(finite) : (magnitude << 13) | 0x7f800000u;
    return float_of(bits | (static_cast<uint32_t>(in->bits & 0x8000u) << 16));
#endif
}

DFE_HD void store(float* out, float value) { *out = value; }
DFE_HD void store(half* out, float value) { out->bits = half_bits(value); }
DFE_HD void store(bfloat16* out, float value) { out->bits = bfloat16_bits(value); }

}  // namespace dfe
