// The products of the op `conv2d` in bytes with sums in int32, on processors that have AVX512_VNNI or AMX-INT8 (chosen at run time). Compiled
// once, with those instructions; the rules of isa.h hold.
#define DFE_PER_WORD 4
#define DFE_VECTOR __m512i
#define DFE_VECTOR_DOT(sums, a, b) _mm512_dpbusd_epi32(sums, a, b)
#define DFE_TILE_DOT(c, a, b) _tile_dpbusd(c, a, b)
#include "conv2d_blocks.h"
#include "processor.h"

namespace dfe {

bool fours_supported() { return has_avx512() && cpu_has(7, 0, ECX, 11); }

bool byte_tiles_supported() {
    static const bool found = fours_supported() && cpu_has(7, 0, EDX, 25) && has_tiles();
    return found;
}

Multiplier fours_multiplier(int64_t outputs) { return vectors_multiplier(outputs); }
Multiplier byte_tiles_multiplier(int64_t outputs) { return narrow_tiles_multiplier(outputs); }

}  // namespace dfe
