// The noise of a run of pixels (formula: kernels/ingest.py), vectorised along the pixels.
#pragma once

#include "../common/philox.h"
#include "isa.h"

namespace dfe {
namespace DFE_ISA {

// Noise of pixels [first, first + count) into noise (count, channels); rows: scratch of 4 * count floats. step_scale = 2 * step + scale.
static inline void draw_noise(int64_t channels, uint32_t step_scale, uint32_t draw, uint32_t key0, uint32_t key1, int64_t first, int64_t count,
                              float* DFE_RESTRICT noise, float* DFE_RESTRICT rows) {
    float *DFE_RESTRICT n0 = rows, *DFE_RESTRICT n1 = rows + count;
    float *DFE_RESTRICT n2 = rows + 2 * count, *DFE_RESTRICT n3 = rows + 3 * count;
    for (int64_t c = 0; c < channels; c += 4) {
        const uint32_t group = static_cast<uint32_t>(c / 4), start = static_cast<uint32_t>(first);
        const int32_t length = static_cast<int32_t>(count);
        for (int32_t i = 0; i < length; ++i) {
            const Normals n = normals(start + static_cast<uint32_t>(i), group, step_scale, draw, key0, key1);
            n0[i] = n.n0;
            n1[i] = n.n1;
            n2[i] = n.n2;
            n3[i] = n.n3;
        }
        if (channels == 3) {
            for (int64_t i = 0; i < count; ++i) {
                noise[3 * i] = n0[i];
                noise[3 * i + 1] = n1[i];
                noise[3 * i + 2] = n2[i];
            }
        } else {
            for (int64_t lane = 0; lane < 4 && c + lane < channels; ++lane) {
                for (int64_t i = 0; i < count; ++i) noise[i * channels + c + lane] = rows[lane * count + i];
            }
        }
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
