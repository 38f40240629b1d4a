// Every csrc/cpu/<op>.cpp is compiled once for each instruction set, into the namespace DFE_ISA (base, avx2, avx512, avx512_bf16: levels.h), and
// chosen at run time (bindings.cpp). Such a file must define nothing outside that namespace and use no library templates: the linker keeps one copy of an
// inline function, and it must not be one that needs AVX-512.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(DFE_ISA)
#error "compile with -DDFE_ISA=base, avx2, avx512 or avx512_bf16"
#endif

#if defined(_MSC_VER)
#define DFE_RESTRICT __restrict
#define DFE_NOINLINE __declspec(noinline)
#else
#define DFE_RESTRICT __restrict__
#define DFE_NOINLINE __attribute__((noinline))
#endif

namespace dfe {
namespace DFE_ISA {

// Copy past the caches, for results larger than they are: the lines of `to` are not read first. Needs stream_fence() before others read.
static inline void stream_copy(void* to, const void* from, int64_t bytes) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if defined(__AVX2__)
    int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 63u);
    head = head < bytes ? head : bytes;
    memcpy(out, in, static_cast<size_t>(head));
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#else
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + 32));
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), low);
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + 32), high);
#endif
    }
    memcpy(out + i, in + i, static_cast<size_t>(bytes - i));
#else
    memcpy(out, in, static_cast<size_t>(bytes));
#endif
}

static inline void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

}  // namespace DFE_ISA
}  // namespace dfe
