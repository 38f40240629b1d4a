// What the backends of the op `score` share (formula: kernels/score.py): the integers that order probabilities.
#pragma once

#include "activation.h"

namespace dfe {

// Pixels of a group, whose largest value decides whether the group is looked at again.
constexpr int SCORE_GROUP = 128;
// Keys above it are not numbers.
constexpr int32_t KEY_OF_INFINITY = 0x7f800000;

// Orders non-negative floats as they are, with what is not a number above all.
DFE_HD int32_t key_of(float value) { return static_cast<int32_t>(bits_of(value) & 0x7fffffffu); }

DFE_HD float value_of(int32_t key) { return float_of(static_cast<uint32_t>(key)); }

}  // namespace dfe
