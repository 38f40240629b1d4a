// What every csrc/cuda/<op>.cu starts with. A file defines `extern "C" __global__` kernels over pointers, int, int64_t, uint32_t and float, and
// names each once in DFE_KERNEL. The same text compiles in three ways: by nvcc into dfengine._native (which launches by name), by NVRTC at run
// time, and for the host in the tests, where tests/kernels/cuda_on_host.h comes first and stands in for what CUDA provides.
#pragma once

#include "../common/activation.h"
#include "../common/convert.h"

#if defined(DFE_HOST)
// DFE_KERNEL and DFE_DYNAMIC_SHARED are those of cuda_on_host.h.
#elif defined(DFE_CUDA)
#include "registry.h"
#define DFE_KERNEL(NAME) static const dfe::RegisteredKernel registered_##NAME{#NAME, reinterpret_cast<const void*>(NAME)};
#else
#define DFE_KERNEL(NAME)
#endif

#if !defined(DFE_HOST)
// The dynamic shared memory of the launch, as an array.
#define DFE_DYNAMIC_SHARED(TYPE, NAME)                                  \
    extern __shared__ __align__(16) unsigned char dfe_dynamic_shared[]; \
    TYPE* const NAME = reinterpret_cast<TYPE*>(dfe_dynamic_shared)
#endif
