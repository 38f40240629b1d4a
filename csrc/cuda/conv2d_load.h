// The two loaders of conv2d.cu: input, normalised and activated once on its way into shared memory, and packed weights, copied in the background.
#pragma once

#include "../common/activation.h"
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

// The thread's number; the remainder tells the compiler that it is small and not negative.
template <typename Tile>
__device__ __forceinline__ int this_thread() {
    return static_cast<int>(threadIdx.x % Tile::THREADS);
}

template <int Count>
__device__ __forceinline__ void activate(float (&z)[Count], int act) {
    if (act == ACT_GELU) {
#pragma unroll
        for (int k = 0; k < Count; ++k) z[k] = gelu_to_16_bits(z[k]);
    } else if (act == ACT_SILU) {
#pragma unroll
        for (int k = 0; k < Count; ++k) z[k] *= fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
    } else if (act == ACT_RELU) {
#pragma unroll
        for (int k = 0; k < Count; ++k) z[k] = activated<Activation::relu>(z[k]);
    } else if (act == ACT_SIGMOID) {
#pragma unroll
        for (int k = 0; k < Count; ++k) z[k] = fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
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

// A thread's share of the input of a tile. What can be computed again for every chunk is: registers are short beside the sums.
template <typename T, typename Tile>
struct InputLoader {
    static constexpr int OUTSIDE = -1, BEYOND = -2;  // outside the image: zeros; beyond the halo: nothing is stored

    const Conv2dCall<T>& call;
    const int sample;
    int pixels[Tile::VECTORS];  // of the input: where each of the thread's runs is read
    uint4 raw[Tile::VECTORS];   // of the chunk to be stored next

    __device__ __forceinline__ InputLoader(const Conv2dCall<T>& given, const Conv2dPlace& place, int n, int halo_pixels) : call(given), sample(n) {
        const int margin = call.dilation * (call.kernel / 2);
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            const int pixel = loader_pixel<Tile>(this_thread<Tile>() + i * Tile::THREADS), row = pixel / place.halo_width;
            const int h = place.top + row - margin, w = place.left + pixel - row * place.halo_width - margin;
            if (pixel >= halo_pixels) pixels[i] = BEYOND;
            else if (h < 0 || h >= place.height || w < 0 || w >= place.width) pixels[i] = OUTSIDE;
            else if (call.resample == RESAMPLE_UP) pixels[i] = (h >> 1) * call.width_in + (w >> 1);
            else if (call.resample == RESAMPLE_DOWN) pixels[i] = 2 * (h * call.width_in + w);
            else pixels[i] = h * call.width_in + w;
        }
    }

    __device__ __forceinline__ int chunks_of_x() const { return (call.channels + Tile::CHANNELS - 1) / Tile::CHANNELS; }
    __device__ __forceinline__ int chunks() const { return chunks_of_x() + (call.channels2 + Tile::CHANNELS - 1) / Tile::CHANNELS; }

    // Of the thread's 8 channels in a chunk: where they lie, how many of them there are (more than 8 where others follow), and their place in scale.
    struct Channels {
        const T* from;
        int pitch, count, index;
        bool aligned;
    };
    __device__ __forceinline__ Channels channels_of(int chunk) const {
        const bool second = chunk >= chunks_of_x();
        const int channel = (chunk - (second ? chunks_of_x() : 0)) * Tile::CHANNELS + 8 * loader_group<Tile>(this_thread<Tile>());
        const int pitch = second ? call.pitch2 : call.pitch;
        const int64_t before = int64_t{sample} * call.height_in * call.width_in * pitch;
        return {(second ? call.x2 : call.x) + before + channel, pitch, (second ? call.channels2 : call.channels) - channel,
                channel + (second ? call.channels : 0), (call.aligned & (second ? ALIGNED_X2 : ALIGNED_X)) != 0};
    }

    // Starts the loads of a chunk; what makes means of 2 x 2 is loaded in `store`: there are no registers for four times as many values.
    __device__ __forceinline__ void load(int chunk) {
        const Channels at = channels_of(chunk);
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            raw[i] = uint4{0, 0, 0, 0};
            if (pixels[i] < 0 || call.resample == RESAMPLE_DOWN) continue;
            raw[i] = load_group(at.from + int64_t{pixels[i]} * at.pitch, at.count, at.aligned);
        }
    }

    // The chunk to shared memory.
    __device__ __forceinline__ void store(int chunk, unsigned char* to) {
        if (call.scale != nullptr || call.prologue != 0 || call.resample == RESAMPLE_DOWN) apply(channels_of(chunk));
        const int thread = this_thread<Tile>();
        unsigned char* const mine = to + input_offset<Tile>(loader_pixel<Tile>(thread), loader_group<Tile>(thread));
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            if (pixels[i] != BEYOND) *reinterpret_cast<uint4*>(mine + i * (Tile::THREADS / Tile::GROUPS) * Tile::PITCH) = raw[i];
        }
    }

  private:
    // raw becomes what the product reads, half of the 8 channels at a time. Channels past the last are 0, as are their scale and offset here, and
    // every activation of 0. Pixels outside of the image stay 0.
    __device__ __forceinline__ void apply(const Channels& at) {
        const int64_t index = int64_t{sample} * (call.channels + call.channels2) + at.index;
        const int parts = call.resample == RESAMPLE_DOWN ? 4 : 1;
        const float share = parts == 4 ? 0.25f : 1.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float gain[4], shift[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool there = 4 * half + k < at.count;
                gain[k] = call.scale == nullptr ? 1.0f : there ? __ldg(call.scale + index + 4 * half + k) : 0.0f;
                shift[k] = call.scale == nullptr || !there ? 0.0f : __ldg(call.offset + index + 4 * half + k);
            }
#pragma unroll
            for (int i = 0; i < Tile::VECTORS; ++i) {
                if (pixels[i] < 0) continue;
                float mean[4] = {};
#pragma unroll 1
                for (int part = 0; part < parts; ++part) {
                    uint4 words = raw[i];
                    if (parts != 1) {
                        const int64_t there = pixels[i] + part % 2 + part / 2 * call.width_in;
                        words = load_group(at.from + there * at.pitch, at.count, at.aligned);
                    }
                    float v[4];
                    unpack(half == 0 ? words.x : words.z, v[0], v[1], T{});
                    unpack(half == 0 ? words.y : words.w, v[2], v[3], T{});
#pragma unroll
                    for (int k = 0; k < 4; ++k) v[k] = v[k] * gain[k] + shift[k];
                    activate(v, call.prologue);
#pragma unroll
                    for (int k = 0; k < 4; ++k) mean[k] += v[k] * share;
                }
                (half == 0 ? raw[i].x : raw[i].z) = pack(mean[0], mean[1], T{});
                (half == 0 ? raw[i].y : raw[i].w) = pack(mean[2], mean[3], T{});
            }
        }
    }
};

