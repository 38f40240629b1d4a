// The addresses of csrc/common/conv2d_tile.h, for tests/kernels/test_conv2d_cuda.py: what each tile is, and in how many turns shared memory serves
// each kind of access of a warp (1: no bank conflict).
#include <algorithm>
#include <map>
#include <set>
#include <vector>

#include "../../csrc/common/conv2d_tile.h"

namespace {

// Turns of the worst part of a warp's access: shared memory serves 128 bytes at a time, so `Bytes` for each of 128 / Bytes lanes; a bank is 4 bytes
// wide and serves one address in a turn.
template <int Bytes, typename Address>
int turns(Address address) {
    int worst = 0;
    constexpr int lanes = 128 / Bytes;
    for (int first = 0; first < 32; first += lanes) {
        std::map<int, std::set<int>> banks;
        for (int lane = first; lane < first + lanes; ++lane) {
            for (int byte = 0; byte < Bytes; byte += 4) banks[(address(lane) + byte) / 4 % 32].insert((address(lane) + byte) / 4);
        }
        for (const auto& [bank, words] : banks) worst = std::max(worst, static_cast<int>(words.size()));
    }
    return worst;
}

template <typename Tile>
int loader_turns() {
    int worst = 0;
    for (int warp = 0; warp < Tile::THREADS / 32; ++warp) {
        worst = std::max(worst, turns<16>([&](int lane) {
                             const int v = warp * 32 + lane;
                             return dfe::input_offset<Tile>(dfe::loader_pixel<Tile>(v), dfe::loader_group<Tile>(v));
                         }));
    }
    return worst;
}

// Sectors of 32 bytes that a warp's loads touch, against the fewest possible; pixels follow each other in memory.
template <typename Tile>
int loader_sectors() {
    std::set<int> sectors;
    for (int lane = 0; lane < 32; ++lane) {
        sectors.insert((dfe::loader_pixel<Tile>(lane) * 2 * Tile::CHANNELS + dfe::loader_group<Tile>(lane) * 16) / 32);
    }
    return static_cast<int>(sectors.size());
}

template <typename Tile>
int fragment_turns(int shift, int reach) {
    const int halo_width = (1 << shift) + 2 * reach;
    const dfe::Conv2dPlace place{shift, halo_width, 0, 0, 1 << 20, 1 << 20};
    int worst = 0;
    for (int fragment = 0; fragment < Tile::PIXELS / 16; ++fragment) {
        for (int tap = 0; tap < (reach > 0 ? 9 : 1); ++tap) {
            const int shifted = reach * (tap / 3 * halo_width + tap % 3);
            for (int step = 0; step < Tile::STEPS; ++step) {
                worst = std::max(worst, turns<16>([&](int lane) {
                                     const int pixel = place.first_read(16 * fragment + dfe::fragment_pixel(lane)) + shifted;
                                     return dfe::input_offset<Tile>(pixel, 0) + dfe::fragment_offset(lane, step);
                                 }));
            }
        }
    }
    return worst;
}

template <typename Tile>
int weight_turns() {
    int worst = 0;
    for (int step = 0; step < Tile::STEPS; ++step) {
        for (int pair = 0; pair < Tile::OUTPUTS / 16; ++pair) {
            worst = std::max(worst, turns<16>([&](int lane) { return dfe::weight_offset<Tile>(step, pair, lane); }));
        }
    }
    return worst;
}

// For wgmma: of the reads of core matrices, 8 runs of 16 bytes each; 0 where these are not the whole stage, each run once.
template <typename Tile>
int core_matrix_turns() {
    int worst = 0;
    std::set<int> runs;
    for (int matrix = 0; matrix < Tile::STEPS * Tile::OUTPUTS / 4; ++matrix) {
        const int step = matrix / (Tile::OUTPUTS / 4), outputs = matrix / 2 % (Tile::OUTPUTS / 8), half = matrix % 2;
        const int start = step * Tile::STEP_BYTES + outputs * dfe::WEIGHT_STRIDE + half * dfe::WEIGHT_LEADING;
        for (int row = 0; row < 8; ++row) runs.insert(start + 16 * row);
        worst = std::max(worst, turns<16>([&](int lane) { return start + lane % 8 * 16; }));
    }
    return static_cast<int>(runs.size()) == Tile::STAGE_RUNS && *runs.begin() == 0 && *runs.rbegin() == Tile::STAGE_BYTES - 16 ? worst : 0;
}

template <typename Tile>
int staging_write_turns() {
    int worst = 0;
    for (int eighth = 0; eighth < 2 * Tile::PAIRS; ++eighth) {
        for (int below = 0; below < 2; ++below) {
            worst = std::max(worst, turns<8>([&](int lane) { return dfe::staging_write<Tile>(lane, eighth, below); }));
        }
    }
    return worst;
}

template <typename Tile>
int staging_read_turns() {
    int worst = 0;
    for (int pass = 0; pass < Tile::PASSES; ++pass) {
        for (int turn = 0; turn < 2; ++turn) worst = std::max(worst, turns<16>([&](int lane) { return dfe::staging_read<Tile>(lane, pass, turn); }));
    }
    return worst;
}

// Whether the halo's every pixel and group of channels has one thread and one i < VECTORS.
template <typename Tile>
int loader_covers(int halo_pixels) {
    std::vector<int> seen(halo_pixels * Tile::GROUPS);
    for (int v = 0; v < Tile::VECTORS * Tile::THREADS; ++v) {
        const int pixel = dfe::loader_pixel<Tile>(v), group = dfe::loader_group<Tile>(v);
        // The kernel takes the group of i = 0, and steps of so many pixels for the others.
        const int thread = v % Tile::THREADS, i = v / Tile::THREADS;
        if (group != dfe::loader_group<Tile>(thread)) return 0;
        if (pixel != dfe::loader_pixel<Tile>(thread) + i * (Tile::THREADS / Tile::GROUPS)) return 0;
        if (pixel < halo_pixels) ++seen[pixel * Tile::GROUPS + group];
    }
    return std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; });
}

