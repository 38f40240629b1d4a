// The op `reverse_step` on CUDA (formula: kernels/reverse_step.py). One thread serves one group of four channels at one pixel, for
// `images_per_thread` images with one draw of noise. Grid: (pixels / blockDim.x, batch / images_per_thread, channels / 4), each rounded up.
#include "../common/one_step.h"
#include "../common/philox.h"
#include "kernel.h"

namespace dfe {

template <typename X, typename T>
DFE_HD void reverse_step_thread(int64_t pixel, int64_t first_image, int64_t group, const X* x_t, const T* eps, X* out,
                                const ReverseStepNumbers& numbers, uint32_t key0, uint32_t key1, uint32_t draw, uint32_t step, int64_t batch,
                                int64_t pixels, int64_t channels, int64_t x_t_stride, int64_t eps_stride, int64_t out_stride,
                                int images_per_thread) {
    if (pixel >= pixels) return;
    const Normals drawn = normals(static_cast<uint32_t>(pixel), static_cast<uint32_t>(group), 2 * step + 1, draw, key0, key1);
    const float noise[4] = {drawn.n0, drawn.n1, drawn.n2, drawn.n3};
    for (int64_t n = first_image; n < first_image + images_per_thread && n < batch; ++n) {
        const int64_t at = n * pixels + pixel;
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const int64_t c = 4 * group + lane;
            if (c >= channels) break;
            const float x = load(x_t + at * x_t_stride + c), e = load(eps + at * eps_stride + c);
            store(out + at * out_stride + c, step_before(numbers, x, e, noise[lane]));
        }
    }
}

}  // namespace dfe

#define DFE_REVERSE_STEP(NAME, X, T)                                                                                                           \
    extern "C" __global__ void reverse_step_##NAME(const X* x_t, const T* eps, X* out, float from_x, float from_eps, float from_x0,            \
                                                   float from_xt, float sigma, uint32_t key0, uint32_t key1, uint32_t draw, uint32_t step,     \
                                                   int64_t batch, int64_t pixels, int64_t channels, int64_t x_t_stride, int64_t eps_stride,    \
                                                   int64_t out_stride, int images_per_thread) {                                                \
        const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;                                                     \
        const int64_t first_image = static_cast<int64_t>(blockIdx.y) * images_per_thread;                                                      \
        dfe::reverse_step_thread(pixel, first_image, static_cast<int64_t>(blockIdx.z), x_t, eps, out,                                          \
                                 dfe::ReverseStepNumbers{from_x, from_eps, from_x0, from_xt, sigma}, key0, key1, draw, step, batch, pixels,    \
                                 channels, x_t_stride, eps_stride, out_stride, images_per_thread);                                             \
    }                                                                                                                                          \
    DFE_KERNEL(reverse_step_##NAME)

DFE_REVERSE_STEP(float32_float32, float, float)
DFE_REVERSE_STEP(float16_float16, dfe::half, dfe::half)
DFE_REVERSE_STEP(bfloat16_bfloat16, dfe::bfloat16, dfe::bfloat16)
DFE_REVERSE_STEP(float32_float16, float, dfe::half)
DFE_REVERSE_STEP(float32_bfloat16, float, dfe::bfloat16)
