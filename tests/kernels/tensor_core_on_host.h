// Stands in for csrc/cuda/tensor_core.h on the host: instructions of a warp, at which the coroutines of its lanes meet. Stricter than a GPU where
// that finds mistakes: what a copy in the background brings is there only after the wait for its group (not a number before), and every address
// must be aligned and lie in the launch's shared memory.
#pragma once

#include <cmath>
#include <deque>

#include "../../csrc/common/convert.h"

namespace on_host {

struct Copy {
    unsigned char* to;
    const void* from;  // null: zeros
    int bytes;
};
struct Copies {
    std::vector<Copy> open;               // not committed yet
    std::deque<std::vector<Copy>> groups;  // the oldest first
};
static std::vector<Copies> copies;  // of each thread

// What a thread did that products of a warpgroup (wgmma_on_host.h) see only after a fence.
struct Unfenced {
    bool registers;              // they were loaded
    std::vector<uint32_t> runs;  // of 16 bytes of shared memory, by number, that its copies have written
};
static std::vector<Unfenced> unfenced;  // of each thread
static std::vector<int> unfenced_runs;  // threads that wrote a run and have not fenced

// What the lanes of a warp show each other, in turn in two places, so that one meeting for each instruction is enough.
struct Shown {
    float a[2][8], b[2][16][4];
    uint32_t address[2];
    unsigned turn;
};
static std::vector<Shown> shown;

inline void start_tensor_core_block() {
    copies.assign(threads.size(), {});
    shown.resize(threads.size());
    for (Shown& one : shown) one.turn = 0;
    unfenced.assign(threads.size(), {true, {}});
    unfenced_runs.assign(shared_bytes / 16 + 1, 0);
}

inline unsigned char* in_shared(uint32_t address, int bytes = 16) {
    if (address % bytes != 0 || address + bytes > shared_bytes) {
        std::fprintf(stderr, "cuda_on_host: address %u in %u bytes of shared memory\n", address, shared_bytes);
        std::abort();
    }
    return dynamic_shared.data() + address;
}

}  // namespace on_host

