// The op `conv2d` on tensor cores (formula: kernels/conv2d.py; launcher and packing: kernels/conv2d_cuda.py; index arithmetic: common/conv2d_tile.h).
//
// An implicit GEMM. A block makes a tile of pixels of one sample times a block of outputs. Chunk by chunk of the input channels, the input with its
// halo is copied to shared memory, with zeros outside the image, while the chunk before it is multiplied; there it is normalised and activated once,
// and then read once for each tap of the kernel, shifted. The weights of one chunk and one tap are a stage of a ring that copies run ahead in.
#include "conv2d_epilogue.h"
#include "conv2d_load.h"
#include "kernel.h"

namespace dfe {

// The lane's part of the second factors of one step, for the warp's outputs.
template <typename Tile>
__device__ __forceinline__ void load_weights(uint32_t (&b)[2 * Tile::PAIRS][2], const unsigned char* weights, int step) {
#pragma unroll
    for (int pair = 0; pair < Tile::PAIRS; ++pair) {
        const uint4 words = *reinterpret_cast<const uint4*>(weights + weight_offset<Tile>(step, pair, 0));
        b[2 * pair][0] = words.x, b[2 * pair][1] = words.y;
        b[2 * pair + 1][0] = words.z, b[2 * pair + 1][1] = words.w;
    }
}

// One stage: sums += input, shifted by a tap, times its weights. input: where the lane's row of each of the warp's fragments is; weights: the lane's.
// HalfSums: the products of the stage (CHANNELS of them) are summed in float16, stages in float32.
template <typename T, typename Tile, bool HalfSums>
__device__ __forceinline__ void multiply_stage(float (&sums)[Tile::FRAGMENTS][2 * Tile::PAIRS][4], const uint32_t (&input)[Tile::FRAGMENTS],
                                               uint32_t tap, const unsigned char* weights) {
    if constexpr (!HalfSums) {
#pragma unroll
        for (int step = 0; step < Tile::STEPS; ++step) {
            uint32_t b[2 * Tile::PAIRS][2];
            load_weights<Tile>(b, weights, step);
#pragma unroll
            for (int m = 0; m < Tile::FRAGMENTS; ++m) {
                uint32_t a[4];
                ldmatrix_x4(a, input[m] + tap + step * 32);
                multiply_add<T>(sums[m], a, b);
            }
        }
    } else {
        uint32_t b[Tile::STEPS][2 * Tile::PAIRS][2];
#pragma unroll
        for (int step = 0; step < Tile::STEPS; ++step) load_weights<Tile>(b[step], weights, step);
#pragma unroll
        for (int m = 0; m < Tile::FRAGMENTS; ++m) {
            uint32_t part[2 * Tile::PAIRS][2] = {};
#pragma unroll
            for (int step = 0; step < Tile::STEPS; ++step) {
                uint32_t a[4];
                ldmatrix_x4(a, input[m] + tap + step * 32);
                multiply_add_half(part, a, b[step]);
            }
#pragma unroll
            for (int n = 0; n < 2 * Tile::PAIRS; ++n) {
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    float first, second;
                    unpack(part[n][below], first, second, half{});
                    sums[m][n][2 * below] += first;
                    sums[m][n][2 * below + 1] += second;
                }
            }
        }
    }
}

// The place of tile number `tile` of a sample.
template <typename T, typename Tile>
__device__ __forceinline__ Conv2dPlace place_of(const Conv2dCall<T>& call, int tile) {
    const int width = 1 << call.tile_shift, height = Tile::PIXELS >> call.tile_shift, across = (call.width + width - 1) >> call.tile_shift;
    const int halo_width = width + 2 * call.dilation * (call.kernel / 2);
    return {call.tile_shift, halo_width, tile / across * height, tile % across * width, call.height, call.width};
}