template <typename Tile>
void describe(int* to) {
    const int numbers[] = {Tile::PIXELS, Tile::OUTPUTS, Tile::CHANNELS, Tile::WARPS_M, Tile::WARPS_N, Tile::STAGES, Tile::VECTORS, Tile::BLOCKS,
                           Tile::THREADS, Tile::STAGES * Tile::STAGE_BYTES + 4 * Tile::FACTORS, 2 * Tile::PITCH + 4, Tile::EPILOGUE_BYTES};
    std::copy(std::begin(numbers), std::end(numbers), to);
}

struct Entry {
    const char* name;
    void (*describe)(int*);
    int (*covers)(int);
    int (*fragments)(int, int);
    int (*others[5])();
};

#define ENTRY_OF(WEIGHT_TURNS, NAME, ...)                                                                                                           \
    {#NAME,                                                                                                                                         \
     describe<dfe::Conv2dTile<__VA_ARGS__>>,                                                                                                        \
     loader_covers<dfe::Conv2dTile<__VA_ARGS__>>,                                                                                                   \
     fragment_turns<dfe::Conv2dTile<__VA_ARGS__>>,                                                                                                  \
     {loader_turns<dfe::Conv2dTile<__VA_ARGS__>>, WEIGHT_TURNS<dfe::Conv2dTile<__VA_ARGS__>>, staging_write_turns<dfe::Conv2dTile<__VA_ARGS__>>,     \
      staging_read_turns<dfe::Conv2dTile<__VA_ARGS__>>, loader_sectors<dfe::Conv2dTile<__VA_ARGS__>>}},
#define ENTRY(...) ENTRY_OF(weight_turns, __VA_ARGS__)
#define WGMMA_ENTRY(...) ENTRY_OF(core_matrix_turns, __VA_ARGS__)
const Entry entries[] = {DFE_CONV2D_TILES(ENTRY) DFE_CONV2D_WGMMA_TILES(WGMMA_ENTRY)};

}  // namespace

extern "C" {
int tile_count() { return static_cast<int>(std::size(entries)); }
const char* tile_name(int tile) { return entries[tile].name; }
void tile_numbers(int tile, int* to) { entries[tile].describe(to); }
int tile_loader_covers(int tile, int halo_pixels) { return entries[tile].covers(halo_pixels); }
int tile_fragment_turns(int tile, int shift, int reach) { return entries[tile].fragments(shift, reach); }
// Of the loader's stores, the reads of weights, the staging's writes and reads; then sectors that a warp's loads touch.
int tile_turns(int tile, int which) { return entries[tile].others[which](); }
}
