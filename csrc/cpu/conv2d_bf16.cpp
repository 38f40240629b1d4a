// The products of the op `conv2d` in bfloat16 with sums in float32, on processors that have AVX512_BF16 or AMX (chosen at run time). Compiled
// once, with those instructions; the rules of isa.h hold.
#include "conv2d.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "tiles.h"

namespace dfe {
namespace {

bool cpu_has(int leaf, int subleaf, int register_index, int bit) {
    unsigned registers[4] = {};
    return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) && (registers[register_index] >> bit & 1u);
}

template <int Rows, int Vectors>
void pairs_block_at(const BlockArguments& p, int64_t at) {
    const uint32_t* b = static_cast<const uint32_t*>(p.b);
    float* const c = p.c + at * Vectors * 16;
    const int64_t pitch = p.pitch / 2;
    __m512 sums[Rows][Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_setzero_ps();
    }
    for (int64_t r = 0; r < p.runs; ++r) {
        const uint32_t* a = static_cast<const uint32_t*>(p.a) + at * pitch + p.starts[r] / 2;
        for (const uint32_t* const end = a + p.length / 2; a != end; ++a, b += 16 * Vectors) {
            __m512i weights[Vectors];
#pragma GCC unroll 2
            for (int j = 0; j < Vectors; ++j) weights[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 32
            for (int i = 0; i < Rows; ++i) {
                const __m512i value = _mm512_set1_epi32(static_cast<int>(a[i * pitch]));
#pragma GCC unroll 2
                for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)value, (__m512bh)weights[j]);
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(c + (i * Vectors + j) * 16, sums[i][j]);
    }
}

template <int Rows, int Vectors>
void pairs_block(const BlockArguments& p) {
    for (int64_t i = 0; i < p.count; ++i) pairs_block_at<Rows, Vectors>(p, i * Rows);
}

// 32 x 32 sums in tiles 0 to 3, over `length` values of a run; added to c unless they are its first. The weights of a step are `step / 2` rows
// of 32 pairs.
void tiles_begin_block(const float* c, bool first) {
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 128);
        _tile_loadd(1, c + 16, 128);
        _tile_loadd(2, c + 512, 128);
        _tile_loadd(3, c + 528, 128);
    }
}

const uint16_t* tiles_add(const uint16_t* a, int64_t pitch, const uint16_t* b, int64_t length, int64_t step) {
    const uint16_t* const below = a + 16 * pitch;
    for (int64_t k = 0; k < length; k += step, b += 32 * step) {
        _tile_loadd(6, b, 128);
        _tile_loadd(4, a + k, 2 * pitch);
        _tile_loadd(7, b + 32, 128);
        _tile_loadd(5, below + k, 2 * pitch);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    return b;
}

void tiles_end_block(float* c) {
    _tile_stored(0, c, 128);
    _tile_stored(1, c + 16, 128);
    _tile_stored(2, c + 512, 128);
    _tile_stored(3, c + 528, 128);
}

// Weights larger than the first-level cache are taken in parts, each for all pixels; far larger ones, that few pixels take in turn, are not: then
// putting the sums aside between parts costs more.
void tiles_block_32(const BlockArguments& p) {
    constexpr int64_t PART = 768, FAR = 3456;  // values of a run: 48 and 216 KiB of weights
    const uint16_t *const a = static_cast<const uint16_t*>(p.a), *b = static_cast<const uint16_t*>(p.b);
    if (p.runs * p.length <= PART || p.runs * p.length >= FAR) {
        for (int64_t i = 0; i < p.count; ++i) {
            tiles_begin_block(nullptr, true);
            const uint16_t* weights = b;
            for (int64_t r = 0; r < p.runs; ++r) weights = tiles_add(a + 32 * i * p.pitch + p.starts[r], p.pitch, weights, p.length, p.step);
            tiles_end_block(p.c + 1024 * i);
        }
        return;
    }
    const int64_t part = PART / p.step * p.step;
    for (int64_t r = 0; r < p.runs; ++r) {
        for (int64_t k = 0; k < p.length; k += part) {
            const int64_t length = p.length - k < part ? p.length - k : part;
            for (int64_t i = 0; i < p.count; ++i) {
                tiles_begin_block(p.c + 1024 * i, r == 0 && k == 0);
                tiles_add(a + 32 * i * p.pitch + p.starts[r] + k, p.pitch, b, length, p.step);
                tiles_end_block(p.c + 1024 * i);
            }
            b += 32 * length;
        }
    }
}

// 64 x 16 sums in tiles 0 to 3.
void tiles_block_16(const BlockArguments& p) {
    const int64_t pitch = 2 * p.pitch, step = p.step, rows = 16 * p.pitch;
    for (int64_t i = 0; i < p.count; ++i) {
        const uint16_t* b = static_cast<const uint16_t*>(p.b);
        float* const c = p.c + 1024 * i;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t r = 0; r < p.runs; ++r) {
            const uint16_t* a = static_cast<const uint16_t*>(p.a) + 64 * i * p.pitch + p.starts[r];
            for (int64_t k = 0; k < p.length; k += step, b += 16 * step, a += step) {
                _tile_loadd(6, b, 64);
                _tile_loadd(4, a, pitch);
                _tile_loadd(5, a + rows, pitch);
                _tile_loadd(7, a + 2 * rows, pitch);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(4, a + 3 * rows, pitch);
                _tile_dpbf16ps(1, 5, 6);
                _tile_dpbf16ps(2, 7, 6);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        _tile_stored(2, c + 512, 64);
        _tile_stored(3, c + 768, 64);
    }
}

// Shapes for steps of `step` values.
void tiles_begin_32(int64_t step, void* state) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
        shapes.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 ? 2 * step : 64);
        shapes.rows[tile] = static_cast<uint8_t>(tile >= 6 ? step / 2 : 16);
    }
    tiles_begin(shapes, state);
}

void tiles_begin_16(int64_t step, void* state) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
        shapes.row_bytes[tile] = static_cast<uint16_t>(tile == 4 || tile == 5 || tile == 7 ? 2 * step : 64);
        shapes.rows[tile] = static_cast<uint8_t>(tile == 6 ? step / 2 : 16);
    }
    tiles_begin(shapes, state);
}

bool find_tiles() {
    constexpr int EDX = 3;
    if (!cpu_has(7, 0, EDX, 22) || !cpu_has(7, 0, EDX, 24)) return false;
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // arch_prctl: Linux hands out the tiles' state on request
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

}  // namespace

bool pairs_supported() {
    constexpr int EAX = 0;
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && cpu_has(7, 1, EAX, 5);
}

bool tiles_supported() {
    static const bool found = pairs_supported() && find_tiles();
    return found;
}

Multiplier pairs_multiplier(int64_t outputs) {
    if (outputs == 32) return {pairs_block<12, 2>, 12, 8, 32, nullptr, nullptr};
    return {pairs_block<24, 1>, 24, 4, 16, nullptr, nullptr};
}

Multiplier tiles_multiplier(int64_t outputs) {
    if (outputs == 32) return {tiles_block_32, 32, 2, 32, tiles_begin_32, tiles_end};
    return {tiles_block_16, 64, 1, 16, tiles_begin_16, tiles_end};
}

}  // namespace dfe
