// From the sums of a tile to y and its moments (conv2d.cu).
#pragma once

#include "conv2d_load.h"

namespace dfe {

// Where a tile of `tile_pixels` of the moments begins in a block's tile, and which pixels are its: kernels/conv2d_cuda.py `moment_pixels` says which are
// possible, so that every one lies in one block, and has one writer.

// 8 values of the residual at pixel (h, w) of sample `n`, resampled.
template <typename T>
__device__ __forceinline__ void load_residual(const Conv2dCall<T>& call, int sample, int h, int w, int output, int count, float (&to)[8]) {
    const bool aligned = (call.aligned & ALIGNED_RESIDUAL) != 0;
    if (call.residual_resample == RESAMPLE_DOWN) {
        const T* const from = call.residual + (int64_t{sample} * 4 * call.height * call.width + int64_t{4} * h * call.width + 2 * w) * call.pitch_residual;
#pragma unroll
        for (int k = 0; k < 8; ++k) to[k] = 0.0f;
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            float values[8];
            const int64_t there = quarter % 2 + quarter / 2 * 2 * call.width;
            unpack<T>(load_group(from + there * call.pitch_residual + output, count, aligned), values);
#pragma unroll
            for (int k = 0; k < 8; ++k) to[k] += 0.25f * values[k];
        }
        return;
    }
    const int up = call.residual_resample == RESAMPLE_UP ? 1 : 0, width = call.width >> up;
    const int64_t there = int64_t{sample} * (call.height >> up) * width + int64_t{h >> up} * width + (w >> up);
    unpack<T>(load_group(call.residual + there * call.pitch_residual + output, count, aligned), to);
}

