// The op `attention` on the CPU (formula: kernels/attention.py), for 32 queries of a head at a time: a block of keys gives their scores, these
// in place their exponentials, and those a term of the sum over values, while the largest score and the sum of exponentials of each query are
// kept. Keys and values of a head are packed once for a thread's queries, into scratch.
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "levels.h"
#include "product.h"

namespace dfe {

struct AttentionArguments {
    int64_t batch, pixels, heads, depth;  // depth: the channels of a head
    int64_t pitch_qkv, pitch_y;           // elements from a pixel to the next
    FloatType type;                       // of qkv and y
    Product product;
    const void* qkv;
    void* y;

    // From plan_attention.
    int64_t blocks;          // of the queries of a head
    int64_t keys;            // of a head, with those added to fill panels
    int64_t length, width;   // the depth, filled up for the product with keys and for that with values
    int64_t scratch_floats;  // of a thread
};

// `items` [begin, end) of (sample, head, block of queries).
using AttentionItems = void (*)(const AttentionArguments&, int64_t begin, int64_t end, float* scratch);

constexpr int64_t ATTENTION_QUERIES = 32;  // of a block
// Of a block: its scores, and the values that it multiplies at a time, stay in the first-level cache together.
constexpr int64_t attention_keys(Product product) { return product == Product::float32 ? 128 : 256; }
constexpr int64_t scores_pitch(Product product) { return attention_keys(product) + 16; }  // from query to query: not a power of two

// Fill in the plan; the number of items.
inline int64_t plan_attention(AttentionArguments& p) {
    const auto up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
    p.blocks = (p.pixels + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
    p.keys = up(p.pixels, 32);
    p.length = p.product == Product::tiles ? up(p.depth, 32) : up(p.depth, 2);
    p.width = up(p.depth, 16);
    const int64_t size = p.product == Product::float32 ? 4 : 2, packed = (p.keys * (p.length + p.width) + ATTENTION_QUERIES * p.length) * size;
    p.scratch_floats = packed / 4 + ATTENTION_QUERIES * (scores_pitch(p.product) + p.width + 17) + 5 * 16;
    return p.batch * p.heads * p.blocks;
}

DFE_DECLARE_AT_LEVELS(AttentionItems attention_items(FloatType);)
AttentionItems attention_items_bfloat16(Product);

}  // namespace dfe
