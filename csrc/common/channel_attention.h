// The arithmetic of the op `channel_attention` (formula: kernels/channel_attention.py) that its backends share.
#pragma once

#include "activation.h"

namespace dfe {

constexpr int SPATIAL_SIZE = 7, SPATIAL_REACH = 3;  // of the spatial gate's window: its side, and how far it reaches

// Not a number is passed over: the mean that goes along with every maximum carries it.
DFE_HD float larger(float a, float b) { return a > b ? a : b; }

DFE_HD float lowest() { return float_of(0xff800000u); }  // minus infinity

}  // namespace dfe
