// conv2d.cu with a main loop for sm_90a: a warpgroup multiplies 64 pixels at a time by `wgmma`, first factors from registers, weights from shared
// memory. What it reads and how it ends is the same.
//
// Products run in the background, one step of 16 channels after the other: while those of a step are made, the pixels of the next are read into the
// other registers, and the next chunk of input is normalised and activated, a part of it in each of the last taps.
#include "conv2d_block.h"
#include "wgmma.h"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "conv2d_wgmma.cu is for sm_90a"
#endif

namespace dfe {

template <typename T, typename Tile>
__device__ __forceinline__ void conv2d_wgmma_block(const Conv2dCall<T>& call, unsigned char* shared) {
    constexpr int STAGES = Tile::STAGES, AHEAD = STAGES - 2;  // the last step of the stage before is still multiplied
    constexpr unsigned PARTS = 9 - AHEAD, RUNS = Tile::VECTORS;  // of the next chunk: one part behind each tap from AHEAD on
    static_assert(AHEAD >= 1 && Tile::STEPS % 2 == 0 && Tile::WARPS_N == 1 && Tile::WARPS_M % 4 == 0, "not a tile of warpgroups");
    static_assert(RUNS <= 16, "the loader knows 16 runs");

    Conv2dBlock<T, Tile, AHEAD> block(call, shared);  // whose stages to copy are those to multiply less AHEAD
    uint32_t input[Tile::FRAGMENTS];
    first_reads<Tile>(block.place, shared_address(block.inputs), input);
    const uint64_t weights = matrix_descriptor(shared_address(shared), WEIGHT_LEADING, WEIGHT_STRIDE);
    const int taps = block.taps;
    int ring = 0;

    float sums[Tile::FRAGMENTS][2 * Tile::PAIRS][4] = {};
    uint32_t pixels[2][Tile::FRAGMENTS][4];
#pragma unroll 1
    for (int chunk = 0; block.stages_to_copy > -AHEAD; ++chunk) {
        const bool more = block.stages_to_copy > taps - AHEAD;  // chunks to come
        const int buffer = chunk % 2 * block.buffer_bytes;
        unsigned char* const next = block.inputs + block.buffer_bytes - buffer;
        if (taps == 1 || chunk == 0) {
            copy_async_wait<0>();
            __syncthreads();
            block.loader.finish(chunk, block.inputs + buffer);
        }
        TapWalk walk(buffer);
#pragma unroll 1
        for (int tap = 0; tap < taps; ++tap) {
            // The stage has arrived for all threads, and so has the input; the products of those before the last have been made, and their places in
            // the ring are free.
            copy_async_wait<AHEAD - 1>();
            async_proxy_fence();
            __syncthreads();
            if (tap == 0 && more) block.loader.copy(chunk + 1, next);
            __syncwarp();
            block.copy_stage(ring < 2 ? ring + STAGES - 2 : ring - 2);
            const uint64_t stage = weights + ring * (Tile::STAGE_BYTES / 16);
#pragma unroll
            for (int step = 0; step < Tile::STEPS; ++step) {
                uint32_t(&a)[Tile::FRAGMENTS][4] = pixels[step % 2];
#pragma unroll
                for (int m = 0; m < Tile::FRAGMENTS; ++m) ldmatrix_x4(a[m], input[m] + walk.offset + step * 32);
                wgmma_fence();
#pragma unroll
                for (int m = 0; m < Tile::FRAGMENTS; ++m) wgmma<T>(sums[m], a[m], stage + step * (Tile::STEP_BYTES / 16));
                wgmma_commit();
                // The copies of the chunk to come were started AHEAD taps ago or more.
                if (step == 1 && tap >= AHEAD && more) {
                    const unsigned part = tap - AHEAD;
                    block.loader.finish(chunk + 1, next, part * RUNS / PARTS, (part + 1) * RUNS / PARTS);
                    __syncwarp();
                }
                wgmma_wait<1>();
            }
            ring = ring + 1 == STAGES ? 0 : ring + 1;
            walk.advance<T, Tile>(call, block.place);
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Tile::FRAGMENTS; ++m) arrived(sums[m]);
    write_block<T, Tile>(call, block.sample, block.first, sums, shared);
}

}  // namespace dfe

#define DFE_CONV2D_WGMMA_TILE(NAME, ...)                                              \
    namespace dfe {                                                                   \
    using Conv2d_##NAME = Conv2dTile<__VA_ARGS__>;                                    \
    }                                                                                 \
    DFE_CONV2D(float16_##NAME, dfe::half, Conv2d_##NAME, dfe::conv2d_wgmma_block)     \
    DFE_CONV2D(bfloat16_##NAME, dfe::bfloat16, Conv2d_##NAME, dfe::conv2d_wgmma_block)

DFE_CONV2D_WGMMA_TILES(DFE_CONV2D_WGMMA_TILE)
