// The two loaders of conv2d.cu, both by copies in the background: input, normalised and activated once where it arrives, and packed weights.
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

template <int Act, int Count>
__device__ __forceinline__ void activate(float (&z)[Count]) {
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        if constexpr (Act == ACT_GELU) z[k] = gelu_to_16_bits(z[k]);
        if constexpr (Act == ACT_SILU) z[k] *= fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
        if constexpr (Act == ACT_RELU) z[k] = activated<Activation::relu>(z[k]);
        if constexpr (Act == ACT_SIGMOID) z[k] = fast_reciprocal(1.0f + fast_exp2(-1.44269504f * z[k]));
    }
}
template <int Count>
__device__ __forceinline__ void activate(float (&z)[Count], int act) {
    if (act == ACT_GELU) activate<ACT_GELU>(z);
    else if (act == ACT_SILU) activate<ACT_SILU>(z);
    else if (act == ACT_RELU) activate<ACT_RELU>(z);
    else if (act == ACT_SIGMOID) activate<ACT_SIGMOID>(z);
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

// The same group of 2 x 2 pixels: four loads under way together.
template <typename T>
__device__ __forceinline__ void load_four(const T* from, int width, int pitch, int count, bool aligned, uint4 (&to)[4]) {
    if (aligned && count >= 8) {
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            to[part] = __ldg(reinterpret_cast<const uint4*>(from + int64_t{part % 2 + part / 2 * width} * pitch));
        }
    } else {
#pragma unroll
        for (int part = 0; part < 4; ++part) to[part] = load_group(from + int64_t{part % 2 + part / 2 * width} * pitch, count, false);
    }
}

// A thread's share of the input of a tile: runs of 8 channels of a pixel, for each chunk. They are copied to shared memory in the background while
// the chunk before is multiplied, and normalised and activated there, each by the thread that copied it: no barrier stands between, and no register
// waits for memory during the products.
template <typename T, typename Tile>
struct InputLoader {
    static constexpr int OUTSIDE = -1;                           // of the image: zeros
    static constexpr int STRIDE = Tile::THREADS / Tile::GROUPS;  // pixels of the halo from one run to the thread's next

    const Conv2dCall<T>& call;
    const int sample;
    float* const factors;      // in shared memory: scale of the chunk's channels, then offset
    const int* const sources;  // in shared memory: what `source` says of each pixel of the halo
    unsigned runs = 0;         // bit i: run i is in the halo; bit 16 + i: in the image too

