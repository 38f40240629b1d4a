// The op `ingest` on the CPU (formula: kernels/ingest.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "levels.h"

namespace dfe {

enum class PixelType : int { uint8 = 0, uint16 = 1, float32 = 2 };

struct IngestArguments {
    const void* images;  // (batch, height, width, channels), strides in elements
    PixelType pixel_type;
    int64_t batch, height, width, channels;
    int64_t stride_n, stride_y, stride_x, stride_c;
    void* x_0;  // (batch, height, width, channels), contiguous
    void* x_t;  // (scales, batch, height, width, channels), contiguous
    FloatType output_type;
    float gain, offset;  // x_0 = gain * pixel + offset; gain includes the 1 / 255 or 1 / 65535
    int scales;
    float a[2], b[2];
    uint32_t key[2], draw, step;
    const float* noise;  // (scales, height, width, channels), drawn before with the same key, draw and step; or null

    // The division into tiles, from plan_tiles. Images whose rows follow each other without a gap count as one row of height * width pixels.
    // A tile is `tile_pixels` pixels of a row (fewer at its end): so many that its noise stays in the first-level cache.
    int64_t rows, row_length, tile_pixels, tiles_per_row;
    int64_t scratch_floats;  // that a thread needs
};

// Fill in the division into tiles; return the number of tiles.
int64_t plan_tiles(IngestArguments& arguments);

using IngestTiles = void (*)(const IngestArguments&, bool stream, int64_t begin, int64_t end, float* scratch);

DFE_DECLARE_AT_LEVELS(void ingest_tiles(const IngestArguments&, bool stream, int64_t begin, int64_t end, float* scratch);)

}  // namespace dfe
