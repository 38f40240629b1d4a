// The op `reverse_step` (formula: kernels/reverse_step.py), one tile of pixels at a time: its noise is drawn once and serves every image.
#include "reverse_step.h"

#include "isa.h"
#include "noise.h"
#include "slices.h"

namespace dfe {
namespace DFE_ISA {
namespace {

template <typename X, typename T>
void step_back(const ReverseStepNumbers numbers, int64_t size, const X* DFE_RESTRICT x_t, const T* DFE_RESTRICT eps,
               const float* DFE_RESTRICT noise, X* DFE_RESTRICT result) {
    for (int64_t i = 0; i < size; ++i) store(result + i, step_before(numbers, load(x_t + i), load(eps + i), noise[i]));
}

template <typename X, typename T>
void tiles(const ReverseStepArguments& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = p.channels, capacity = p.tile_pixels * channels;
    float* const noise = scratch;
    X* const room_of_x = reinterpret_cast<X*>(scratch + capacity);
    X* const result = reinterpret_cast<X*>(scratch + 2 * capacity);  // since `out` may be x_t
    T* const room_of_eps = reinterpret_cast<T*>(scratch + 3 * capacity);
    float* const rows = scratch + 4 * capacity;
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * p.tile_pixels, left = p.pixels - first;
        const int64_t count = left < p.tile_pixels ? left : p.tile_pixels;
        draw_noise(channels, 2 * p.step + 1, p.draw, p.key[0], p.key[1], first, count, noise, rows);
        for (int64_t n = 0; n < p.batch; ++n) {
            const int64_t pixel = n * p.pixels + first;
            const X* const x_t = packed(static_cast<const X*>(p.x_t) + pixel * p.x_t_stride, p.x_t_stride, channels, count, room_of_x);
            const T* const eps = packed(static_cast<const T*>(p.eps) + pixel * p.eps_stride, p.eps_stride, channels, count, room_of_eps);
            step_back(p.numbers, count * channels, x_t, eps, noise, result);
            unpack(result, p.out_stride, channels, count, static_cast<X*>(p.out) + pixel * p.out_stride);
        }
    }
}

}  // namespace

void reverse_step_tiles(const ReverseStepArguments& p, int64_t begin, int64_t end, float* scratch) {
    const bool mixed = p.image_type == FloatType::float32;
    switch (p.type) {
        case FloatType::float32: return tiles<float, float>(p, begin, end, scratch);
        case FloatType::float16: return (mixed ? tiles<float, half> : tiles<half, half>)(p, begin, end, scratch);
        case FloatType::bfloat16: return (mixed ? tiles<float, bfloat16> : tiles<bfloat16, bfloat16>)(p, begin, end, scratch);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
