// The ops `upsample_bilinear` and `max_pool` on the CPU (formulas: kernels/resample.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "levels.h"

namespace dfe {

struct ResampleArguments {
    const void* x;  // (batch, height, width, channels)
    void* y;
    FloatType type;
    int64_t batch, height, width, channels;  // of x
    int64_t x_stride, y_stride;              // from one pixel to the next
    bool stream;                             // upsample_bilinear writes past the caches
};

// Output rows [begin, end) of those of all images; `scratch`: (width + 2) * channels floats for upsample_bilinear.
using ResampleRows = void (*)(const ResampleArguments&, int64_t begin, int64_t end, float* scratch);

DFE_DECLARE_AT_LEVELS(
    void upsample_bilinear_rows(const ResampleArguments&, int64_t begin, int64_t end, float* scratch);
    void max_pool_rows(const ResampleArguments&, int64_t begin, int64_t end, float* scratch);)

}  // namespace dfe
