// What multiplies matrices on the CPU.
#pragma once

namespace dfe {

// Vectors of float32; pairs of bfloat16 (AVX512_BF16); tiles of bfloat16 (AMX). The last two sum in float32.
enum class Product : int { float32 = 0, pairs = 1, tiles = 2 };

// Whether the processor has them; defined where DFE_BFLOAT16_PRODUCTS is.
bool pairs_supported();
bool tiles_supported();

}  // namespace dfe
