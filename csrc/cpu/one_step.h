// The op `one_step` on the CPU (formula: kernels/one_step.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "../common/one_step.h"
#include "levels.h"

namespace dfe {

struct OneStepArguments {
    const void *x_t, *x_0;   // (scales, pixels, channels) and (pixels, channels) of image_type
    const void* eps;         // (scales, pixels, channels) of type
    void* pair;              // (pixels, 2 channels) of type
    float* reconstruction;   // (pixels, channels), contiguous, or null
    FloatType image_type, type;
    int64_t pixels, channels;
    int64_t x_t_stride, eps_stride, x_0_stride, pair_stride;  // from one pixel to the next
    int scales;
    OneStepNumbers numbers;

    // The division into tiles, from plan_one_step: so many pixels that the rooms of a tile stay in the first-level cache.
    int64_t tile_pixels, tiles;
    int64_t scratch_floats;  // that a thread needs
};

// Fill in the division into tiles.
void plan_one_step(OneStepArguments& arguments);

// Tiles [begin, end); `stream` writes past the caches.
using OneStepTiles = void (*)(const OneStepArguments&, bool stream, int64_t begin, int64_t end, float* scratch);

DFE_DECLARE_AT_LEVELS(void one_step_tiles(const OneStepArguments&, bool stream, int64_t begin, int64_t end, float* scratch);)

}  // namespace dfe
