// The products of the op `conv2d` in bfloat16 with sums in float32, on processors that have AVX512_BF16 or AMX (chosen at run time). Compiled
// once, with those instructions; the rules of isa.h hold.
#include "conv2d.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace dfe {
namespace {

bool cpu_has(int leaf, int subleaf, int register_index, int bit) {
    unsigned registers[4] = {};
    return __get_cpuid_count(leaf, subleaf, &registers[0], &registers[1], &registers[2], &registers[3]) && (registers[register_index] >> bit & 1u);
}

template <int Rows, int Vectors>
void pairs_block(const BlockArguments& p) {
    const uint32_t* b = static_cast<const uint32_t*>(p.b);
    const int64_t pitch = p.pitch / 2;
    __m512 sums[Rows][Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) sums[i][j] = _mm512_setzero_ps();
    }
    for (int64_t r = 0; r < p.runs; ++r) {
        const uint32_t* a = static_cast<const uint32_t*>(p.a) + p.starts[r] / 2;
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
        for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(p.c + (i * Vectors + j) * 16, sums[i][j]);
    }
}

// 32 x 32 sums in tiles 0 to 3. The weights of a step are `step / 2` rows of 32 pairs.
void tiles_block_32(const BlockArguments& p) {
    const int64_t pitch = 2 * p.pitch, step = p.step;
    const uint16_t* b = static_cast<const uint16_t*>(p.b);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t r = 0; r < p.runs; ++r) {
        const uint16_t* a = static_cast<const uint16_t*>(p.a) + p.starts[r];
        const uint16_t* const below = a + 16 * p.pitch;
        for (int64_t k = 0; k < p.length; k += step, b += 32 * step) {
            _tile_loadd(6, b, 128);
            _tile_loadd(7, b + 32, 128);
            _tile_loadd(4, a + k, pitch);
            _tile_loadd(5, below + k, pitch);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, p.c, 128);
    _tile_stored(1, p.c + 16, 128);
    _tile_stored(2, p.c + 512, 128);
    _tile_stored(3, p.c + 528, 128);
}

// 64 x 16 sums in tiles 0 to 3.
void tiles_block_16(const BlockArguments& p) {
    const int64_t pitch = 2 * p.pitch, step = p.step, rows = 16 * p.pitch;
    const uint16_t* b = static_cast<const uint16_t*>(p.b);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t r = 0; r < p.runs; ++r) {
        const uint16_t* a = static_cast<const uint16_t*>(p.a) + p.starts[r];
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
    _tile_stored(0, p.c, 64);
    _tile_stored(1, p.c + 256, 64);
    _tile_stored(2, p.c + 512, 64);
    _tile_stored(3, p.c + 768, 64);
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Shapes for steps of `step` values; the thread's own are kept, since other libraries set theirs once and rely on them.
void tiles_begin(TileShapes& shapes, void* state) {
    _tile_storeconfig(state);
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // the intrinsic tells the compiler of its first 8 bytes only
    _tile_loadconfig(&shapes);
}

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

void tiles_end(void* state) {
    if (*static_cast<const uint8_t*>(state) != 0) {
        _tile_loadconfig(state);
    } else {
        _tile_release();
    }
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
    static const bool found = __builtin_cpu_supports("avx512bw") && find_tiles();
    return found;
}

Multiplier pairs_multiplier(int64_t outputs) {
    if (outputs == 32) return {pairs_block<12, 2>, 12, 32, nullptr, nullptr};
    return {pairs_block<24, 1>, 24, 16, nullptr, nullptr};
}

Multiplier tiles_multiplier(int64_t outputs) {
    if (outputs == 32) return {tiles_block_32, 32, 32, tiles_begin_32, tiles_end};
    return {tiles_block_16, 64, 16, tiles_begin_16, tiles_end};
}

}  // namespace dfe