    // numbers: in shared memory, Tile::FACTORS and one for each pixel of the halo.
    __device__ __forceinline__ InputLoader(const Conv2dCall<T>& given, const Conv2dPlace& place, int n, int halo_pixels, void* numbers)
        : call(given), sample(n), factors(static_cast<float*>(numbers)), sources(static_cast<const int*>(numbers) + Tile::FACTORS) {
        int* const table = static_cast<int*>(numbers) + Tile::FACTORS;
        for (int pixel = this_thread<Tile>(); pixel < halo_pixels; pixel += Tile::THREADS) table[pixel] = source(place, pixel);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            const int pixel = loader_pixel<Tile>(this_thread<Tile>()) + i * STRIDE;
            if (pixel < halo_pixels) runs |= (table[pixel] == OUTSIDE ? 1u : 0x10001u) << i;
        }
    }

    __device__ __forceinline__ int chunks_of_x() const { return (call.channels + Tile::CHANNELS - 1) / Tile::CHANNELS; }
    __device__ __forceinline__ int chunks() const { return chunks_of_x() + (call.channels2 + Tile::CHANNELS - 1) / Tile::CHANNELS; }

    // Starts the copies of a chunk to `to`, and of its factors; means of 2 x 2, and runs that are not whole and aligned, are left to `finish`.
    __device__ __forceinline__ void copy(int chunk, unsigned char* to) const {
        const int thread = computed_anew(this_thread<Tile>());
        const Channels at = channels_of(computed_anew(chunk), thread);
        if (call.scale != nullptr && thread < Tile::FACTORS) {
            const int channel = thread % Tile::CHANNELS;
            const int64_t before = int64_t{computed_anew(sample)} * (call.channels + call.channels2) + (at.second ? call.channels : 0);
            const float* const of = (thread < Tile::CHANNELS ? call.scale : call.offset) + before + at.first + channel;
            copy_async_4(shared_address(factors + thread), of, channel < at.left);
        }
        if (!at.copied) return;
        const uint32_t mine = shared_address(to) + first_run(thread);
        const bool there = at.group < at.left;
        const T* const start = from(at);
        const int* const pixels = sources + loader_pixel<Tile>(thread);
#pragma unroll
        for (int i = 0; i < Tile::VECTORS; ++i) {
            if (!in_halo(i)) continue;
            const int pixel = pixels[i * STRIDE];
            copy_async_16(mine + i * STRIDE * Tile::PITCH, start + int64_t{pixel} * at.pitch, there && pixel != OUTSIDE);
        }
    }

    // The copies of the chunk to `to` have arrived, the factors for all threads: it becomes what the product reads. Of the thread's runs, those from
    // `begin` to `end`.
    __device__ __forceinline__ void finish(int chunk, unsigned char* to, int begin = 0, int end = Tile::VECTORS) const {
        const int thread = computed_anew(this_thread<Tile>());
        const Channels at = channels_of(computed_anew(chunk), thread);
        unsigned char* const mine = to + first_run(thread);
        const bool down = call.resample == RESAMPLE_DOWN;
        const int* const pixels = sources + loader_pixel<Tile>(thread);
        if (!at.copied && !down) gather(at, pixels, mine, begin, end);
        if (call.scale == nullptr && call.prologue == 0 && !down) return;
        if (call.prologue == ACT_GELU) apply<ACT_GELU>(at, pixels, mine, down, begin, end);
        else if (call.prologue == ACT_SILU) apply<ACT_SILU>(at, pixels, mine, down, begin, end);
        else if (call.prologue == ACT_RELU) apply<ACT_RELU>(at, pixels, mine, down, begin, end);
        else apply<0>(at, pixels, mine, down, begin, end);
    }

  private:
    __device__ __forceinline__ bool in_halo(int i) const { return (runs >> i & 1) != 0; }
    __device__ __forceinline__ bool in_image(int i) const { return (runs >> (16 + i) & 1) != 0; }

    // Of a chunk: which source it is of, from which channel on; where the thread's 8 channels lie in it, how many channels the source has from the
    // chunk's first on; aligned: the runs are 16 aligned bytes, or nothing; copied: so, and as they are.
    struct Channels {
        bool second;
        int first, group, left, pitch;
        bool aligned, copied;
    };
    __device__ __forceinline__ Channels channels_of(int chunk, int thread) const {
        const bool second = chunk >= chunks_of_x();
        const int first = (chunk - (second ? chunks_of_x() : 0)) * Tile::CHANNELS, all = second ? call.channels2 : call.channels;
        const bool aligned = (call.aligned & (second ? ALIGNED_X2 : ALIGNED_X)) != 0 && all % 8 == 0;
        return {second, first, 8 * loader_group<Tile>(thread), all - first, second ? call.pitch2 : call.pitch, aligned,
                aligned && call.resample != RESAMPLE_DOWN};
    }
    // The thread's channels of the sample's pixel 0.
    __device__ __forceinline__ const T* from(const Channels& at) const {
        const int64_t before = int64_t{computed_anew(sample)} * call.height_in * call.width_in * at.pitch;
        return computed_anew((at.second ? call.x2 : call.x) + before + at.first + at.group);
    }

    __device__ __forceinline__ static int first_run(int thread) { return input_offset<Tile>(loader_pixel<Tile>(thread), loader_group<Tile>(thread)); }

    // The pixel of the input where a pixel of the halo is read, the first of four for a mean; or OUTSIDE.
    __device__ __forceinline__ int source(const Conv2dPlace& place, int pixel) const {
        const int margin = call.dilation * (call.kernel / 2), row = pixel / place.halo_width;
        const int h = place.top + row - margin, w = place.left + pixel - row * place.halo_width - margin;
        if (h < 0 || h >= place.height || w < 0 || w >= place.width) return OUTSIDE;
        if (call.resample == RESAMPLE_UP) return (h >> 1) * call.width_in + (w >> 1);
        if (call.resample == RESAMPLE_DOWN) return 2 * (h * call.width_in + w);
        return h * call.width_in + w;
    }

    // What `copy` does, without haste.
    __device__ __forceinline__ void gather(const Channels& at, const int* pixels, unsigned char* mine, int begin, int end) const {
        const T* const start = from(at);
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
            if (!in_halo(i)) continue;
            uint4 words{0, 0, 0, 0};
            if (in_image(i)) words = load_group(start + int64_t{pixels[i * STRIDE]} * at.pitch, at.left - at.group, false);
            *reinterpret_cast<uint4*>(mine + i * STRIDE * Tile::PITCH) = words;
        }
    }

    // Of the thread's channels from number `begin` on.
    template <int Count>
    __device__ __forceinline__ void load_factors(const Channels& at, int begin, float (&gain)[Count], float (&shift)[Count]) const {
#pragma unroll
        for (int k = 0; k < Count; k += 4) {
            float4 four{1.0f, 1.0f, 1.0f, 1.0f}, more{0.0f, 0.0f, 0.0f, 0.0f};
            if (call.scale != nullptr) {
                four = *reinterpret_cast<const float4*>(factors + at.group + begin + k);
                more = *reinterpret_cast<const float4*>(factors + Tile::CHANNELS + at.group + begin + k);
            }
            gain[k] = four.x, gain[k + 1] = four.y, gain[k + 2] = four.z, gain[k + 3] = four.w;
            shift[k] = more.x, shift[k + 1] = more.y, shift[k + 2] = more.z, shift[k + 3] = more.w;
        }
    }

    // Channels past the last are 0, as are their gain and shift, and every activation of 0. Pixels outside of the image stay 0.
    template <int Act>
    __device__ __forceinline__ void apply(const Channels& at, const int* pixels, unsigned char* mine, bool down, int begin, int end) const {
        if (down) return apply_to_means<Act>(at, pixels, mine, begin, end);
        float gain[8], shift[8];
        load_factors(at, 0, gain, shift);
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
            if (!in_image(i)) continue;
            uint4* const run = reinterpret_cast<uint4*>(mine + i * STRIDE * Tile::PITCH);
            float v[8];
            unpack<T>(*run, v);
#pragma unroll
            for (int k = 0; k < 8; ++k) v[k] = v[k] * gain[k] + shift[k];
            activate<Act>(v);
            *run = pack<T>(v);
        }
    }
    // Four runs take as many registers as there are left: gain and shift come anew for each of them, half of the channels at a time.
    template <int Act>
    __device__ __forceinline__ void apply_to_means(const Channels& at, const int* pixels, unsigned char* mine, int begin, int end) const {
        const T* const start = from(at);
#pragma unroll 1
        for (int i = begin; i < end; ++i) {
            if (!in_halo(i)) continue;
            uint32_t halves[2][2] = {};
            if (in_image(i)) {
                uint4 words[4];
                load_four(start + int64_t{pixels[i * STRIDE]} * at.pitch, call.width_in, at.pitch, at.left - at.group, at.aligned, words);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float gain[4], shift[4], mean[4] = {};
                    load_factors(at, 4 * half, gain, shift);
#pragma unroll
                    for (int part = 0; part < 4; ++part) {
                        float v[4];
                        unpack(half == 0 ? words[part].x : words[part].z, v[0], v[1], T{});
                        unpack(half == 0 ? words[part].y : words[part].w, v[2], v[3], T{});
#pragma unroll
                        for (int k = 0; k < 4; ++k) v[k] = v[k] * gain[k] + shift[k];
                        activate<Act>(v);
#pragma unroll
                        for (int k = 0; k < 4; ++k) mean[k] += 0.25f * v[k];
                    }
                    halves[half][0] = pack(mean[0], mean[1], T{});
                    halves[half][1] = pack(mean[2], mean[3], T{});
                }
            }
            *reinterpret_cast<uint4*>(mine + i * STRIDE * Tile::PITCH) = uint4{halves[0][0], halves[0][1], halves[1][0], halves[1][1]};
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
