// The loop over items of `attention`, for the files that compile it for a product.
#pragma once

#include <math.h>

#include "attention.h"

namespace dfe {
namespace {

// Of 32 queries: c (rows, columns) = a b, or c += a b, for panels of 16 columns. a: (rows, pitch_a). b: the first panel, (length, 16), or with
// pairs of rows interleaved (length / 2, 16, 2) where the product takes those; the next panel is stride_b further on.
template <typename G>
struct Panels {
    const G* a;
    int64_t pitch_a;
    const G* b;
    int64_t stride_b, length;
    float* c;
    int64_t pitch_c, rows;
    bool add;
};

// What a block of queries knows after some keys. largest: score of each, times factor; totals: sums of exponentials, in 16 lanes each.
struct Softmax {
    float *scores, *largest, *totals, *sums;
    int64_t rows, width;
    float factor;  // of the scores, for powers of two
    bool first;    // whether there were no keys before
};

// Ask for `count` values from `from` on, which will be read, or written, in the second-level cache; any address will do.
template <bool Written, typename T>
inline void ask_for([[maybe_unused]] const T* from, [[maybe_unused]] int64_t count) {
#if defined(__AVX512F__)
    for (int64_t at = 0; at < count; at += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + at, Written, 2);
#endif
}

// Steps: the types Element (what is multiplied) and Value (of qkv and y), the keys of a block, from a query's scores to the next, and what is
// called below.
template <typename Steps>
void attend(const AttentionArguments& p, int64_t begin, int64_t end, float* scratch) {
    using G = typename Steps::Element;
    using T = typename Steps::Value;
    auto take = [at = reinterpret_cast<uintptr_t>(scratch)](int64_t bytes) mutable {
        const uintptr_t start = (at + 63) / 64 * 64;
        at = start + static_cast<uintptr_t>(bytes);
        return reinterpret_cast<void*>(start);
    };
    constexpr int64_t SIZE = sizeof(G), FLOAT = sizeof(float), ROWS = ATTENTION_QUERIES;
    G* const keys = static_cast<G*>(take(p.keys * p.length * SIZE));
    G* const values = static_cast<G*>(take(p.keys * p.width * SIZE));
    G* const queries = static_cast<G*>(take(ROWS * p.length * SIZE));
    float* const scores = static_cast<float*>(take(ROWS * Steps::PITCH * FLOAT));
    float* const sums = static_cast<float*>(take(ROWS * p.width * FLOAT));
    float* const totals = static_cast<float*>(take(ROWS * 17 * FLOAT));

    Steps steps;
    int64_t packed = -1;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item / p.blocks, first = item % p.blocks * ROWS;
        const int64_t pixel = head / p.heads * p.pixels, channel = head % p.heads * p.depth;
        const T* const from = static_cast<const T*>(p.qkv) + pixel * p.pitch_qkv + 3 * channel;
        if (packed != head) {
            steps.pack_keys(p, from + p.depth, keys);
            steps.pack_values(p, from + 2 * p.depth, values);
            packed = head;
        }
        const int64_t rows = p.pixels - first < ROWS ? p.pixels - first : ROWS;
        Softmax state{scores, totals + 16 * ROWS, totals, sums, rows, p.width, 1.44269504f / sqrtf(static_cast<float>(p.depth)), true};
        T* const y = static_cast<T*>(p.y) + (pixel + first) * p.pitch_y + channel;

        // The next head of the sample lies between the lines of this one: each block of queries asks for as many of its pixels.
        const T* next = from + 3 * p.depth + first * p.pitch_qkv;
        const int64_t share = (head + 1) % p.heads == 0 ? 0 : (rows + p.blocks - 1) / p.blocks;

        steps.take_queries(p, from + first * p.pitch_qkv, rows, state.factor, queries);
        for (int64_t at = 0; at < p.keys; at += Steps::KEYS, state.first = false) {
            const int64_t count = p.keys - at < Steps::KEYS ? p.keys - at : Steps::KEYS;
            const int64_t existing = p.pixels - at < count ? p.pixels - at : count;
            for (int64_t k = 0; k < count; k += 32) {
                const Panels<G> panels{queries, p.length, keys + (at + k) * p.length, 16 * p.length, p.length, scores + k, Steps::PITCH, rows, false};
                Steps::template multiply<2>(panels);
                for (int64_t i = 0; i < share; ++i, next += p.pitch_qkv) ask_for<false>(next, 3 * p.depth);
            }
            steps.exponentials(state, existing);
            for (int64_t c = 0; c < p.width; c += 32) {
                const Panels<G> panels{reinterpret_cast<const G*>(scores), Steps::PITCH * FLOAT / SIZE, values + c * p.keys + 16 * at, 16 * p.keys,
                                       count, sums + c, p.width, rows, !state.first};
                if (p.width - c > 16) {
                    Steps::template multiply<2>(panels);
                } else {
                    Steps::template multiply<1>(panels);
                }
            }
        }
        for (int64_t r = 0; r < rows; ++r) steps.write(sums + r * p.width, totals + 16 * r, p.depth, y + r * p.pitch_y);
    }
}

}  // namespace
}  // namespace dfe
