// The op `conv2d` on tensor cores (formula: kernels/conv2d.py; launcher and packing: kernels/conv2d_cuda.py; index arithmetic: common/conv2d_tile.h).
//
// An implicit GEMM. A block makes a tile of pixels of one sample times a block of outputs. Chunk by chunk of the input channels, the input with its
// halo is copied to shared memory, with zeros outside the image, while the chunk before it is multiplied; there it is normalised and activated once,
// and then read once for each tap of the kernel, shifted. The weights of one chunk and one tap are a stage of a ring that copies run ahead in.
#include "conv2d_block.h"

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

template <typename T, typename Tile, bool HalfSums>
__device__ __forceinline__ void conv2d_block(const Conv2dCall<T>& call, unsigned char* shared) {
    const int lane = this_thread<Tile>() % 32, warp_n = this_thread<Tile>() / 32 % Tile::WARPS_N;
    Conv2dBlock<T, Tile, Tile::STAGES - 1> block(call, shared);
    uint32_t input[Tile::FRAGMENTS];
    first_reads<Tile>(block.place, shared_address(block.inputs), input);
    const unsigned char* const weights = shared + weight_offset<Tile>(0, warp_n * Tile::PAIRS, lane);
    const int taps = block.taps, chunks = block.loader.chunks();
    int ring = 0;

    float sums[Tile::FRAGMENTS][2 * Tile::PAIRS][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int buffer = chunk % 2 * block.buffer_bytes;
        // The chunk was copied beside the last chunk's first tap: long ago, where there are more taps than stages.
        if (taps == 1 || chunk == 0) {
            copy_async_wait<0>();
            __syncthreads();
        }
        block.loader.finish(chunk, block.inputs + buffer);
        TapWalk tap(buffer);
#pragma unroll 1
        for (int left = taps; left > 0; --left) {
            // The stage has arrived for all threads, and so has the input; those before are read by none, and their places are free.
            copy_async_wait<Tile::STAGES - 2>();
            __syncthreads();
            if (left == taps && chunk + 1 < chunks) block.loader.copy(chunk + 1, block.inputs + block.buffer_bytes - buffer);
            block.copy_stage(ring == 0 ? Tile::STAGES - 1 : ring - 1);
            multiply_stage<T, Tile, HalfSums>(sums, input, tap.offset, weights + ring * Tile::STAGE_BYTES);
            ring = ring + 1 == Tile::STAGES ? 0 : ring + 1;
            tap.advance<T, Tile>(call, block.place);
        }
    }

    write_block<T, Tile>(call, block.sample, block.first, sums, shared);
}

}  // namespace dfe

#define DFE_CONV2D_TILE(NAME, ...)                                                 \
    namespace dfe {                                                                \
    using Conv2d_##NAME = Conv2dTile<__VA_ARGS__>;                                 \
    }                                                                              \
    DFE_CONV2D(float16_##NAME, dfe::half, Conv2d_##NAME, dfe::conv2d_block, false) \
    DFE_CONV2D(bfloat16_##NAME, dfe::bfloat16, Conv2d_##NAME, dfe::conv2d_block, false)

DFE_CONV2D_TILES(DFE_CONV2D_TILE)
DFE_CONV2D(half_sums_128x64, dfe::half, Conv2d_128x64, dfe::conv2d_block, true)
