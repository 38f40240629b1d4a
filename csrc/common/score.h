// The arithmetic of the op `score` (formula: kernels/score.py): probabilities, and the integers that order them.
#pragma once

#include "activation.h"

namespace dfe {

// Pixels of a group, whose largest value decides whether the group is looked at again.
constexpr int SCORE_GROUP = 128;
// Keys above it are not numbers.
constexpr int32_t KEY_OF_INFINITY = 0x7f800000;

// The logistic function; not a number stays one.
DFE_HD float probability(float logit) {
    const float e = exp_of_negative(-magnitude_of(logit));
    const float share = 1.0f / (1.0f + e), p = logit > 0.0f ? share : e * share;
    return logit == logit ? p : logit;
}

// Orders non-negative floats as they are, with what is not a number above all.
DFE_HD int32_t key_of(float value) { return static_cast<int32_t>(bits_of(value) & 0x7fffffffu); }

DFE_HD float value_of(int32_t key) { return float_of(static_cast<uint32_t>(key)); }

}  // namespace dfe