template <typename T, typename Tile, bool HalfSums>
__device__ __forceinline__ void conv2d_block(const Conv2dCall<T>& call, unsigned char* shared) {
    const int lane = this_thread<Tile>() % 32, warp = this_thread<Tile>() / 32;
    const int warp_m = warp / Tile::WARPS_N, warp_n = warp % Tile::WARPS_N;
    // Blocks that share their input follow each other.
    const int first = static_cast<int>(blockIdx.x) * Tile::OUTPUTS, sample = static_cast<int>(blockIdx.z);
    const Conv2dPlace place = place_of<T, Tile>(call, static_cast<int>(blockIdx.y));
    const int halo_pixels = place.halo_width * ((Tile::PIXELS >> call.tile_shift) + 2 * call.dilation * (call.kernel / 2));

    unsigned char* const inputs = shared + Tile::STAGES * Tile::STAGE_BYTES;
    const int buffer_bytes = halo_pixels * Tile::PITCH;
    uint32_t input[Tile::FRAGMENTS];
#pragma unroll
    for (int m = 0; m < Tile::FRAGMENTS; ++m) {
        const int pixel = (warp_m * Tile::FRAGMENTS + m) * 16 + fragment_pixel(lane);
        input[m] = shared_address(inputs) + input_offset<Tile>(place.first_read(pixel), 0) + fragment_offset(lane, 0);
    }
    const unsigned char* const weights = shared + weight_offset<Tile>(0, warp_n * Tile::PAIRS, lane);

    InputLoader<T, Tile> loader(call, place, sample, halo_pixels, inputs + 2 * buffer_bytes);
    WeightCopier<T, Tile> copier(call, first, shared_address(shared));
    const int taps = call.kernel * call.kernel, chunks = loader.chunks();
    int stages_to_copy = chunks * taps, ring = 0;
    loader.copy(0, inputs);
#pragma unroll 1
    for (int stage = 0; stage < Tile::STAGES - 1; ++stage) {
        if (stages_to_copy-- > 0) copier.copy(call, stage);
        copy_async_commit();
    }

    float sums[Tile::FRAGMENTS][2 * Tile::PAIRS][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int buffer = chunk % 2 * buffer_bytes;
        // The chunk was copied beside the last chunk's first tap: long ago, where there are more taps than stages.
        if (taps == 1 || chunk == 0) {
            copy_async_wait<0>();
            __syncthreads();
        }
        loader.finish(chunk, inputs + buffer);
        int column = 0;
        uint32_t tap = buffer;
#pragma unroll 1
        for (int left = taps; left > 0; --left) {
            // The stage has arrived for all threads, and so has the input; those before are read by none, and their places are free.
            copy_async_wait<Tile::STAGES - 2>();
            __syncthreads();
            if (left == taps && chunk + 1 < chunks) loader.copy(chunk + 1, inputs + buffer_bytes - buffer);
            if (stages_to_copy-- > 0) copier.copy(call, ring == 0 ? Tile::STAGES - 1 : ring - 1);
            copy_async_commit();
            multiply_stage<T, Tile, HalfSums>(sums, input, tap, weights + ring * Tile::STAGE_BYTES);
            ring = ring + 1 == Tile::STAGES ? 0 : ring + 1;
            tap += call.dilation * Tile::PITCH;
            if (++column == call.kernel) {
                column = 0;
                tap += call.dilation * (place.halo_width - call.kernel) * Tile::PITCH;
            }
        }
    }

    copy_async_wait<0>();
    __syncthreads();
    const Conv2dPlace written = place_of<T, Tile>(call, block_y_anew());
    write_outputs<T, Tile>(call, written, sample, first, sums, shared);
    if (call.moments == nullptr) return;
    __syncthreads();
    write_moments<T, Tile>(call, written, sample, first, shared);
}

}  // namespace dfe

#define DFE_CONV2D(NAME, TYPE, TILE, HALF_SUMS)                                                                                                      \
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
        dfe::conv2d_block<TYPE, dfe::TILE, HALF_SUMS>(call, shared);                                                                                 \
    }                                                                                                                                                \
    DFE_KERNEL(conv2d_##NAME)

#define DFE_CONV2D_TILE(NAME, ...)                                       \
    namespace dfe {                                                      \
    using Conv2d_##NAME = Conv2dTile<__VA_ARGS__>;                       \
    }                                                                    \
    DFE_CONV2D(float16_##NAME, dfe::half, Conv2d_##NAME, false)          \
    DFE_CONV2D(bfloat16_##NAME, dfe::bfloat16, Conv2d_##NAME, false)

DFE_CONV2D_TILES(DFE_CONV2D_TILE)
DFE_CONV2D(half_sums_128x64, dfe::half, Conv2d_128x64, true)
