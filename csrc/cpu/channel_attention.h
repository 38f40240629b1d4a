// The op `channel_attention` on the CPU (formula: kernels/channel_attention.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "levels.h"

namespace dfe {

struct ChannelAttentionArguments {
    int64_t batch, height, width, channels, hidden;
    FloatType type;  // of x, residual and y: (batch, height, width, channels), each with its distance from one pixel to the next
    const void *x, *residual;  // residual may be null
    void* y;
    int64_t x_stride, residual_stride, y_stride;
    const float *w1, *w2;                       // (hidden, channels) each, or null without the channel gate
    const float *spatial_weight, *spatial_bias;  // (7, 7, 2) and (1), or null without the spatial gate
    float* pooled;                              // (batch, 2, channels): sums over the pixels, maxima
    float* gate;                                // (batch, channels)
    bool stream;                                // y is written past the caches

    // From plan_channel_attention. The maps of a thread's rows lie in planes of `pitch` columns, with the zeros of the padding around them;
    // y is written `step_rows` rows at a time, so that x is still in the second-level cache when it is read for the last time.
    int64_t pitch, step_rows;
    int64_t scratch_floats;  // that a thread needs
};

// Fill in what follows from the shape.
void plan_channel_attention(ChannelAttentionArguments& arguments);

// For sample n: `pool` fills pooled for channels [begin, end), `gate` makes the channel gate of it, `apply` writes rows [begin, end) of y and
// computes the maps it needs around them itself.
struct ChannelAttentionPasses {
    void (*pool)(const ChannelAttentionArguments&, int64_t n, int64_t begin, int64_t end, float* scratch);
    void (*gate)(const ChannelAttentionArguments&, int64_t n, float* scratch);
    void (*apply)(const ChannelAttentionArguments&, int64_t n, int64_t begin, int64_t end, float* scratch);
};

DFE_DECLARE_AT_LEVELS(ChannelAttentionPasses channel_attention(const ChannelAttentionArguments&);)

}  // namespace dfe
