// Runs of values that a loop leaves as floats, stored in the type of the result: the compiler rounds to 16 bits in many instructions what the
// processor rounds in one.
#pragma once

#include "../common/convert.h"
#include "isa.h"
#if defined(__AVX512F__)
#include "vector.h"
#endif

namespace dfe {
namespace DFE_ISA {

constexpr int64_t RUN = 32;

template <typename T>
inline void store_run(T* out, const float* values) {
#if defined(__AVX512F__)
    store_two(out, load_vector(values), load_vector(values + WIDTH));
#else
    for (int64_t l = 0; l < RUN; ++l) store(out + l, values[l]);
#endif
}

}  // namespace DFE_ISA
}  // namespace dfe
