// The op `conv2d` on the CPU (formula: kernels/conv2d.py), a band of rows at a time. The band's input, normalised, activated, resampled,
// concatenated and padded with zeros, lies in scratch that stays in the second-level cache; the GEMM reads it there by shifted pointers, one
// for each tap; what it sums goes block by block, in the first-level cache, through bias, activation and residual into y and the moments.
#pragma once

#include <cstdint>

#include "../common/activation.h"
#include "../common/convert.h"
#include "levels.h"
#include "product.h"

namespace dfe {

enum class Resample : int { none = 0, down = 1, up = 2 };

// Sums of `count` blocks of pixels with a block of outputs. a: the first pixel, in elements of the product's type; pixel i of run r starts at
// a + starts[r] + i * pitch and `length` values from there take part. b: the weights of the block's outputs. c: (pixels, outputs), written.
struct BlockArguments {
    const void* a;
    int64_t pitch;
    const int64_t* starts;
    int64_t runs, length;
    const void* b;
    float* c;  // int32 where the product is of bytes
    int64_t step;  // values of a run that one tile takes; divides length
    int64_t count;
};
using Block = void (*)(const BlockArguments&);

// A multiplier and the size of its block; `begin` and `end` stand around a thread's blocks, or are null.
struct Multiplier {
    Block block;
    int64_t pixels, most, outputs;  // at most `most` blocks of pixels at a time
    void (*begin)(int64_t step, void* state);
    void (*end)(void* state);
};
constexpr int64_t STATE_BYTES = 64;  // of begin and end

// Of the vectors of the compiled level, and of the instructions for bfloat16 and bytes; `outputs` is 16 or 32, of floats also 1, 2 or 4, whose sums
// stand as those of 16.
DFE_DECLARE_AT_LEVELS(Multiplier float_multiplier(int64_t outputs);)
Multiplier pairs_multiplier(int64_t outputs);
Multiplier tiles_multiplier(int64_t outputs);
Multiplier fours_multiplier(int64_t outputs);
Multiplier byte_tiles_multiplier(int64_t outputs);

struct Conv2dArguments {
    int64_t batch, height, width, outputs;  // of y
    int64_t channels_1, channels_2;         // of x and x2
    int64_t kernel, dilation;
    FloatType type;  // of x, x2, residual and y
    const void *x, *x2, *residual;
    void* y;
    int64_t pitch_x, pitch_x2, pitch_residual, pitch_y;  // elements from a pixel to the next
    Resample resample, residual_resample;
    Activation prologue, activation;
    const float *scale, *offset;  // (batch, channels), or null
    const float* bias;            // (outputs) or (batch, outputs), or null
    int64_t bias_pitch;           // from a sample to the next: 0 or outputs
    float* moments;               // (batch, tiles, 2, outputs), or null
    int64_t tile_pixels;

    // The product and its weights: (blocks, kernel * kernel * padded channels, outputs of a block), with channels interleaved where a word
    // holds several of them: (blocks, words, outputs of a block, 2 of bfloat16 or 4 bytes).
    Product product;
    const void* weights;
    // Where the product is of bytes: what is multiplied is steps_per_unit times the input, plus zero, rounded, in 0 to 255; factors (2, blocks *
    // outputs of a block): a sum s of output o means factors[0][o] s + factors[1][o].
    float steps_per_unit, zero;
    const float* factors;
    int64_t padded;  // channels of a pixel in the band
    Multiplier multiplier;

    // From plan_conv2d. The band's pixel (row r, column c) is its pixel margin + r * row + c: the zeros right of a row are those left of the next.
    int64_t margin, row, band_rows, bands, blocks;
    int64_t splits, split_blocks;  // of the output blocks among threads, where there are fewer bands than threads
    bool inner_blocks;             // whether all output blocks follow at each block of pixels, or all pixels at each output block
    bool fused_moments;            // whether no tile of moments crosses a band
    bool direct;                   // whether x is read where it lies: a 1x1 kernel, and nothing to do before it
    int64_t starts[9], runs, length, step;
    int64_t scratch_floats;  // of a thread
};

// Fill in the plan for up to `threads` threads; the number of items (splits x samples x bands).
int64_t plan_conv2d(Conv2dArguments& arguments, int threads);

// `items` [begin, end) of the convolution; `moments`: tiles [begin, end) of all samples, where they are not fused.
struct Conv2dPasses {
    void (*items)(const Conv2dArguments&, int64_t begin, int64_t end, float* scratch);
    void (*moments)(const Conv2dArguments&, int64_t begin, int64_t end);
};

DFE_DECLARE_AT_LEVELS(Conv2dPasses conv2d_passes(const Conv2dArguments&);)

}  // namespace dfe
