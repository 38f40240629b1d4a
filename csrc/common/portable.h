// What lets one numeric core compile for the host and for CUDA.
#pragma once

#if defined(__CUDACC_RTC__)
using int32_t = int;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint8_t = unsigned char;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

#if defined(__CUDACC__)
#define DFE_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DFE_HD static __forceinline
#else
#define DFE_HD static inline __attribute__((always_inline))
#endif

// The same for a member of a class.
#if defined(__CUDACC__)
#define DFE_HD_MEMBER __host__ __device__ __forceinline__
#else
#define DFE_HD_MEMBER inline
#endif

namespace dfe {

DFE_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

DFE_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

}  // namespace dfe
