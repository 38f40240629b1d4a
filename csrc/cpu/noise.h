// The noise of a run of pixels (formula: kernels/ingest.py), vectorised along the pixels.
#pragma once

#include "../common/philox.h"
#include "isa.h"
#include "normals.h"

namespace dfe {
namespace DFE_ISA {

// The four normals of channels 4 group .. 4 group + 3 of each of `count` pixels into n0 .. n3.
static inline void draw_rows(uint32_t group, uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1, uint32_t start, int32_t count,
                             float* DFE_RESTRICT n0, float* DFE_RESTRICT n1, float* DFE_RESTRICT n2, float* DFE_RESTRICT n3) {
#if defined(__AVX512F__)
    const PhiloxStart shared = philox_start(group, step_scale, draw, key0, key1);
    for (int32_t i = 0; i < count; i += 16) {
        __m512 n[4];
        normals_16(shared, start + static_cast<uint32_t>(i), n);
        const __mmask16 mask = count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1u);
        _mm512_mask_storeu_ps(n0 + i, mask, n[0]);
        _mm512_mask_storeu_ps(n1 + i, mask, n[1]);
        _mm512_mask_storeu_ps(n2 + i, mask, n[2]);
        _mm512_mask_storeu_ps(n3 + i, mask, n[3]);
    }
#else
    for (int32_t i = 0; i < count; ++i) {
        const Normals n = normals(start + static_cast<uint32_t>(i), group, step_scale, draw, key0, key1);
        n0[i] = n.n0;
        n1[i] = n.n1;
        n2[i] = n.n2;
        n3[i] = n.n3;
    }
#endif
}

// The normals of the three channels of each pixel into noise (count, 3).
static inline void draw_three(uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1, uint32_t start, int32_t count,
                              float* DFE_RESTRICT noise, [[maybe_unused]] float* DFE_RESTRICT rows) {
#if defined(__AVX512F__)
    const PhiloxStart shared = philox_start(0, step_scale, draw, key0, key1);
    for (int32_t i = 0; i < count; i += 16, noise += 48) {
        __m512 n[4], values[3];
        normals_16(shared, start + static_cast<uint32_t>(i), n);
        three_in_turn(n[0], n[1], n[2], values);
        const uint64_t mask = count - i >= 16 ? ~uint64_t{0} : (uint64_t{1} << (3 * (count - i))) - 1;
        for (int k = 0; k < 3; ++k) _mm512_mask_storeu_ps(noise + 16 * k, static_cast<__mmask16>(mask >> 16 * k), values[k]);
    }
#else
    float *const n1 = rows + count, *const n2 = n1 + count;
    draw_rows(0, step_scale, draw, key0, key1, start, count, rows, n1, n2, n2 + count);
    for (int32_t i = 0; i < count; ++i) {
        noise[3 * i] = rows[i];
        noise[3 * i + 1] = n1[i];
        noise[3 * i + 2] = n2[i];
    }
#endif
}

// Noise of pixels [first, first + count) into noise (count, channels); rows: scratch of 4 * count floats. step_scale = 2 * step + scale.
static inline void draw_noise(int64_t channels, uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1, int64_t first, int64_t count,
                              float* DFE_RESTRICT noise, float* DFE_RESTRICT rows) {
    const uint32_t start = static_cast<uint32_t>(first);
    const int32_t length = static_cast<int32_t>(count);
    if (channels == 3) return draw_three(step_scale, draw, key0, key1, start, length, noise, rows);
    for (int64_t c = 0; c < channels; c += 4) {
        draw_rows(static_cast<uint32_t>(c / 4), step_scale, draw, key0, key1, start, length, rows, rows + count, rows + 2 * count, rows + 3 * count);
        for (int64_t lane = 0; lane < 4 && c + lane < channels; ++lane) {
            for (int64_t i = 0; i < count; ++i) noise[i * channels + c + lane] = rows[lane * count + i];
        }
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
