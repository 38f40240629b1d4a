// Where everything lies in the tensor-core convolution (csrc/cuda/conv2d.cu): index arithmetic for host and device, without any memory access.
//
// A thread block makes a tile of 2^n-pixel rows times a block of outputs. For each chunk of input channels the input of the tile with its halo
// lies in shared memory as one row for each pixel; a row is 16 bytes longer than its channels, an odd multiple of 16 bytes, so that eight
// neighbouring pixels lie in eight different groups of banks and a tap of the kernel is the addition of one number to every address.
#pragma once

#include "portable.h"

namespace dfe {

// PIXELS x OUTPUTS of a block, CHANNELS of a chunk, warps along both; STAGES of the ring of weights; VECTORS: runs of 8 channels that a thread loads,
// at most; BLOCKS: thread blocks meant to share a multiprocessor. The input has two buffers: the next chunk arrives beside the present one.
template <int PIXELS_, int OUTPUTS_, int CHANNELS_, int WARPS_M_, int WARPS_N_, int STAGES_, int VECTORS_, int BLOCKS_>
struct Conv2dTile {
    static constexpr int PIXELS = PIXELS_, OUTPUTS = OUTPUTS_, CHANNELS = CHANNELS_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = STAGES_;
    static constexpr int VECTORS = VECTORS_, BLOCKS = BLOCKS_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    // Of a warp: fragments of 16 pixels, and pairs of fragments of 8 outputs.
    static constexpr int FRAGMENTS = PIXELS / WARPS_M / 16, PAIRS = OUTPUTS / WARPS_N / 16, WARP_OUTPUTS = 16 * PAIRS;
    static constexpr int STEPS = CHANNELS / 16;    // of 16 channels, in a chunk
    static constexpr int GROUPS = CHANNELS / 8;    // of 8 channels, in a chunk
    static constexpr int PITCH = 2 * CHANNELS + 16;  // bytes of a pixel
    static constexpr int FACTORS = 2 * CHANNELS;     // of the prologue, for a chunk
    static constexpr int STEP_BYTES = 32 * OUTPUTS, STAGE_BYTES = STEPS * STEP_BYTES;  // of weights
    static constexpr int STAGE_RUNS = STAGE_BYTES / 16;
    // The epilogue passes fragments through shared memory: 16 rows of float32 for each warp, 32 bytes longer than their outputs.
    static constexpr int STAGING_PITCH = 4 * WARP_OUTPUTS + 32, STAGING_BYTES = 16 * STAGING_PITCH;
    static constexpr int OUTPUT_GROUPS = WARP_OUTPUTS / 8, STAGING_ROWS = 32 / OUTPUT_GROUPS, PASSES = 16 / STAGING_ROWS;
    static constexpr int EPILOGUE_BYTES = WARPS_M * WARPS_N * STAGING_BYTES + PIXELS / 16 * OUTPUTS * 8;
    static_assert(PIXELS % (16 * WARPS_M) == 0 && OUTPUTS % (16 * WARPS_N) == 0 && CHANNELS % 16 == 0 && STAGES >= 2, "not a tile");
    static_assert((PITCH / 16) % 2 == 1 && THREADS % (8 * GROUPS) == 0, "not a tile");
};

// Name, then the parameters of Conv2dTile; kernels/conv2d_cuda.py holds the same table.
#define DFE_CONV2D_TILES(F)                   \
    F(128x128, 128, 128, 32, 2, 4, 2, 3, 2)   \
    F(128x128w4, 128, 128, 32, 2, 2, 3, 6, 2) \
    F(256x128, 256, 128, 32, 4, 2, 3, 7, 1)   \
    F(128x64, 128, 64, 32, 4, 2, 4, 4, 2)     \
    F(128x64x16, 128, 64, 16, 4, 2, 4, 2, 2)  \
    F(64x64, 64, 64, 32, 2, 2, 4, 5, 4)       \
    F(128x16, 128, 16, 32, 8, 1, 4, 4, 2)

// The same for conv2d_wgmma.cu: four warps along pixels are a warpgroup.
#define DFE_CONV2D_WGMMA_TILES(F)                  \
    F(wgmma_128x256, 128, 256, 64, 8, 1, 4, 8, 1)  \
    F(wgmma_256x128, 256, 128, 64, 8, 1, 4, 13, 1) \
    F(wgmma_128x128, 128, 128, 64, 4, 1, 3, 15, 2) \
    F(wgmma_128x64, 128, 64, 64, 8, 1, 4, 8, 2)    \
    F(wgmma_64x128, 64, 128, 64, 4, 1, 3, 9, 2)

// The loader's run v = thread + i * threads: a pixel of the halo and a group of 8 channels. Eight neighbouring threads take two groups of four pixels
// two apart: whole sectors of 32 bytes to load, eight different groups of banks to store.
template <typename Tile>
DFE_HD int loader_pixel(int v) {
    return v / (8 * Tile::GROUPS) * 8 + (v % 8) / 2 * 2 + v / 8 % Tile::GROUPS % 2;
}
template <typename Tile>
DFE_HD int loader_group(int v) {
    return v / 8 % Tile::GROUPS / 2 * 2 + v % 2;
}
// Bytes from the start of a buffer of input.
template <typename Tile>
DFE_HD int input_offset(int halo_pixel, int group) {
    return halo_pixel * Tile::PITCH + group * 16;
}

// A tile as it lies in the image: rows of 2^shift pixels.
struct Conv2dPlace {
    int shift, halo_width;  // halo_width: pixels of a row with its halo
    int top, left;          // of the tile, in the image
    int height, width;      // of the image

