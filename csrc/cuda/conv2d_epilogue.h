// From the sums of a tile to y and its moments (conv2d.cu).
#pragma once

#include "conv2d_load.h"

namespace dfe {

// Rows and columns of the residual for an image of `size`.
__device__ __forceinline__ int residual_size(int size, int residual_resample) {
    return residual_resample == RESAMPLE_UP ? size >> 1 : residual_resample == RESAMPLE_DOWN ? size << 1 : size;
}

// 8 neighbouring numbers of a table, 0 where there is none and past its `count` ones.
__device__ __forceinline__ void load_bias(const float* from, int64_t index, int count, float (&to)[8]) {
    if (from != nullptr && reinterpret_cast<size_t>(from + index) % 16 == 0 && count >= 8) {
#pragma unroll
        for (int k = 0; k < 8; k += 4) {
            const float4 four = __ldg(reinterpret_cast<const float4*>(from + index + k));
            to[k] = four.x, to[k + 1] = four.y, to[k + 2] = four.z, to[k + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int k = 0; k < 8; ++k) to[k] = from != nullptr && k < count ? __ldg(from + index + k) : 0.0f;
    }
}

// The same 8 outputs of neighbouring pixels, both loads under way together.
template <typename T>
__device__ __forceinline__ void load_neighbours(const T* from, int pitch, int count, bool aligned, uint4 (&to)[2]) {
    if (aligned && count >= 8) {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[i] = __ldg(reinterpret_cast<const uint4*>(from + i * pitch));
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) to[i] = load_group(from + i * pitch, count, false);
    }
}

// The mean of 2 x 2 values, for 8 outputs; two loads under way at a time, for want of registers.
template <typename T>
__device__ __forceinline__ void mean_of_four(const T* from, int width, int pitch, int count, bool aligned, float (&mean)[8]) {
#pragma unroll
    for (int k = 0; k < 8; ++k) mean[k] = 0.0f;
#pragma unroll 1
    for (int row = 0; row < 2; ++row) {
        uint4 words[2];
        load_neighbours(from + int64_t{row * width} * pitch, pitch, count, aligned, words);
#pragma unroll
        for (int column = 0; column < 2; ++column) {
            float values[8];
            unpack<T>(words[column], values);
#pragma unroll
            for (int k = 0; k < 8; ++k) mean[k] += 0.25f * values[k];
        }
    }
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

// Of one fragment: a lane holds 8 outputs of some of its pixels, rounded as they are written.
template <typename T, typename Tile>
__device__ __forceinline__ void write_partial_moments(const Conv2dPlace& place, int fragment, int lane, const uint4 (&words)[Tile::PASSES],
                                                      float* to) {
    const int pixels = place.fragment_pixels(fragment);
    const float share = pixels == 0 ? 0.0f : fast_reciprocal(static_cast<float>(pixels));
    float means[8] = {}, squares[8] = {};
#pragma unroll
    for (int pass = 0; pass < Tile::PASSES; ++pass) {
        float written[8];
        unpack<T>(words[pass], written);
        const bool inside = place.inside(16 * fragment + staging_row<Tile>(lane, pass));
#pragma unroll
        for (int k = 0; k < 8; ++k) means[k] += inside ? written[k] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) means[k] = sum_of_rows<Tile>(means[k]) * share;
#pragma unroll
    for (int pass = 0; pass < Tile::PASSES; ++pass) {
        float written[8];
        unpack<T>(words[pass], written);
        const bool inside = place.inside(16 * fragment + staging_row<Tile>(lane, pass));
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float off = inside ? written[k] - means[k] : 0.0f;
            squares[k] += off * off;
        }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        squares[k] = sum_of_rows<Tile>(squares[k]);
        if (lane < Tile::OUTPUT_GROUPS) to[2 * k] = means[k], to[2 * k + 1] = squares[k];
    }
}

// y of the block, by warps that pass one fragment of 16 pixels after the other through shared memory, so that a lane has 8 neighbouring outputs.
template <typename T, typename Tile>
__device__ __forceinline__ void write_outputs(const Conv2dCall<T>& call, const Conv2dPlace& place, int sample, int first,
                                              const float (&sums)[Tile::FRAGMENTS][2 * Tile::PAIRS][4], unsigned char* shared) {
    const int lane = this_thread<Tile>() % 32, warp = this_thread<Tile>() / 32;
    const int warp_m = warp / Tile::WARPS_N, warp_n = warp % Tile::WARPS_N;
    const int column = warp_n * Tile::WARP_OUTPUTS + lane % Tile::OUTPUT_GROUPS * 8, output = first + column, count = call.outputs - output;
    unsigned char* const staging = shared + warp * Tile::STAGING_BYTES;
    const int swapped = staging_swapped<Tile>(lane);
    float bias[8];
    load_bias(call.bias, int64_t{sample} * call.bias_pitch + output, count, bias);
    T* const y = call.y + int64_t{sample} * call.height * call.width * call.pitch_y + output;
    const int rest_height = residual_size(call.height, call.residual_resample), rest_width = residual_size(call.width, call.residual_resample);
    const int64_t rest_before = int64_t{sample} * rest_height * rest_width * call.pitch_residual + output;
    const T* const residual = call.residual == nullptr ? nullptr : call.residual + rest_before;
    const bool rest_aligned = (call.aligned & ALIGNED_RESIDUAL) != 0, down = call.residual_resample == RESAMPLE_DOWN;
#pragma unroll 1
    for (int m = 0; m < Tile::FRAGMENTS; ++m) {
        const int fragment = warp_m * Tile::FRAGMENTS + m;
        uint4 words[Tile::PASSES];  // of the residual, then of y
#pragma unroll
        for (int pass = 0; pass < Tile::PASSES; ++pass) {
            words[pass] = uint4{0, 0, 0, 0};
            const int pixel = 16 * fragment + staging_row<Tile>(lane, pass), up = call.residual_resample == RESAMPLE_UP ? 1 : 0;
            if (residual == nullptr || down || !place.inside(pixel)) continue;
            const int there = ((place.top + place.row(pixel)) >> up) * rest_width + ((place.left + place.column(pixel)) >> up);
            words[pass] = load_group(residual + int64_t{there} * call.pitch_residual, count, rest_aligned);
        }
        __syncwarp();
        // The sums are in registers, whose number must be known: one of these is taken.
#pragma unroll
        for (int of = 0; of < Tile::FRAGMENTS; ++of) {
            if (of != m) continue;
#pragma unroll
            for (int n = 0; n < 2 * Tile::PAIRS; ++n) {
#pragma unroll
                for (int below = 0; below < 2; ++below) {
                    const float2 two{sums[of][n][2 * below], sums[of][n][2 * below + 1]};
                    *reinterpret_cast<float2*>(staging + staging_write<Tile>(lane, n, below)) = two;
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < Tile::PASSES; ++pass) {
            const int pixel = 16 * fragment + staging_row<Tile>(lane, pass), h = place.top + place.row(pixel), w = place.left + place.column(pixel);
            const bool inside = place.inside(pixel);
            float rest[8];
            unpack<T>(words[pass], rest);
            if (residual != nullptr && down && inside) {
                const T* const first_of_four = residual + int64_t{2 * (h * rest_width + w)} * call.pitch_residual;
                mean_of_four(first_of_four, rest_width, call.pitch_residual, count, rest_aligned, rest);
            }
            const float4 one = *reinterpret_cast<const float4*>(staging + staging_read<Tile>(lane, pass, 0));
            const float4 two = *reinterpret_cast<const float4*>(staging + staging_read<Tile>(lane, pass, 1));
            const float4 low = swapped != 0 ? two : one, high = swapped != 0 ? one : two;
            float z[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int k = 0; k < 8; ++k) z[k] += bias[k];
            activate(z, call.act);
#pragma unroll
            for (int k = 0; k < 8; ++k) z[k] += rest[k];
            words[pass] = pack<T>(z);
            if (!inside) continue;
            T* const to = y + int64_t{h * call.width + w} * call.pitch_y;
            if ((call.aligned & ALIGNED_Y) != 0 && count >= 8) {
                *reinterpret_cast<uint4*>(to) = words[pass];
            } else {
                Vector<T> vector;
                vector.words = words[pass];
#pragma unroll
                for (int k = 0; k < 8; ++k) {
                    if (k < count) to[k] = vector.values[k];
                }
            }
        }
        if (call.moments != nullptr) {
            float* const to = partial_moments<Tile>(shared) + 2 * (fragment * Tile::OUTPUTS + column);
            write_partial_moments<T, Tile>(place, fragment, lane, words, to);
        }
    }
}

// Merges the partial moments of the fragments of each tile of the moments, in order. These are runs of the block's pixels, each the work of one block
// (kernels/conv2d_cuda.py, `moment_run`).
template <typename T, typename Tile>
__device__ __forceinline__ void write_moments(const Conv2dCall<T>& call, const Conv2dPlace& place, int sample, int first, unsigned char* shared) {
    const float* const partial = partial_moments<Tile>(shared);
    const int fragments = call.tile_pixels / 16, slots = Tile::PIXELS / call.tile_pixels;
    const int tiles = (call.height * call.width + call.tile_pixels - 1) / call.tile_pixels;
    for (int i = this_thread<Tile>(); i < slots * Tile::OUTPUTS; i += Tile::THREADS) {
        const int slot = i / Tile::OUTPUTS, column = i % Tile::OUTPUTS, begin = slot * call.tile_pixels;
        if (first + column >= call.outputs || !place.inside(begin)) continue;
        float mean = 0.0f, squares = 0.0f, count = 0.0f;
        for (int f = slot * fragments; f < (slot + 1) * fragments; ++f) {
            const float more = static_cast<float>(place.fragment_pixels(f));
            if (more == 0.0f) continue;
            const float* const of = partial + 2 * (f * Tile::OUTPUTS + column);
            const float apart = of[0] - mean, share = more * fast_reciprocal(count + more);
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
