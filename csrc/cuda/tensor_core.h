// The instructions that a tensor-core kernel needs and C++ does not have, for sm_80 and later. tests/kernels/tensor_core_on_host.h stands in for
// this file where a kernel is compiled for the host. Layouts of fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16".
#pragma once

#include "../common/convert.h"

namespace dfe {

template <typename T>
constexpr bool is_half = false;
template <>
constexpr bool is_half<half> = true;

}  // namespace dfe

#if !defined(DFE_HOST)
namespace dfe {

// An address in shared memory, as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* in_shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared));
}

// Four 8 x 8 matrices of 16-bit values; lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

// Copies 16 bytes to shared memory in the background; zeros where `there` is false, and then nothing is read, whatever the address.
__device__ __forceinline__ void copy_async_16(uint32_t address, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)), "r"(there ? 16 : 0) : "memory");
}
// The same for 4 bytes.
__device__ __forceinline__ void copy_async_4(uint32_t address, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)), "r"(there ? 4 : 0) : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `Left` of the thread's groups of copies are under way.
template <int Left>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// sums += a b for N fragments of 8 columns. a: 16 x 16, b: 16 x 8 each, sums: 16 x 8 each.
template <typename T, int N>
__device__ __forceinline__ void multiply_add(float (&sums)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        float(&c)[4] = sums[n];
        if constexpr (is_half<T>) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
        } else {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                         : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
        }
    }
}

// The same with float16 sums, two in a register.
template <int N>
__device__ __forceinline__ void multiply_add_half(uint32_t (&sums)[N][2], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
                     : "+r"(sums[n][0]), "+r"(sums[n][1])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[n][0]), "r"(b[n][1]));
    }
}

// Two 16-bit values in a register, the first in the low half.
__device__ __forceinline__ void unpack(uint32_t word, float& first, float& second, half) {
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }" : "=f"(first), "=f"(second) : "r"(word));
}
__device__ __forceinline__ void unpack(uint32_t word, float& first, float& second, bfloat16) {
    first = float_of(word << 16);
    second = float_of(word & 0xffff0000u);
}
__device__ __forceinline__ uint32_t pack(float first, float second, half) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ __forceinline__ uint32_t pack(float first, float second, bfloat16) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// The value, of which the compiler knows nothing: what depends on it is not kept in registers around a loop, but computed where it is used.
__device__ __forceinline__ int computed_anew(int value) {
    asm volatile("" : "+r"(value));
    return value;
}
template <typename T>
__device__ __forceinline__ T* computed_anew(T* value) {
    asm volatile("" : "+l"(value));
    return value;
}
// blockIdx.y, read from the hardware where it is used.
__device__ __forceinline__ int block_y_anew() {
    int value;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(value));
    return value;
}

// To about 2^-22 of the result.
__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

}  // namespace dfe
#endif
