// The two loaders of conv2d.cu: input, normalised and activated once on its way into shared memory, and packed weights, copied in the background.
#pragma once

#include "../common/conv2d_tile.h"
#include "tensor_core.h"
#include "vectors.h"

namespace dfe {

constexpr int RESAMPLE_NONE = 0, RESAMPLE_DOWN = 1, RESAMPLE_UP = 2;       // kernels/conv2d.py: RESAMPLES
constexpr int ACT_GELU = 1, ACT_SILU = 2, ACT_RELU = 3, ACT_SIGMOID = 4;  // kernels/conv2d.py: ACTIVATIONS
constexpr int ALIGNED_X = 1, ALIGNED_X2 = 2, ALIGNED_RESIDUAL = 4, ALIGNED_Y = 8;  // kernels/conv2d_cuda.py: pixels start at multiples of 16 bytes

// The arguments of the kernel (kernels/conv2d.py); pitches in values.
template <typename T>
struct Conv2dCall {
    const T *x, *x2, *weight;
    const float *bias, *scale, *offset;
    const T* residual;
    T* y;
    float* moments;
    int height, width, height_in, width_in, pitch, pitch2, pitch_residual, pitch_y, bias_pitch, channels, channels2, outputs, kernel, dilation;
    int resample, prologue, residual_resample, act, tile_shift, tile_pixels, aligned;
};

__device__ __forceinline__ void activate(float (&z)[8], int act) {
    if (act == ACT_GELU) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[k] = gelu_to_16_bits(z[k]);
    } else if (act == ACT_SILU) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[k] *= fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
    } else if (act == ACT_RELU) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[k] = activated<Activation::relu>(z[k]);
    } else if (act == ACT_SIGMOID) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[k] = fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
    }
}

template <typename T>
__device__ __forceinline__ void unpack(uint4 words, float (&to)[8]) {
    unpack(words.x, to[0], to[1], T{});
    unpack(words.y, to[2], to[3], T{});
    unpack(words.z, to[4], to[5], T{});
    unpack(words.w, to[6], to[7], T{});
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&from)[8]) {
    return uint4{pack(from[0], from[1], T{}), pack(from[2], from[3], T{}), pack(from[4], from[5], T{}), pack(from[6], from[7], T{})};
}

// The first `count` of 8 values, zeros after them; count may be 8 or more, or negative.
template <typename T>
__device__ __forceinline__ uint4 load_group(const T* from, int count, bool aligned) {
    if (aligned && count >= 8) return __ldg(reinterpret_cast<const uint4*>(from));
    Vector<T> vector;
#pragma unroll
    for (int k = 0; k < 8; ++k) vector.values[k].bits = k < count ? from[k].bits : uint16_t{0};
    return vector.words;
}

// A thread's share of the input of a tile.
template <typename T, typename Tile>
struct InputLoader {
    static constexpr int OUTSIDE = -1, BEYOND = -2;  // outside the image: zeros; beyond the halo: nothing is stored

    const Conv2dCall<T>& call;
    const T *x, *x2;
    const float *scale, *offset;
    int chunks_of_x;
    int pixels[Tile::VECTORS];  // of the input: where each of the thread's runs is read
    uint4 raw[Tile::VECTORS];   // of the chunk to be stored next

