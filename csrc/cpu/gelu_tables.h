// GELU and its derivative as piecewise polynomials, for processors that look 32 numbers up in two registers (AVX-512, csrc/cpu/vector.h).
#pragma once

namespace dfe {

// For m >= 0: GELU(z) = max(z, 0) - deficit(|z|), deficit(m) = m Phi(-m); GELU'(z) = 1/2 + sign(z) rise(|z|),
// rise(m) = 1/2 - Phi(-m) + m phi(m). Piece j interpolates around j times the step, 31 steps being the range that is told apart.
constexpr int GELU_PIECES = 32;
constexpr float GELU_STEP = 0.1875f;         // degree 4 in m - j step: within 2.3e-8 (deficit) and 1.2e-7 (rise)
constexpr float GELU_COARSE_STEP = 0.15625f; // degree 2 in m: within 1.6e-5 and 3.3e-5

struct GeluTables {
    alignas(64) float deficit[5][GELU_PIECES], rise[5][GELU_PIECES], coarse_deficit[3][GELU_PIECES], coarse_rise[3][GELU_PIECES];  // [power][piece]
};

// Made when the module is loaded.
extern const GeluTables gelu_tables;

}  // namespace dfe