// A thread's share of the weights: of every stage, which are those of one chunk and one tap for the block's outputs. In packed order (kernels/
// conv2d_cuda.py, `pack`: (stages, STEPS, fragments of 16, 32, 8)) a stage's steps lie apart, in shared memory they follow each other.
template <typename T, typename Tile>
struct WeightCopier {
    // A thread copies at one place of every step, or the threads together need several rounds for a step.
    static constexpr int RUNS_OF_STEP = 2 * Tile::OUTPUTS, ROUNDS = RUNS_OF_STEP > Tile::THREADS ? RUNS_OF_STEP / Tile::THREADS : 1;
    static constexpr int STEPS_AT_ONCE = RUNS_OF_STEP > Tile::THREADS ? 1 : Tile::THREADS / RUNS_OF_STEP;
    static_assert(Tile::THREADS % RUNS_OF_STEP == 0 || RUNS_OF_STEP % Tile::THREADS == 0, "a thread's place would change from step to step");

    int next;  // in runs of 16 bytes
    int left;  // fragments of 16 outputs from the thread's on; zeros are written past the last
    uint32_t to;

    __device__ __forceinline__ WeightCopier(const Conv2dCall<T>& call, int first, uint32_t shared) {
        const int thread = this_thread<Tile>(), pair = first / 16 + thread % RUNS_OF_STEP / 32, fragments = (call.outputs + 15) / 16;
        left = fragments - pair;
        next = (thread / RUNS_OF_STEP * fragments + pair) * 32 + thread % 32;
        to = shared + thread * 16;  // weight_offset(step, pair, lane) is that of the thread's number
    }

    // Starts the copy of the next stage into this place of the ring.
    __device__ __forceinline__ void copy(const Conv2dCall<T>& call, int ring) {
        const int fragments = (call.outputs + 15) / 16;
        const uint4* const from = reinterpret_cast<const uint4*>(call.weight) + next;
#pragma unroll
        for (int i = 0; i * Tile::THREADS < Tile::STAGE_RUNS; ++i) {
            if (Tile::STAGE_RUNS % Tile::THREADS != 0 && this_thread<Tile>() + i * Tile::THREADS >= Tile::STAGE_RUNS) break;
            const int further = i % ROUNDS * Tile::THREADS, step = i / ROUNDS * STEPS_AT_ONCE;
            copy_async_16(to + ring * Tile::STAGE_BYTES + i * Tile::THREADS * 16, from + step * fragments * 32 + further, left > further / 32);
        }
        next += Tile::STEPS * fragments * 32;
    }
};

}  // namespace dfe
