// What multiplies matrices on the CPU.
#pragma once

namespace dfe {

// Vectors of float32; pairs of bfloat16 (AVX512_BF16); tiles of bfloat16 (AMX-BF16); fours of bytes (AVX512_VNNI); tiles of bytes (AMX-INT8).
// Those of bfloat16 sum in float32. Those of bytes take the first factor as 0 to 255 and the second as -128 to 127, and sum in int32.
enum class Product : int { float32 = 0, pairs = 1, tiles = 2, fours = 3, byte_tiles = 4 };

constexpr bool of_bytes(Product product) { return product == Product::fours || product == Product::byte_tiles; }

// Whether the processor has them; defined where DFE_NARROW_PRODUCTS is.
bool pairs_supported();
bool tiles_supported();
bool fours_supported();
bool byte_tiles_supported();

}  // namespace dfe
