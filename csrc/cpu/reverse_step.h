// The op `reverse_step` on the CPU (formula: kernels/reverse_step.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "../common/one_step.h"
#include "levels.h"

namespace dfe {

struct ReverseStepArguments {
    const void* x_t;  // (batch, pixels, channels) of image_type
    const void* eps;  // (batch, pixels, channels) of type
    void* out;        // like x_t, and possibly the same
    FloatType image_type, type;
    int64_t batch, pixels, channels;
    int64_t x_t_stride, eps_stride, out_stride;  // from one pixel to the next
    ReverseStepNumbers numbers;
    uint32_t key[2], draw, step;

    // The division into tiles, from plan_reverse_step: so many pixels that the rooms of a tile stay in the first-level cache.
    int64_t tile_pixels, tiles;
    int64_t scratch_floats;  // that a thread needs
};

// Fill in the division into tiles.
void plan_reverse_step(ReverseStepArguments& arguments);

// Tiles [begin, end) of every image.
using ReverseStepTiles = void (*)(const ReverseStepArguments&, int64_t begin, int64_t end, float* scratch);

DFE_DECLARE_AT_LEVELS(void reverse_step_tiles(const ReverseStepArguments&, int64_t begin, int64_t end, float* scratch);)

}  // namespace dfe
