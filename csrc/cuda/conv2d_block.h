// What stands around the main loops of conv2d (conv2d.cu, conv2d_wgmma.cu): where a block is, what it reads, how it ends, and the kernels' signature.
#pragma once

#include "conv2d_epilogue.h"
#include "conv2d_load.h"
#include "kernel.h"

namespace dfe {

// The place of tile number `tile` of a sample.
template <typename T, typename Tile>
__device__ __forceinline__ Conv2dPlace place_of(const Conv2dCall<T>& call, int tile) {
    const int width = 1 << call.tile_shift, height = Tile::PIXELS >> call.tile_shift, across = (call.width + width - 1) >> call.tile_shift;
    const int halo_width = width + 2 * call.dilation * (call.kernel / 2);
    return {call.tile_shift, halo_width, tile / across * height, tile % across * width, call.height, call.width};
}
template <typename T, typename Tile>
__device__ __forceinline__ int halo_pixels_of(const Conv2dCall<T>& call, const Conv2dPlace& place) {
    return place.halo_width * ((Tile::PIXELS >> call.tile_shift) + 2 * call.dilation * (call.kernel / 2));
}

// Where the lane's row of each of the warp's fragments is for the first tap. inputs: address of the first buffer of input.
template <typename Tile>
__device__ __forceinline__ void first_reads(const Conv2dPlace& place, uint32_t inputs, uint32_t (&input)[Tile::FRAGMENTS]) {
    const int lane = this_thread<Tile>() % 32, warp_m = this_thread<Tile>() / 32 / Tile::WARPS_N;
#pragma unroll
    for (int m = 0; m < Tile::FRAGMENTS; ++m) {
        const int pixel = (warp_m * Tile::FRAGMENTS + m) * 16 + fragment_pixel(lane);
        input[m] = inputs + input_offset<Tile>(place.first_read(pixel), 0) + fragment_offset(lane, 0);
    }
}

// The taps in order; offset: what a tap adds to all the addresses of first_reads, from `buffer` on.
struct TapWalk {
    uint32_t offset;
    int column = 0;

    __device__ __forceinline__ explicit TapWalk(int buffer) : offset(buffer) {}

    template <typename T, typename Tile>
    __device__ __forceinline__ void advance(const Conv2dCall<T>& call, const Conv2dPlace& place) {
        offset += call.dilation * Tile::PITCH;
        if (++column == call.kernel) {
            column = 0;
            offset += call.dilation * (place.halo_width - call.kernel) * Tile::PITCH;
        }
    }
};

// What a block's main loop needs, and how it begins: copies of the first chunk of input and of Ahead stages of weights are under way.
template <typename T, typename Tile, int Ahead>
struct Conv2dBlock {
    const Conv2dCall<T>& call;
    const int first, sample;  // of the outputs
    const Conv2dPlace place;
    const int halo_pixels, buffer_bytes;  // of one of the two buffers of input
    unsigned char* const inputs;
    InputLoader<T, Tile> loader;
    WeightCopier<T, Tile> copier;
    const int taps;
    int stages_to_copy;

    __device__ __forceinline__ Conv2dBlock(const Conv2dCall<T>& given, unsigned char* shared)
        : call(given),
          first(static_cast<int>(blockIdx.x) * Tile::OUTPUTS),
          sample(static_cast<int>(blockIdx.z)),
          place(place_of<T, Tile>(given, static_cast<int>(blockIdx.y))),
          halo_pixels(halo_pixels_of<T, Tile>(given, place)),
          buffer_bytes(halo_pixels * Tile::PITCH),
          inputs(shared + Tile::STAGES * Tile::STAGE_BYTES),
          loader(given, place, sample, halo_pixels, inputs + 2 * buffer_bytes),
          copier(given, first, shared_address(shared)),
          taps(given.kernel * given.kernel),
          stages_to_copy(loader.chunks() * taps) {
        loader.copy(0, inputs);
#pragma unroll 1
        for (int stage = 0; stage < Ahead; ++stage) copy_stage(stage);
    }

    // Starts the copy of the next stage of weights to a place of the ring.
    __device__ __forceinline__ void copy_stage(int ring) {
        if (stages_to_copy-- > 0) copier.copy(call, ring);
        copy_async_commit();
    }
};

// What follows the main loop, whose shared memory it takes.
template <typename T, typename Tile>
__device__ __forceinline__ void write_block(const Conv2dCall<T>& call, int sample, int first,
                                            const float (&sums)[Tile::FRAGMENTS][2 * Tile::PAIRS][4], unsigned char* shared) {
    copy_async_wait<0>();
    __syncthreads();
    const Conv2dPlace written = place_of<T, Tile>(call, block_y_anew());
    write_outputs<T, Tile>(call, written, sample, first, sums, shared);
    if (call.moments == nullptr) return;
    __syncthreads();
    write_moments<T, Tile>(call, written, sample, first, shared);
}

}  // namespace dfe

// A kernel conv2d_NAME, of BLOCK<TYPE, TILE, ...>(call, shared memory). Blocks that share their input follow each other: blockIdx.x counts outputs,
// y tiles of pixels, z samples.
#define DFE_CONV2D(NAME, TYPE, TILE, BLOCK, ...)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(dfe::TILE::THREADS, dfe::TILE::BLOCKS) conv2d_##NAME(                                               \
        const TYPE* x, const TYPE* x2, const TYPE* weight, const float* bias, const float* scale, const float* offset, const TYPE* residual,         \
        TYPE* y, float* moments, int height, int width, int height_in, int width_in, int pitch, int pitch2, int pitch_residual, int pitch_y,         \
        int bias_pitch, int channels, int channels2, int outputs, int kernel, int dilation, int resample, int prologue, int residual_resample,       \
        int act, int tile_shift, int tile_pixels, int aligned) {                                                                                     \
        DFE_DYNAMIC_SHARED(unsigned char, shared);                                                                                                   \
        const dfe::Conv2dCall<TYPE> call{x,        x2,       weight,   bias,     scale,          offset,  residual,   y,         moments,           \
                                         height,   width,    height_in, width_in, pitch,         pitch2,  pitch_residual, pitch_y, bias_pitch,      \
                                         channels, channels2, outputs,  kernel,   dilation,      resample, prologue,  residual_resample, act,       \
                                         tile_shift, tile_pixels, aligned};                                                                         \
        BLOCK<TYPE, dfe::TILE, ##__VA_ARGS__>(call, shared);                                                                                         \
    }                                                                                                                                                \
    DFE_KERNEL(conv2d_##NAME)
