// The op `one_step` on CUDA (formula: kernels/one_step.py). Where every tensor is without gaps and aligned, and has 1 or 3 channels, a thread
// serves as many pixels as fill 16 bytes of `T` and moves 16 bytes at a time; else it serves one value. Grid: threads / blockDim.x, rounded up.
#include "../common/one_step.h"
#include "kernel.h"
#include "vectors.h"

namespace dfe {

template <typename X, typename T, int Channels>
DFE_HD void one_step_run(int64_t run, const X* x_t, const T* eps, const X* x_0, T* pair, float* reconstruction, const OneStepNumbers& n,
                         int scales, int64_t pixels) {
    constexpr int count = 16 / sizeof(T), size = count * Channels;
    const int64_t first = run * size, scale = pixels * Channels;
    float r[size], x[size], e[size], pairs[2 * size];
    load_run<size>(x_t + first, x);
    load_run<size>(eps + first, e);
    if (scales == 2) {
        float x_b[size], e_b[size];
        load_run<size>(x_t + scale + first, x_b);
        load_run<size>(eps + scale + first, e_b);
#pragma unroll
        for (int i = 0; i < size; ++i) r[i] = reconstructed<2>(n, x[i], e[i], x_b[i], e_b[i]);
    } else {
#pragma unroll
        for (int i = 0; i < size; ++i) r[i] = reconstructed<1>(n, x[i], e[i], 0.0f, 0.0f);
    }
    load_run<size>(x_0 + first, x);
#pragma unroll
    for (int i = 0; i < size; ++i) {
        const int at = i / Channels * 2 * Channels + i % Channels;
        pairs[at] = x[i];
        pairs[at + Channels] = r[i];
    }
    store_run<2 * size>(pair + 2 * first, pairs);
    if (reconstruction != nullptr) {
#pragma unroll
        for (int i = 0; i < size; ++i) r[i] = unit_pixel(n, r[i]);
        store_run<size>(reconstruction + first, r);
    }
}

template <typename X, typename T>
DFE_HD void one_step_value(int64_t value, const X* x_t, const T* eps, const X* x_0, T* pair, float* reconstruction, const OneStepNumbers& n,
                           int scales, int64_t pixels, int64_t channels, int64_t x_t_stride, int64_t eps_stride, int64_t x_0_stride,
                           int64_t pair_stride) {
    const int64_t pixel = value / channels, c = value % channels;
    const float x_s = load(x_t + pixel * x_t_stride + c), e_s = load(eps + pixel * eps_stride + c);
    float r;
    if (scales == 2) {
        const int64_t second = pixels + pixel;
        r = reconstructed<2>(n, x_s, e_s, load(x_t + second * x_t_stride + c), load(eps + second * eps_stride + c));
    } else {
        r = reconstructed<1>(n, x_s, e_s, 0.0f, 0.0f);
    }
    store(pair + pixel * pair_stride + c, load(x_0 + pixel * x_0_stride + c));
    store(pair + pixel * pair_stride + channels + c, r);
    if (reconstruction != nullptr) reconstruction[value] = unit_pixel(n, r);
}

}  // namespace dfe

// `run_pixels`: pixels that a thread serves by 16-byte accesses, or 0 for one value a thread.
#define DFE_ONE_STEP(NAME, X, T)                                                                                                               \
    extern "C" __global__ void one_step_##NAME(const X* x_t, const T* eps, const X* x_0, T* pair, float* reconstruction, float from_x_s,       \
                                               float from_x_b, float from_eps_s, float from_eps_b, float weight, float unit_gain,              \
                                               float unit_offset, int scales, int64_t pixels, int64_t channels, int64_t x_t_stride,            \
                                               int64_t eps_stride, int64_t x_0_stride, int64_t pair_stride, int run_pixels) {                  \
        const dfe::OneStepNumbers n = {{from_x_s, from_x_b}, {from_eps_s, from_eps_b}, weight, unit_gain, unit_offset};                        \
        const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;                                                    \
        if (run_pixels == 0) {                                                                                                                 \
            if (thread >= pixels * channels) return;                                                                                           \
            dfe::one_step_value(thread, x_t, eps, x_0, pair, reconstruction, n, scales, pixels, channels, x_t_stride, eps_stride, x_0_stride,  \
                                pair_stride);                                                                                                  \
        } else if (thread < pixels / run_pixels) {                                                                                             \
            if (channels == 3) dfe::one_step_run<X, T, 3>(thread, x_t, eps, x_0, pair, reconstruction, n, scales, pixels);                     \
            if (channels == 1) dfe::one_step_run<X, T, 1>(thread, x_t, eps, x_0, pair, reconstruction, n, scales, pixels);                     \
        }                                                                                                                                      \
    }                                                                                                                                          \
    DFE_KERNEL(one_step_##NAME)

DFE_ONE_STEP(float32_float32, float, float)
DFE_ONE_STEP(float16_float16, dfe::half, dfe::half)
DFE_ONE_STEP(bfloat16_bfloat16, dfe::bfloat16, dfe::bfloat16)
DFE_ONE_STEP(float32_float16, float, dfe::half)
DFE_ONE_STEP(float32_bfloat16, float, dfe::bfloat16)
