// Products of a warpgroup (four warps) on the tensor cores of sm_90a, which run in the background: PTX ISA, "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions". tests/kernels/wgmma_on_host.h stands in for this file where a kernel is compiled for the host.
#pragma once

#include "tensor_core.h"

namespace dfe {

// Where second factors lie in shared memory, K-major and not swizzled: 8 columns by 8 of the 16 rows that are summed over are a core matrix of 128
// bytes, the 8 of a column together. leading: bytes from it to that of the other 8 rows; stride: to that of the next 8 columns. All three are
// multiples of 16 below 256 KiB; further on by so many bytes is the descriptor plus a sixteenth of them.
DFE_HD uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
    return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32;
}

}  // namespace dfe

#if !defined(DFE_HOST)
namespace dfe {

// Orders what the thread wrote to its registers (sums and first factors) before the products issued next.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `Left` of the warp's groups of products are under way.
template <int Left>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
// Makes what the thread wrote to shared memory, copies that it has waited for included, visible to products issued after a barrier.
__device__ __forceinline__ void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#define DFE_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DFE_REGISTERS_64 \
    DFE_REGISTERS_32     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DFE_REGISTERS_128 \
    DFE_REGISTERS_64      \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DFE_SUMS_4(n) "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
#define DFE_SUMS_16(n) DFE_SUMS_4(n), DFE_SUMS_4(n + 1), DFE_SUMS_4(n + 2), DFE_SUMS_4(n + 3)
#define DFE_SUMS_64(n) DFE_SUMS_16(n), DFE_SUMS_16(n + 4), DFE_SUMS_16(n + 8), DFE_SUMS_16(n + 12)
#define DFE_WGMMA(N, TYPE, REGISTERS, FACTORS, ...)                                                                                      \
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS \
                 "}, " FACTORS ", add, 1, 1, 0; }"                                                                                       \
                 : __VA_ARGS__                                                                                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define DFE_WGMMA_OF(TYPE)                                                                                                               \
    if constexpr (N == 8)                                                                                                                \
        DFE_WGMMA(64, TYPE, DFE_REGISTERS_32, "{%32, %33, %34, %35}, %36", DFE_SUMS_16(0), DFE_SUMS_16(4));                              \
    else if constexpr (N == 16)                                                                                                          \
        DFE_WGMMA(128, TYPE, DFE_REGISTERS_64, "{%64, %65, %66, %67}, %68", DFE_SUMS_64(0));                                             \
    else                                                                                                                                 \
        DFE_WGMMA(256, TYPE, DFE_REGISTERS_128, "{%128, %129, %130, %131}, %132", DFE_SUMS_64(0), DFE_SUMS_64(16))

// Starts sums += a b for a warpgroup: 64 rows, of which each warp has 16 in the fragments of mma.m16n8k16, times N fragments of 8 columns. Until it is
// waited for neither a nor sums may be touched, nor what the descriptor b describes be written.
template <typename T, int N>
__device__ __forceinline__ void wgmma(float (&sums)[N][4], const uint32_t (&a)[4], uint64_t b) {
    static_assert(N == 8 || N == 16 || N == 32, "64, 128 or 256 columns");
    if constexpr (is_half<T>) {
        DFE_WGMMA_OF("f16");
    } else {
        DFE_WGMMA_OF("bf16");
    }
}

#undef DFE_REGISTERS_32
#undef DFE_REGISTERS_64
#undef DFE_REGISTERS_128
#undef DFE_SUMS_4
#undef DFE_SUMS_16
#undef DFE_SUMS_64
#undef DFE_WGMMA
#undef DFE_WGMMA_OF

// The sums of products that were waited for: no use of them is moved before the wait.
template <int N>
__device__ __forceinline__ void arrived(float (&sums)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; ++n) asm volatile("" : "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])::"memory");
}

}  // namespace dfe
#endif
