// The op `ingest` on CUDA (formula: kernels/ingest.py). One thread serves one group of four channels at one pixel, for `images_per_thread` images
// with one draw of noise. Grid: (pixels / blockDim.x, batch / images_per_thread, channels / 4), each rounded up.
#include "../common/philox.h"
#include "kernel.h"

namespace dfe {

template <typename Pixel, typename Output>
DFE_HD void ingest_thread(int64_t pixel, int64_t first_image, int64_t group, const Pixel* images, Output* x_0, Output* x_t, float gain, float offset,
                          float a0, float b0, float a1, float b1, uint32_t key0, uint32_t key1, uint32_t draw, uint32_t step, int scales,
                          int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t stride_n, int64_t stride_y,
                          int64_t stride_x, int64_t stride_c, int images_per_thread) {
    const int64_t size = height * width;
    if (pixel >= size) return;
    const uint32_t p = static_cast<uint32_t>(pixel), k = static_cast<uint32_t>(group);
    const Normals first = normals(p, k, 2 * step, draw, key0, key1);
    const float noise0[4] = {first.n0, first.n1, first.n2, first.n3};
    float noise1[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (scales == 2) {
        const Normals second = normals(p, k, 2 * step + 1, draw, key0, key1);
        noise1[0] = second.n0, noise1[1] = second.n1, noise1[2] = second.n2, noise1[3] = second.n3;
    }
    const Pixel* source = images + pixel / width * stride_y + pixel % width * stride_x;
    Output* const x_t1 = x_t + batch * size * channels;
    for (int64_t n = first_image; n < first_image + images_per_thread && n < batch; ++n) {
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
            const int64_t c = 4 * group + lane;
            if (c >= channels) break;
            const int64_t at = (n * size + pixel) * channels + c;
            const float x = gain * static_cast<float>(source[n * stride_n + c * stride_c]) + offset;
            store(x_0 + at, x);
            store(x_t + at, a0 * x + b0 * noise0[lane]);
            if (scales == 2) store(x_t1 + at, a1 * x + b1 * noise1[lane]);
        }
    }
}

}  // namespace dfe

#define DFE_INGEST(NAME, PIXEL, OUTPUT)                                                                                                        \
    extern "C" __global__ void ingest_##NAME(const PIXEL* images, OUTPUT* x_0, OUTPUT* x_t, float gain, float offset, float a0, float b0,      \
                                             float a1, float b1, uint32_t key0, uint32_t key1, uint32_t draw, uint32_t step, int scales,      \
                                             int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t stride_n,                \
                                             int64_t stride_y, int64_t stride_x, int64_t stride_c, int images_per_thread) {                   \
        const int64_t pixel = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;                                                     \
        const int64_t first_image = static_cast<int64_t>(blockIdx.y) * images_per_thread;                                                      \
        dfe::ingest_thread(pixel, first_image, static_cast<int64_t>(blockIdx.z), images, x_0, x_t, gain, offset, a0, b0, a1, b1, key0, key1,   \
                           draw, step, scales, batch, height, width, channels, stride_n, stride_y, stride_x, stride_c, images_per_thread);     \
    }                                                                                                                                          \
    DFE_KERNEL(ingest_##NAME)

DFE_INGEST(uint8_float32, uint8_t, float)
DFE_INGEST(uint8_float16, uint8_t, dfe::half)
DFE_INGEST(uint8_bfloat16, uint8_t, dfe::bfloat16)
DFE_INGEST(uint16_float32, uint16_t, float)
DFE_INGEST(uint16_float16, uint16_t, dfe::half)
DFE_INGEST(uint16_bfloat16, uint16_t, dfe::bfloat16)
DFE_INGEST(float32_float32, float, float)
DFE_INGEST(float32_float16, float, dfe::half)
DFE_INGEST(float32_bfloat16, float, dfe::bfloat16)
