// The op `group_norm` and its gradient on the CPU (formulas: kernels/group_norm.py).
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/convert.h"
#include "levels.h"

namespace dfe {

struct GroupNormArguments {
    int64_t batch, pixels, channels, groups;
    FloatType type;  // of x, y, dy and dx: (batch, pixels, channels), contiguous
    Activation activation;
    float eps;
    const void* x;
    const float *weight, *bias;  // (channels)
    const float* shift;          // (batch, channels), or null for zeros
    float *mean, *rstd;          // (batch, groups); the gradient reads them
    void* y;
    bool stream;  // whether y bypasses the caches

    const void* dy;
    void* dx;
    double *dweight, *dbias;  // (batch, channels): each sample's part
    float* dshift;            // (batch, channels), or null

    // The division of a sample, from plan_group_norm. A row is `row_pixels` pixels, so that its `lanes` values fill vectors whatever the
    // number of channels; a tile is `tile_pixels` pixels, a whole number of rows that fits the first-level cache.
    int64_t row_pixels, lanes, tile_pixels, tiles;
    bool keep;               // whether the gradient's first pass keeps dz for the second, which is quicker while it stays in the cache
    int64_t shared_floats;   // of a sample: sums of every tile, then what the last pass needs
    int64_t scratch_floats;  // of a thread
};

// Fill in the division of a sample.
void plan_group_norm(GroupNormArguments& arguments);

// A pass over tiles [begin, end) of sample n.
using GroupNormTiles = void (*)(const GroupNormArguments&, int64_t n, int64_t begin, int64_t end, float* shared, float* scratch);

// Forward: `sums` reads x, `apply` writes y. Gradient: `sums` reads x and dy, `apply` writes dx. In between `join` makes of the sums of all
// tiles of a sample, in their order, what the last pass needs, and writes the small results.
struct GroupNormPasses {
    GroupNormTiles sums, apply;
    void (*join)(const GroupNormArguments&, int64_t n, float* shared);
};

DFE_DECLARE_AT_LEVELS(
    GroupNormPasses group_norm_forward(const GroupNormArguments&);
    GroupNormPasses group_norm_backward(const GroupNormArguments&);)

}  // namespace dfe
