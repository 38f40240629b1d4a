// The shapes of a thread's AMX tiles, for the files that are compiled with those instructions.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace dfe {
namespace {

constexpr int64_t TILE_STATE_BYTES = 64;  // aligned to as many

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Takes up `shapes`; the thread's own are kept in `state`, since other libraries set theirs once and rely on them.
inline void tiles_begin(const TileShapes& shapes, void* state) {
    _tile_storeconfig(state);
    __asm__ volatile("" : : "r"(&shapes) : "memory");  // the intrinsic tells the compiler of its first 8 bytes only
    _tile_loadconfig(&shapes);
}

inline void tiles_end(void* state) {
    if (*static_cast<const uint8_t*>(state) != 0) {
        _tile_loadconfig(state);
    } else {
        _tile_release();
    }
}

}  // namespace
}  // namespace dfe
