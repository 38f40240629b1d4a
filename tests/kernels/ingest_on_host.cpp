// csrc/cuda/ingest.cu as a host library: host_<name>(grid, threads, the kernel's arguments).
#include "cuda_on_host.h"

#include "../../csrc/cuda/ingest.cu"

#define HOST(NAME, PIXEL, OUTPUT)                                                                                       \
    extern "C" void host_##NAME(unsigned x, unsigned y, unsigned z, unsigned threads, const PIXEL* images, OUTPUT* x_0, \
                                OUTPUT* x_t, float gain, float offset, float a0, float b0, float a1, float b1,          \
                                uint32_t key0, uint32_t key1, uint32_t draw, uint32_t step, int scales, int64_t batch,  \
                                int64_t height, int64_t width, int64_t channels, int64_t stride_n, int64_t stride_y,    \
                                int64_t stride_x, int64_t stride_c, int per_thread) {                                   \
        launch(ingest_##NAME, Dim3{x, y, z}, threads, images, x_0, x_t, gain, offset, a0, b0, a1, b1, key0, key1,       \
               draw, step, scales, batch, height, width, channels, stride_n, stride_y, stride_x, stride_c, per_thread); \
    }

HOST(uint8_float32, uint8_t, float)
HOST(uint8_float16, uint8_t, dfe::half)
HOST(uint8_bfloat16, uint8_t, dfe::bfloat16)
HOST(uint16_float32, uint16_t, float)
HOST(uint16_float16, uint16_t, dfe::half)
HOST(uint16_bfloat16, uint16_t, dfe::bfloat16)
HOST(float32_float32, float, float)
HOST(float32_float16, float, dfe::half)
HOST(float32_bfloat16, float, dfe::bfloat16)