    __device__ __forceinline__ InputLoader(const Conv2dCall<T>& given, const Conv2dPlace& place, int sample, int halo_pixels) : call(given) {
        const int64_t pixels_in = int64_t{call.height_in} * call.width_in;
        x = call.x + sample * pixels_in * call.pitch;
        x2 = call.x2 == nullptr ? nullptr : call.x2 + sample * pixels_in * call.pitch2;
        const int64_t channels = call.channels + call.channels2;
        scale = call.scale == nullptr ? nullptr : call.scale + sample * channels;
        offset = call.offset == nullptr ? nullptr : call.offset + sample * channels;
        chunks_of_x = (call.channels + Tile::CHANNELS - 1) / Tile::CHANNELS;
        const int margin = call.dilation * (call.kernel / 2);
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            const int pixel = loader_pixel<Tile>(static_cast<int>(threadIdx.x) + i * Tile::THREADS), row = pixel / place.halo_width;
            const int h = place.top + row - margin, w = place.left + pixel - row * place.halo_width - margin;
            if (pixel >= halo_pixels) pixels[i] = BEYOND;
            else if (h < 0 || h >= place.height || w < 0 || w >= place.width) pixels[i] = OUTSIDE;
            else if (call.resample == RESAMPLE_UP) pixels[i] = (h >> 1) * call.width_in + (w >> 1);
            else if (call.resample == RESAMPLE_DOWN) pixels[i] = 2 * (h * call.width_in + w);
            else pixels[i] = h * call.width_in + w;
        }
    }

    __device__ __forceinline__ int chunks() const { return chunks_of_x + (call.channels2 + Tile::CHANNELS - 1) / Tile::CHANNELS; }

    // Of the thread's 8 channels in a chunk: where they lie, how many of them there are (more than 8 where others follow), and their place in scale.
    struct Channels {
        const T* from;
        int pitch, count, index;
        bool aligned;
    };
    __device__ __forceinline__ Channels channels_of(int chunk) const {
        const bool second = chunk >= chunks_of_x;
        const int channel = (chunk - (second ? chunks_of_x : 0)) * Tile::CHANNELS + 8 * loader_group<Tile>(static_cast<int>(threadIdx.x));
        return {(second ? x2 : x) + channel, second ? call.pitch2 : call.pitch, (second ? call.channels2 : call.channels) - channel,
                channel + (second ? call.channels : 0), (call.aligned & (second ? ALIGNED_X2 : ALIGNED_X)) != 0};
    }

    // Starts the loads of a chunk; means of 2 x 2 are loaded in `store`, there are no registers for four times as many values.
    __device__ __forceinline__ void load(int chunk) {
        if (call.resample == RESAMPLE_DOWN) return;
        const Channels at = channels_of(chunk);
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            raw[i] = uint4{0, 0, 0, 0};
            if (pixels[i] >= 0) raw[i] = load_group(at.from + int64_t{pixels[i]} * at.pitch, at.count, at.aligned);
        }
    }

    // The chunk to shared memory. Channels past the last are 0 here: so are their scale and offset, and every activation of 0.
    __device__ __forceinline__ void store(int chunk, unsigned char* to) const {
        const Channels at = channels_of(chunk);
        float gain[8], shift[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            gain[k] = scale == nullptr ? 1.0f : k < at.count ? __ldg(scale + at.index + k) : 0.0f;
            shift[k] = scale == nullptr || k >= at.count ? 0.0f : __ldg(offset + at.index + k);
        }
        const bool plain = scale == nullptr && call.prologue == 0;
        const int thread = static_cast<int>(threadIdx.x);
        unsigned char* const mine = to + input_offset<Tile>(loader_pixel<Tile>(thread), loader_group<Tile>(thread));
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            if (pixels[i] == BEYOND) continue;
            uint4 words{0, 0, 0, 0};
            if (pixels[i] >= 0) {
                if (call.resample == RESAMPLE_DOWN) words = mean_of_four(at, pixels[i], gain, shift);
                else if (plain) words = raw[i];
                else words = pack<T>(applied(raw[i], gain, shift).values);
            }
            *reinterpret_cast<uint4*>(mine + i * (Tile::THREADS / Tile::GROUPS) * Tile::PITCH) = words;
        }
    }

  private:
    struct Values {
        float values[8];
    };
    __device__ __forceinline__ Values applied(uint4 words, const float (&gain)[8], const float (&shift)[8]) const {
        Values v;
        unpack<T>(words, v.values);
#pragma unroll
        for (int k = 0; k < 8; ++k) v.values[k] = v.values[k] * gain[k] + shift[k];
        activate(v.values, call.prologue);
        return v;
    }
    __device__ __forceinline__ uint4 mean_of_four(const Channels& at, int pixel, const float (&gain)[8], const float (&shift)[8]) const {
        float sums[8] = {};
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t there = pixel + quarter % 2 + quarter / 2 * call.width_in;
            const Values v = applied(load_group(at.from + there * at.pitch, at.count, at.aligned), gain, shift);
#pragma unroll
            for (int k = 0; k < 8; ++k) sums[k] += v.values[k];
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] *= 0.25f;
        return pack<T>(sums);
    }
};

// Starts the copy of a stage: the weights of one chunk and one tap, for the block's outputs. packed: (stages, STEPS, fragments16, 32, 8) as
// kernels/conv2d_cuda.py `pack` makes it, from the block's first fragments on, of which `left` exist.
template <typename Tile, typename T>
__device__ __forceinline__ void copy_weights(const T* packed, int stage, int fragments16, int left, uint32_t to) {
    const T* const from = packed + int64_t{stage} * Tile::STEPS * fragments16 * 256;
#pragma unroll
    for (int i = 0; i < (Tile::STAGE_RUNS + Tile::THREADS - 1) / Tile::THREADS; ++i) {
        const int run = static_cast<int>(threadIdx.x) + i * Tile::THREADS;
        if (Tile::STAGE_RUNS % Tile::THREADS != 0 && run >= Tile::STAGE_RUNS) break;
        const int step = run / (2 * Tile::OUTPUTS), pair = run / 32 % (Tile::OUTPUTS / 16), lane = run % 32;
        const bool there = pair < left;
        copy_async_16(to + weight_offset<Tile>(step, pair, lane), there ? from + ((int64_t{step} * fragments16 + pair) * 32 + lane) * 8 : packed, there);
    }
}

}  // namespace dfe
