// The arithmetic of the ops `one_step` and `reverse_step` (formulas: kernels/one_step.py, kernels/reverse_step.py) for one value.
#pragma once

#include "portable.h"

namespace dfe {

// x0_hat = from_x * x_t - from_eps * eps at each scale; unit = unit_gain * r + unit_offset.
struct OneStepNumbers {
    float from_x[2], from_eps[2], weight, unit_gain, unit_offset;
};

// Not a number stays one.
DFE_HD float clamped(float value, float low, float high) {
    value = value < low ? low : value;
    return value > high ? high : value;
}

// The reconstruction from scale s, and with Scales = 2 from scale b too.
template <int Scales>
DFE_HD float reconstructed(const OneStepNumbers& n, float x_s, float e_s, float x_b, float e_b) {
    const float small = n.from_x[0] * x_s - n.from_eps[0] * e_s;
    if (Scales == 1) return clamped(small, -1.0f, 1.0f);
    const float big = clamped(n.from_x[1] * x_b - n.from_eps[1] * e_b, -1.0f, 1.0f);
    return clamped(small + n.weight * (big - small), -1.0f, 1.0f);
}

DFE_HD float unit_pixel(const OneStepNumbers& n, float r) { return clamped(n.unit_gain * r + n.unit_offset, 0.0f, 1.0f); }

// x0_hat = from_x * x_t - from_eps * eps; the step before t is from_x0 * clamp(x0_hat) + from_xt * x_t + sigma * noise.
struct ReverseStepNumbers {
    float from_x, from_eps, from_x0, from_xt, sigma;
};

DFE_HD float step_before(const ReverseStepNumbers& n, float x, float e, float noise) {
    return n.from_x0 * clamped(n.from_x * x - n.from_eps * e, -1.0f, 1.0f) + n.from_xt * x + n.sigma * noise;
}

}  // namespace dfe
