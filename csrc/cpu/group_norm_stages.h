// The stages of `group_norm` at inference on the CPU (formulas: kernels/group_norm_{moments,merge,apply}.py).
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/convert.h"
#include "levels.h"

namespace dfe {

struct MomentsArguments {
    const void* x;  // (batch, pixels, channels), pixel_stride elements from one pixel to the next
    FloatType type;
    int64_t batch, pixels, channels, pixel_stride;
    int64_t tile_pixels, tiles;
    float* moments;  // (batch, tiles, 2, channels)

    // From plan_moments. A row is `row_pixels` pixels that follow each other without a gap; a chunk is `chunk_pixels` pixels, a whole
    // number of rows that fits the first-level cache.
    int64_t row_pixels, chunk_pixels;
    int64_t scratch_floats;  // of a thread
};

struct MomentsSource {
    const float* moments;  // (batch, tiles, 2, channels), or null
    const int32_t* counts;
    int64_t tiles, channels;
};

struct MergeArguments {
    MomentsSource sources[2];
    int64_t batch, channels, groups;  // channels: of both sources
    const float *weight, *bias;
    const float* shift;    // rows of `channels`, shift_stride apart, or null for zeros
    int64_t shift_stride;  // 0 where one row serves every sample
    float eps;
    float *scale, *offset;  // (batch, channels)
    float *mean, *rstd;     // (batch, groups), or null

    // From plan_merge: a piece of work is part_groups groups of a sample.
    int64_t part_groups, parts;
    int64_t scratch_floats;
};

enum class Resample : int { none = 0, down = 1, up = 2 };

struct ApplySource {
    const void* x;  // (batch, height, width, channels), or null
    int64_t channels, pixel_stride;
};

struct ApplyArguments {
    ApplySource sources[2];
    FloatType type;
    Activation activation;
    Resample resample;
    int64_t batch, height, width, channels;  // of the inputs; channels: of both
    const float *scale, *offset;             // (batch, channels), or null for 1 and 0
    void* y;
    int64_t y_stride;  // elements from one pixel of y to the next
    bool stream;       // whether y bypasses the caches

    // From plan_apply. A line is a row of the image, of y where it is pooled and else of x.
    int64_t lines;
    int64_t row_pixels;      // as above, of x and y alike
    int64_t scratch_floats;  // of a thread: scale and offset along a row, staged results
};

void plan_moments(MomentsArguments& arguments);
void plan_merge(MergeArguments& arguments);
void plan_apply(ApplyArguments& arguments);

// Of work items [begin, end): tiles of all samples; parts of all samples; lines of all samples.
using MomentsTiles = void (*)(const MomentsArguments&, int64_t begin, int64_t end, float* scratch);
using ApplyLines = void (*)(const ApplyArguments&, int64_t begin, int64_t end, float* scratch);

DFE_DECLARE_AT_LEVELS(
    MomentsTiles moments_tiles(const MomentsArguments&);
    void merge_parts(const MergeArguments&, int64_t begin, int64_t end, float* scratch);
    ApplyLines apply_lines(const ApplyArguments&);)

}  // namespace dfe
