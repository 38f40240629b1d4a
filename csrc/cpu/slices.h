// Channel slices (kernels/slices.py): runs of pixels read and written as if there were no gaps between them.
#pragma once

#include "isa.h"

namespace dfe {
namespace DFE_ISA {

// `count` pixels whose values follow each other: where they are, or gathered into `room`.
template <typename T>
static inline const T* packed(const T* DFE_RESTRICT from, int64_t stride, int64_t channels, int64_t count, T* DFE_RESTRICT room) {
    if (stride == channels) return from;
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < channels; ++c) room[i * channels + c] = from[i * stride + c];
    }
    return room;
}

// The reverse: values that follow each other into `count` pixels.
template <typename T>
static inline void unpack(const T* DFE_RESTRICT values, int64_t stride, int64_t channels, int64_t count, T* DFE_RESTRICT to) {
    if (stride == channels) {
        memcpy(to, values, static_cast<size_t>(count * channels) * sizeof(T));
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < channels; ++c) to[i * stride + c] = values[i * channels + c];
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