namespace dfe {

inline uint32_t shared_address(const void* in_shared) {
    return static_cast<uint32_t>(static_cast<const unsigned char*>(in_shared) - on_host::dynamic_shared.data());
}

inline void ldmatrix_x4(uint32_t (&to)[4], uint32_t address) {
    using namespace on_host;
    const size_t mine = number(*running), warp = mine / 32 * 32, lane = mine % 32;
    const unsigned turn = shown[mine].turn ^= 1;
    shown[mine].address[turn] = address;
    unfenced[mine].registers = true;
    wait(State::at_warp);
    for (int i = 0; i < 4; ++i) memcpy(&to[i], in_shared(shown[warp + 8 * i + lane / 4].address[turn]) + lane % 4 * 4, 4);
}

inline void copy_async(uint32_t address, const void* from, int bytes, bool there) {
    using namespace on_host;
    unsigned char* const to = in_shared(address, bytes);
    if (there && reinterpret_cast<uintptr_t>(from) % bytes != 0) {
        std::fprintf(stderr, "cuda_on_host: copy from an address that is not aligned\n");
        std::abort();
    }
    memset(to, 0xff, bytes);
    copies[number(*running)].open.push_back({to, there ? from : nullptr, bytes});
}
inline void copy_async_16(uint32_t address, const void* from, bool there) { copy_async(address, from, 16, there); }
inline void copy_async_4(uint32_t address, const void* from, bool there) { copy_async(address, from, 4, there); }
inline void copy_async_commit() {
    on_host::Copies& mine = on_host::copies[on_host::number(*on_host::running)];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int Left>
void copy_async_wait() {
    using namespace on_host;
    const size_t thread = number(*running);
    Copies& mine = copies[thread];
    while (mine.groups.size() > Left) {
        for (const Copy& copy : mine.groups.front()) {
            if (copy.from == nullptr) memset(copy.to, 0, copy.bytes);
            else memcpy(copy.to, copy.from, copy.bytes);
            unfenced[thread].runs.push_back(static_cast<uint32_t>((copy.to - dynamic_shared.data()) / 16));
            ++unfenced_runs[unfenced[thread].runs.back()];
        }
        mine.groups.pop_front();
    }
}

inline float from_16_bits(uint32_t word, half) {
    const half value{static_cast<uint16_t>(word)};
    return load(&value);
}
inline float from_16_bits(uint32_t word, bfloat16) {
    return float_of(word << 16);
}
template <typename T>
void unpack(uint32_t word, float& first, float& second, T type) {
    first = from_16_bits(word & 0xffffu, type);
    second = from_16_bits(word >> 16, type);
}
template <typename T>
uint32_t pack(float first, float second, T) {
    T low, high;
    store(&low, first);
    store(&high, second);
    return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// The rows lane / 4 and lane / 4 + 8 of the 16 x 16 first factors that the lanes of the warp show.
inline void rows_of_first_factors(unsigned turn, float (&rows)[2][16]) {
    using namespace on_host;
    const size_t quad = number(*running) / 4 * 4;
    for (int k = 0; k < 16; ++k) {
        for (int below = 0; below < 2; ++below) rows[below][k] = shown[quad + k % 8 / 2].a[turn][2 * (below + 2 * (k / 8)) + k % 2];
    }
}

// The lanes show their fragments; `sum(n, row, column, i)` is then called for the four results i of the running lane, with the 16 products to add.
template <typename T, int N, typename Sum>
void multiply(const uint32_t (&a)[4], const uint32_t (&b)[N][2], Sum sum) {
    using namespace on_host;
    static_assert(N <= 16, "more fragments than `Shown` holds");
    const size_t mine = number(*running), warp = mine / 32 * 32, lane = mine % 32;
    Shown& my = shown[mine];
    const unsigned turn = my.turn ^= 1;
    for (int i = 0; i < 4; ++i) unpack(a[i], my.a[turn][2 * i], my.a[turn][2 * i + 1], T{});
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 2; ++i) unpack(b[n][i], my.b[turn][n][2 * i], my.b[turn][n][2 * i + 1], T{});
    }
    wait(State::at_warp);
    float left[2][16];
    rows_of_first_factors(turn, left);
    for (int n = 0; n < N; ++n) {
        for (int column = 0; column < 2; ++column) {
            float right[16];
            for (int k = 0; k < 16; ++k) right[k] = shown[warp + (2 * (lane % 4) + column) * 4 + k % 8 / 2].b[turn][n][2 * (k / 8) + k % 2];
            for (int below = 0; below < 2; ++below) sum(n, 2 * below + column, left[below], right);
        }
    }
}

template <typename T, int N>
void multiply_add(float (&sums)[N][4], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
    multiply<T, N>(a, b, [&](int n, int i, const float* left, const float* right) {
        float total = sums[n][i];
        for (int k = 0; k < 16; ++k) total += left[k] * right[k];
        sums[n][i] = total;
    });
}

// The sum of 17 terms is rounded once; a tensor core may lose more of the smaller terms.
template <int N>
void multiply_add_half(uint32_t (&sums)[N][2], const uint32_t (&a)[4], const uint32_t (&b)[N][2]) {
    float totals[N][4];
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 2; ++i) unpack(sums[n][i], totals[n][2 * i], totals[n][2 * i + 1], half{});
    }
    multiply<half, N>(a, b, [&](int n, int i, const float* left, const float* right) {
        for (int k = 0; k < 16; ++k) totals[n][i] += left[k] * right[k];
    });
    for (int n = 0; n < N; ++n) {
        for (int i = 0; i < 2; ++i) sums[n][i] = pack(totals[n][2 * i], totals[n][2 * i + 1], half{});
    }
}

template <typename T>
T computed_anew(T value) {
    return value;
}
inline int block_y_anew() { return static_cast<int>(blockIdx.y); }

inline float fast_exp2(float x) { return std::exp2(x); }
inline float fast_reciprocal(float x) { return 1.0f / x; }

}  // namespace dfe
