// Runs of values moved 16 bytes at a time; Count * sizeof(T) is a multiple of 16, and so is the address.
#pragma once

#include "../common/convert.h"

namespace dfe {

template <typename T>
union Vector {
    uint4 words;
    T values[16 / sizeof(T)];
};

template <int Count, typename T>
DFE_HD void load_run(const T* from, float* to) {
    constexpr int per = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < Count; i += per) {
        Vector<T> vector;
        vector.words = *reinterpret_cast<const uint4*>(from + i);
#pragma unroll
        for (int k = 0; k < per; ++k) to[i + k] = load(vector.values + k);
    }
}

template <int Count, typename T>
DFE_HD void store_run(T* to, const float* from) {
    constexpr int per = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < Count; i += per) {
        Vector<T> vector;
#pragma unroll
        for (int k = 0; k < per; ++k) store(vector.values + k, from[i + k]);
        *reinterpret_cast<uint4*>(to + i) = vector.words;
    }
}

}  // namespace dfe