// Sum over the lanes that hold the same outputs; the same in all of them.
template <typename Tile>
__device__ __forceinline__ float sum_of_rows(float value) {
#pragma unroll
    for (int distance = Tile::OUTPUT_GROUPS; distance < 32; distance *= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

// partial: for each fragment of 16 pixels and output of the block, the mean and the sum of squared differences from it.
template <typename Tile>
__device__ __forceinline__ float* partial_moments(unsigned char* shared) {
    return reinterpret_cast<float*>(shared + Tile::WARPS_M * Tile::WARPS_N * Tile::STAGING_BYTES);
}

// y of the block, by warps that pass one fragment of 16 pixels after the other through shared memory, so that a lane has 8 neighbouring outputs.
template <typename T, typename Tile>
__device__ __forceinline__ void write_outputs(const Conv2dCall<T>& call, const Conv2dPlace& place, int sample, int first,
                                              const float (&sums)[Tile::FRAGMENTS][2 * Tile::PAIRS][4], unsigned char* shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int warp_m = warp / Tile::WARPS_N, warp_n = warp % Tile::WARPS_N;
    const int column = warp_n * Tile::WARP_OUTPUTS + lane % Tile::OUTPUT_GROUPS * 8, output = first + column, count = call.outputs - output;
    unsigned char* const staging = shared + warp * Tile::STAGING_BYTES;
    const int swapped = staging_swapped<Tile>(lane);
    float bias[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) bias[k] = call.bias != nullptr && k < count ? __ldg(call.bias + int64_t{sample} * call.bias_pitch + output + k) : 0.0f;
    T* const y = call.y + int64_t{sample} * call.height * call.width * call.pitch_y + output;
#pragma unroll
    for (int m = 0; m < Tile::FRAGMENTS; ++m) {
        const int fragment = warp_m * Tile::FRAGMENTS + m;
        __syncwarp();
#pragma unroll
        for (int n = 0; n < 2 * Tile::PAIRS; ++n) {
#pragma unroll
            for (int below = 0; below < 2; ++below) {
                *reinterpret_cast<float2*>(staging + staging_write<Tile>(lane, n, below)) = float2{sums[m][n][2 * below], sums[m][n][2 * below + 1]};
            }
        }
        __syncwarp();
        float written[Tile::PASSES][8];
#pragma unroll
        for (int pass = 0; pass < Tile::PASSES; ++pass) {
            const float4 one = *reinterpret_cast<const float4*>(staging + staging_read<Tile>(lane, pass, 0));
            const float4 two = *reinterpret_cast<const float4*>(staging + staging_read<Tile>(lane, pass, 1));
            const float4 low = swapped != 0 ? two : one, high = swapped != 0 ? one : two;
            float z[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int k = 0; k < 8; ++k) z[k] += bias[k];
            activate(z, call.act);
            const int pixel = 16 * fragment + staging_row<Tile>(lane, pass), h = place.top + place.row(pixel), w = place.left + place.column(pixel);
            const bool inside = place.inside(pixel) && count > 0;
            if (inside && call.residual != nullptr) {
                float rest[8];
                load_residual(call, sample, h, w, output, count, rest);
#pragma unroll
                for (int k = 0; k < 8; ++k) z[k] += rest[k];
            }
            Vector<T> vector;
            vector.words = pack<T>(z);
            if (inside) {
                T* const to = y + (int64_t{h} * call.width + w) * call.pitch_y;
                if ((call.aligned & ALIGNED_Y) != 0 && count >= 8) {
                    *reinterpret_cast<uint4*>(to) = vector.words;
                } else {
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        if (k < count) to[k] = vector.values[k];
                    }
                }
            }
            unpack<T>(inside ? vector.words : uint4{0, 0, 0, 0}, written[pass]);
        }
        if (call.moments == nullptr) continue;
        const int pixels = place.fragment_pixels(fragment);
        const float share = pixels == 0 ? 0.0f : fast_reciprocal(static_cast<float>(pixels));
        float* const to = partial_moments<Tile>(shared) + 2 * (fragment * Tile::OUTPUTS + column);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            float sum = 0.0f, squares = 0.0f;
#pragma unroll
            for (int pass = 0; pass < Tile::PASSES; ++pass) sum += written[pass][k];
            const float mean = sum_of_rows<Tile>(sum) * share;
#pragma unroll
            for (int pass = 0; pass < Tile::PASSES; ++pass) {
                const float off = written[pass][k] - mean;
                if (place.inside(16 * fragment + staging_row<Tile>(lane, pass))) squares += off * off;
            }
            squares = sum_of_rows<Tile>(squares);
            if (lane < Tile::OUTPUT_GROUPS) to[2 * k] = mean, to[2 * k + 1] = squares;
        }
    }
}

// Merges the partial moments of the fragments of each tile of the moments, in order.
template <typename T, typename Tile>
__device__ __forceinline__ void write_moments(const Conv2dCall<T>& call, const Conv2dPlace& place, int sample, int first, unsigned char* shared) {
    const float* const partial = partial_moments<Tile>(shared);
    const int fragments = call.tile_pixels / 16, slots = Tile::PIXELS / call.tile_pixels;
    const int tiles = (call.height * call.width + call.tile_pixels - 1) / call.tile_pixels;
    for (int i = static_cast<int>(threadIdx.x); i < slots * Tile::OUTPUTS; i += Tile::THREADS) {
        const int slot = i / Tile::OUTPUTS, column = i % Tile::OUTPUTS, begin = slot * call.tile_pixels;
        if (first + column >= call.outputs || !place.inside(begin)) continue;
        float mean = 0.0f, squares = 0.0f, count = 0.0f;
        for (int f = slot * fragments; f < (slot + 1) * fragments; ++f) {
            const float more = static_cast<float>(place.fragment_pixels(f));
            if (more == 0.0f) continue;
            const float* const of = partial + 2 * (f * Tile::OUTPUTS + column);
            const float apart = of[0] - mean, share = more / (count + more);
            squares += of[1] + apart * apart * count * share;
            mean += apart * share;
            count += more;
        }
        float* const to = call.moments + (int64_t{sample} * tiles + place.flat(begin) / call.tile_pixels) * 2 * call.outputs + first + column;
        to[0] = mean;
        to[call.outputs] = squares;
    }
}

}  // namespace dfe
