// What the bindings of the ops share. csrc/bindings/<op>.cpp defines bind_<op>, which adds the op's functions to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
#include "unlocked.h"

namespace py = pybind11;

namespace dfe {

enum class Level : int { base = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };

// The named level, or the best that this processor runs for "". Throws std::invalid_argument for one that it does not run.
Level level_named(const std::string& name);

// dfe::<level>::FUNCTION of the level at hand.
#if defined(DFE_X86_LEVELS)
#if defined(DFE_NARROW_PRODUCTS)
#define DFE_AT_LAST_LEVEL(FUNCTION) dfe::avx512_bf16::FUNCTION
#else
#define DFE_AT_LAST_LEVEL(FUNCTION) dfe::avx512::FUNCTION
#endif
#define DFE_AT_LEVEL(LEVEL, FUNCTION)                               \
    ((LEVEL) == dfe::Level::avx512_bf16 ? DFE_AT_LAST_LEVEL(FUNCTION) \
     : (LEVEL) == dfe::Level::avx512    ? dfe::avx512::FUNCTION     \
     : (LEVEL) == dfe::Level::avx2      ? dfe::avx2::FUNCTION       \
                                        : dfe::base::FUNCTION)
#else
#define DFE_AT_LEVEL(LEVEL, FUNCTION) (static_cast<void>(LEVEL), dfe::base::FUNCTION)
#endif

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Floats for each piece of a parallel_for, far enough apart to share no cache line, and floats that all pieces share. The memory stays with the
// calling thread for its next call; it is valid until then.
class Scratch {
public:
    Scratch(int64_t floats, int pieces, int64_t shared = 0) : stride_((floats + 31) / 16 * 16) {
        static thread_local std::vector<float> held;
        held.resize(std::max(held.size(), static_cast<size_t>(stride_ * pieces + shared)));
        start_ = held.data();
        shared_ = start_ + stride_ * pieces;
    }
    float* of(int piece) const { return start_ + piece * stride_; }
    float* shared() const { return shared_; }

private:
    int64_t stride_;
    float *start_, *shared_;
};

}  // namespace dfe
