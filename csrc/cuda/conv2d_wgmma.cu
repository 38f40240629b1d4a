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
    constexpr int PARTS = 9 - AHEAD, RUNS = (Tile::VECTORS + PARTS - 1) / PARTS;  // of the next chunk, from tap AHEAD on
    static_assert(AHEAD >= 1 && Tile::STEPS % 2 == 0 && Tile::WARPS_N == 1 && Tile::WARPS_M % 4 == 0, "not a tile of warpgroups");

    const int first = static_cast<int>(blockIdx.x) * Tile::OUTPUTS, sample = static_cast<int>(blockIdx.z);
    const Conv2dPlace place = place_of<T, Tile>(call, static_cast<int>(blockIdx.y));
    const int halo_pixels = halo_pixels_of<T, Tile>(call, place), buffer_bytes = halo_pixels * Tile::PITCH;
    unsigned char* const inputs = shared + STAGES * Tile::STAGE_BYTES;
    uint32_t input[Tile::FRAGMENTS];
    first_reads<Tile>(place, shared_address(inputs), input);
    const uint64_t weights = matrix_descriptor(shared_address(shared), WEIGHT_LEADING, WEIGHT_STRIDE);

    InputLoader<T, Tile> loader(call, place, sample, halo_pixels, inputs + 2 * buffer_bytes);
    WeightCopier<T, Tile> copier(call, first, shared_address(shared));
    const int taps = call.kernel * call.kernel;
    int stages_to_copy = loader.chunks() * taps, ring = 0;  // those to multiply are AHEAD more
    loader.copy(0, inputs);
#pragma unroll 1
    for (int stage = 0; stage < AHEAD; ++stage) {
        if (stages_to_copy-- > 0) copier.copy(call, stage);
        copy_async_commit();
    }

    float sums[Tile::FRAGMENTS][2 * Tile::PAIRS][4] = {};
    uint32_t pixels[2][Tile::FRAGMENTS][4];
#pragma unroll 1
    for (int chunk = 0; stages_to_copy > -AHEAD; ++chunk) {
        const bool more = stages_to_copy > taps - AHEAD;  // chunks to come
        const int buffer = chunk % 2 * buffer_bytes;
        unsigned char* const next = inputs + buffer_bytes - buffer;
        if (taps == 1 || chunk == 0) {
            copy_async_wait<0>();
            __syncthreads();
            loader.finish(chunk, inputs + buffer);
        }
        TapWalk walk(buffer);
#pragma unroll 1
        for (int tap = 0; tap < taps; ++tap) {
            // The stage has arrived for all threads, and so has the input; the products of those before the last have been made, and their places in
            // the ring are free.
            copy_async_wait<AHEAD - 1>();
            async_proxy_fence();
            __syncthreads();
            if (tap == 0 && more) loader.copy(chunk + 1, next);
            if (stages_to_copy-- > 0) copier.copy(call, ring < 2 ? ring + STAGES - 2 : ring - 2);
            copy_async_commit();
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
                    loader.finish(chunk + 1, next, (tap - AHEAD) * RUNS, (tap - AHEAD + 1) * RUNS);
                    __syncwarp();
                }
                wgmma_wait<1>();
            }
            ring = ring + 1 == STAGES ? 0 : ring + 1;
            walk.advance<T, Tile>(call, place);
        }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < Tile::FRAGMENTS; ++m) arrived(sums[m]);
    write_block<T, Tile>(call, sample, first, sums, shared);
}

}  // namespace dfe

#define DFE_CONV2D_WGMMA_TILE(NAME, ...)                                              \
    namespace dfe {                                                                   \
    using Conv2d_##NAME = Conv2dTile<__VA_ARGS__>;                                    \
    }                                                                                 \
    DFE_CONV2D(float16_##NAME, dfe::half, Conv2d_##NAME, dfe::conv2d_wgmma_block)     \
    DFE_CONV2D(bfloat16_##NAME, dfe::bfloat16, Conv2d_##NAME, dfe::conv2d_wgmma_block)

DFE_CONV2D_WGMMA_TILES(DFE_CONV2D_WGMMA_TILE)