    DFE_HD_MEMBER int row(int pixel) const { return pixel >> shift; }
    DFE_HD_MEMBER int column(int pixel) const { return pixel & ((1 << shift) - 1); }
    // The pixel of the halo that a pixel of the tile reads through the first tap.
    DFE_HD_MEMBER int first_read(int pixel) const { return row(pixel) * halo_width + column(pixel); }
    DFE_HD_MEMBER bool inside(int pixel) const { return top + row(pixel) < height && left + column(pixel) < width; }
    // In the image's row order.
    DFE_HD_MEMBER int flat(int pixel) const { return (top + row(pixel)) * width + left + column(pixel); }
    // Pixels of fragment f, the 16 from 16 f on, that lie in the image; a row has 8 pixels or more.
    DFE_HD_MEMBER int fragment_pixels(int f) const {
        int count = 0;
        for (int half = 0; half < 2; ++half) {
            const int pixel = 16 * f + 8 * half, left_over = width - left - column(pixel);
            if (top + row(pixel) < height && left_over > 0) count += left_over < 8 ? left_over : 8;
        }
        return count;
    }
};

// Of ldmatrix.x4: the pixel of a fragment whose row a lane addresses, and the bytes from there to its 8 channels. Lanes 0 to 15 take the first half
// of a step, lanes 16 to 31 the second.
DFE_HD int fragment_pixel(int lane) {
    return lane % 16;
}
DFE_HD int fragment_offset(int lane, int step) {
    return lane / 16 * 16 + step * 32;
}

// Bytes from the start of a stage of weights to a lane's 16: both registers of two fragments of 8 outputs.
template <typename Tile>
DFE_HD int weight_offset(int step, int pair, int lane) {
    return ((step * (Tile::OUTPUTS / 16) + pair) * 32 + lane) * 16;
}

// Of wgmma's core matrices: bytes from the first 8 channels of a step to the others, and from 8 outputs to the next.
constexpr int WEIGHT_LEADING = 128, WEIGHT_STRIDE = 256;

// The epilogue's staging: where a lane writes two sums of a fragment's row lane / 4 (and 8 below), and where it reads half a group of 8 outputs. The
// halves change places in every second row (of wide rows: in every second 128 bytes), so that no two of eight lanes meet in a bank.
template <typename Tile>
DFE_HD int staging_write(int lane, int eighth, int below) {
    return (lane / 4 + 8 * below) * Tile::STAGING_PITCH + eighth * 32 + lane % 4 * 8;
}
template <typename Tile>
DFE_HD int staging_row(int lane, int pass) {
    return pass * Tile::STAGING_ROWS + lane / Tile::OUTPUT_GROUPS;
}
template <typename Tile>
DFE_HD int staging_swapped(int lane) {
    return Tile::OUTPUT_GROUPS >= 8 ? lane / 4 % 2 : lane / Tile::OUTPUT_GROUPS % 2;
}
template <typename Tile>
DFE_HD int staging_read(int lane, int pass, int turn) {
    const int half = turn ^ staging_swapped<Tile>(lane);
    return staging_row<Tile>(lane, pass) * Tile::STAGING_PITCH + lane % Tile::OUTPUT_GROUPS * 32 + half * 16;
}

}  // namespace dfe
