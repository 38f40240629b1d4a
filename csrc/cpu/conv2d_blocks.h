// The blocks of the products of narrow values of the op `conv2d`, in words of 32 bits: two bfloat16 or four bytes. Included once by each file
// of such a product, which defines first
//     DFE_PER_WORD                  values of a word
//     DFE_VECTOR                    of 16 sums
//     DFE_VECTOR_DOT(sums, a, b)    sums + a b, each a vector of words
//     DFE_TILE_DOT(c, a, b)         tile c += tile a times tile b
#pragma once

#include <immintrin.h>

#include "conv2d.h"
#include "tiles.h"

namespace dfe {
namespace {

// What BlockArguments counts in values, in words.
constexpr int64_t words(int64_t values) { return values / DFE_PER_WORD; }

template <int Rows, int Vectors>
void vectors_block_at(const BlockArguments& p, int64_t at) {
    const uint32_t* b = static_cast<const uint32_t*>(p.b);
    float* const c = p.c + at * Vectors * 16;
    const int64_t pitch = words(p.pitch), length = words(p.length);
    DFE_VECTOR sums[Rows][Vectors] = {};
    for (int64_t r = 0; r < p.runs; ++r) {
        const uint32_t* a = static_cast<const uint32_t*>(p.a) + at * pitch + words(p.starts[r]);
        for (const uint32_t* const end = a + length; a != end; ++a, b += 16 * Vectors) {
            __m512i weights[Vectors];
#pragma GCC unroll 2
            for (int j = 0; j < Vectors; ++j) weights[j] = _mm512_loadu_si512(b + 16 * j);
#pragma GCC unroll 32
            for (int i = 0; i < Rows; ++i) {
                const __m512i value = _mm512_set1_epi32(static_cast<int>(a[i * pitch]));
#pragma GCC unroll 2
                for (int j = 0; j < Vectors; ++j) sums[i][j] = DFE_VECTOR_DOT(sums[i][j], value, weights[j]);
            }
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < Vectors; ++j) _mm512_storeu_si512(c + (i * Vectors + j) * 16, (__m512i)sums[i][j]);
    }
}

template <int Rows, int Vectors>
void vectors_block(const BlockArguments& p) {
    for (int64_t i = 0; i < p.count; ++i) vectors_block_at<Rows, Vectors>(p, i * Rows);
}

// 32 x 32 sums in tiles 0 to 3, over `length` words of a run; added to c unless they are its first. The weights of a step are `step` rows of
// 32 words.
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

const uint32_t* tiles_add(const uint32_t* a, int64_t pitch, const uint32_t* b, int64_t length, int64_t step) {
    const uint32_t* const below = a + 16 * pitch;
    for (int64_t k = 0; k < length; k += step, b += 32 * step) {
        _tile_loadd(6, b, 128);
        _tile_loadd(4, a + k, 4 * pitch);
        _tile_loadd(7, b + 16, 128);
        _tile_loadd(5, below + k, 4 * pitch);
        DFE_TILE_DOT(0, 4, 6);
        DFE_TILE_DOT(1, 4, 7);
        DFE_TILE_DOT(2, 5, 6);
        DFE_TILE_DOT(3, 5, 7);
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
    constexpr int64_t PART = 384, FAR = 1728;  // words of a run: 48 and 216 KiB of weights
    const uint32_t *const a = static_cast<const uint32_t*>(p.a), *b = static_cast<const uint32_t*>(p.b);
    const int64_t pitch = words(p.pitch), length = words(p.length), step = words(p.step);
    if (p.runs * length <= PART || p.runs * length >= FAR) {
        for (int64_t i = 0; i < p.count; ++i) {
            tiles_begin_block(nullptr, true);
            const uint32_t* weights = b;
            for (int64_t r = 0; r < p.runs; ++r) weights = tiles_add(a + 32 * i * pitch + words(p.starts[r]), pitch, weights, length, step);
            tiles_end_block(p.c + 1024 * i);
        }
        return;
    }
    const int64_t part = PART / step * step;
    for (int64_t r = 0; r < p.runs; ++r) {
        for (int64_t k = 0; k < length; k += part) {
            const int64_t count = length - k < part ? length - k : part;
            for (int64_t i = 0; i < p.count; ++i) {
                tiles_begin_block(p.c + 1024 * i, r == 0 && k == 0);
                tiles_add(a + 32 * i * pitch + words(p.starts[r]) + k, pitch, b, count, step);
                tiles_end_block(p.c + 1024 * i);
            }
            b += 32 * count;
        }
    }
}

// 64 x 16 sums in tiles 0 to 3.
void tiles_block_16(const BlockArguments& p) {
    const int64_t pitch = words(p.pitch), step = words(p.step), rows = 16 * pitch;
    for (int64_t i = 0; i < p.count; ++i) {
        const uint32_t* b = static_cast<const uint32_t*>(p.b);
        float* const c = p.c + 1024 * i;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t r = 0; r < p.runs; ++r) {
            const uint32_t* a = static_cast<const uint32_t*>(p.a) + 64 * i * pitch + words(p.starts[r]);
            for (int64_t k = 0; k < words(p.length); k += step, b += 16 * step, a += step) {
                _tile_loadd(6, b, 64);
                _tile_loadd(4, a, 4 * pitch);
                _tile_loadd(5, a + rows, 4 * pitch);
                _tile_loadd(7, a + 2 * rows, 4 * pitch);
                DFE_TILE_DOT(0, 4, 6);
                _tile_loadd(4, a + 3 * rows, 4 * pitch);
                DFE_TILE_DOT(1, 5, 6);
                DFE_TILE_DOT(2, 7, 6);
                DFE_TILE_DOT(3, 4, 6);
            }
        }
        _tile_stored(0, c, 64);
        _tile_stored(1, c + 256, 64);
        _tile_stored(2, c + 512, 64);
        _tile_stored(3, c + 768, 64);
    }
}

// Shapes for steps of `step` values: of pixels in tiles 4, 5 and, where `three`, 7; of weights in the rest of 6 and 7.
void tiles_begin_shapes(int64_t step, bool three, void* state) {
    TileShapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
        const bool pixels = tile == 4 || tile == 5 || (three && tile == 7);
        shapes.row_bytes[tile] = static_cast<uint16_t>(pixels ? 4 * words(step) : 64);
        shapes.rows[tile] = static_cast<uint8_t>(tile >= 6 && !pixels ? words(step) : 16);
    }
    tiles_begin(shapes, state);
}

void tiles_begin_32(int64_t step, void* state) { tiles_begin_shapes(step, false, state); }
void tiles_begin_16(int64_t step, void* state) { tiles_begin_shapes(step, true, state); }

Multiplier vectors_multiplier(int64_t outputs) {
    if (outputs == 32) return {vectors_block<12, 2>, 12, 8, 32, nullptr, nullptr};
    return {vectors_block<24, 1>, 24, 4, 16, nullptr, nullptr};
}

Multiplier narrow_tiles_multiplier(int64_t outputs) {
    if (outputs == 32) return {tiles_block_32, 32, 2, 32, tiles_begin_32, tiles_end};
    return {tiles_block_16, 64, 1, 16, tiles_begin_16, tiles_end};
}

}  // namespace
}  // namespace dfe
