// Logarithms in (0, 1), for processors that look 32 numbers up in two registers (AVX-512, csrc/cpu/normals.h).
#pragma once

namespace dfe {

constexpr int LOG_PIECES = 32;

// -2 ln m = -2 ln(m reciprocal[j]) + offset[j] for m in piece j of [1, 2), where |m reciprocal[j] - 1| <= 1/64. In the last piece reciprocal is 1/2 and
// offset -MINUS_TWO_LOG_HALF, so that -2 ln u keeps its digits as u goes to 1.
struct LogTable {
    alignas(64) float reciprocal[LOG_PIECES], offset[LOG_PIECES];
};

constexpr float MINUS_TWO_LOG_HALF = 1.38629436f;

// Made when the module is loaded.
extern const LogTable log_table;

}  // namespace dfe
