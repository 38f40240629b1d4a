// Kernels that only multiply once on a warpgroup, for tests/kernels/test_wgmma_on_host.py: A (64, 16) times a B that lies in shared memory as the
// caller says, and the mistakes that a kernel can make around it.
#pragma once

#include "../../csrc/cuda/wgmma.h"

namespace dfe {

enum Mistake { NONE, NO_WAIT, NO_FENCE, NO_PROXY_FENCE, OTHER_B, OTHER_A, OTHER_SUMS, OTHER_DESCRIPTOR, EARLY };

// image: `bytes` of shared memory; d (64, 8 N): the sums before and after.
template <typename T, int N>
void probe(const T* a, const unsigned char* image, int bytes, uint64_t descriptor, int mistake, float* d, unsigned char* shared) {
    const int thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (int i = thread * 16; i < bytes; i += 128 * 16) copy_async_16(shared_address(shared + i), image + i, true);
    copy_async_commit();
    if (mistake != EARLY) copy_async_wait<0>();
    if (mistake != NO_PROXY_FENCE) async_proxy_fence();
    __syncthreads();
    uint32_t first[4];
    for (int i = 0; i < 4; ++i) memcpy(&first[i], a + (row + i % 2 * 8) * 16 + i / 2 * 8 + column, 4);
    float sums[N][4];
    for (int i = 0; i < 4 * N; ++i) sums[i / 4][i % 4] = d[(row + i / 2 % 2 * 8) * 8 * N + i / 4 * 8 + column + i % 2];
    if (mistake != NO_FENCE) wgmma_fence();
    wgmma<T>(sums, first, descriptor + (mistake == OTHER_DESCRIPTOR && thread >= 96 ? 1 : 0));
    if (mistake == OTHER_A) first[2] ^= 1;
    if (mistake == OTHER_SUMS) sums[0][1] = 0.0f;
    wgmma_commit();
    if (mistake == OTHER_B && thread == 0) shared[descriptor % 0x4000 * 16] ^= 1;
    __syncthreads();
    if (mistake == NO_WAIT) wgmma_wait<1>();
    else wgmma_wait<0>();
    for (int i = 0; i < 4 * N; ++i) d[(row + i / 2 % 2 * 8) * 8 * N + i / 4 * 8 + column + i % 2] = sums[i / 4][i % 4];
}

}  // namespace dfe

#define DFE_PROBE(NAME, TYPE, N)                                                                                                               \
    extern "C" void probe_##NAME(const dfe::TYPE* a, const unsigned char* image, int bytes, uint64_t descriptor, int mistake, float* d) {      \
        DFE_DYNAMIC_SHARED(unsigned char, shared);                                                                                             \
        dfe::probe<dfe::TYPE, N>(a, image, bytes, descriptor, mistake, d, shared);                                                             \
    }                                                                                                                                          \
    DFE_KERNEL(probe_##NAME)

DFE_PROBE(float16_64, half, 8)
DFE_PROBE(float16_128, half, 16)
DFE_PROBE(bfloat16_256, bfloat16, 32)

// The descriptor that kernels make.
extern "C" uint64_t described(uint32_t address, uint32_t leading, uint32_t stride) { return dfe::matrix_descriptor(address, leading, stride); }
