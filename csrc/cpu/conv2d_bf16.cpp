// The products of the op `conv2d` in bfloat16 with sums in float32, on processors that have AVX512_BF16 or AMX-BF16 (chosen at run time).
// Compiled once, with those instructions; the rules of isa.h hold.
#define DFE_PER_WORD 2
#define DFE_VECTOR __m512
#define DFE_VECTOR_DOT(sums, a, b) _mm512_dpbf16_ps(sums, (__m512bh)(a), (__m512bh)(b))
#define DFE_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)
#include "conv2d_blocks.h"
#include "processor.h"

namespace dfe {

bool pairs_supported() { return has_avx512() && cpu_has(7, 1, EAX, 5); }

bool tiles_supported() {
    static const bool found = pairs_supported() && cpu_has(7, 0, EDX, 22) && has_tiles();
    return found;
}

Multiplier pairs_multiplier(int64_t outputs) { return vectors_multiplier(outputs); }
Multiplier tiles_multiplier(int64_t outputs) { return narrow_tiles_multiplier(outputs); }

}  // namespace dfe
