// The op `score` (formula: kernels/score.py). A first pass writes the map and the largest key of each group of pixels; the k-th largest of those
// bounds the k-th largest pixel from below, so that the second pass looks at few groups and keeps few pixels.
#include "score.h"

#include "isa.h"
#include "slices.h"

namespace dfe {
namespace DFE_ISA {
namespace {

template <typename T>
void add_probabilities(const T* DFE_RESTRICT logits, int64_t count, float* DFE_RESTRICT sums) {
    for (int64_t i = 0; i < count; ++i) sums[i] += sigmoid(load(logits + i));
}

template <typename T>
void probabilities(const T* DFE_RESTRICT logits, int64_t count, float* DFE_RESTRICT out) {
    for (int64_t i = 0; i < count; ++i) out[i] = sigmoid(load(logits + i));
}

void divide(float* values, int64_t count, float divisor) {
    for (int64_t i = 0; i < count; ++i) values[i] /= divisor;
}

int32_t largest_key(const float* values, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t key = key_of(values[i]);
        largest = key > largest ? key : largest;
    }
    return largest;
}

template <typename T>
void map_groups(const ScoreArguments& p, int64_t begin, int64_t end) {
    T room[SCORE_GROUP];
    for (int64_t at = begin; at < end; ++at) {
        const int64_t n = at / p.groups, group = at % p.groups, left = p.pixels - group * SCORE_GROUP;
        const int64_t first = n * p.pixels + group * SCORE_GROUP, count = left < SCORE_GROUP ? left : SCORE_GROUP;
        float* const map = p.anomaly_map + first;
        for (int64_t m = 0; m < p.maps; ++m) {
            const T* const from = static_cast<const T*>(p.logits) + (m * p.batch * p.pixels + first) * p.stride;
            const T* const logits = packed(from, p.stride, 1, count, room);
            if (m == 0) {
                probabilities(logits, count, map);
            } else {
                add_probabilities(logits, count, map);
            }
        }
        if (p.maps > 1) divide(map, count, static_cast<float>(p.maps));
        p.workspace[n * 2 * p.groups + group] = largest_key(map, count);
    }
}

struct Chosen {
    int32_t key;   // the k-th largest
    int64_t left;  // how many of its equals are among the k largest
};

// Digit by digit from the highest: those of the k-th largest of `count` keys, 1 <= k <= count.
Chosen kth_largest(const int32_t* keys, int64_t count, int64_t k) {
    int32_t prefix = 0, known = 0;  // the digits found, and a mask of them
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t counts[256];
        for (int64_t& one : counts) one = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (((keys[i] ^ prefix) & known) == 0) ++counts[(keys[i] >> shift) & 255];
        }
        int32_t digit = 255;
        for (; counts[digit] < k; --digit) k -= counts[digit];
        prefix |= digit << shift;
        known |= 255 << shift;
    }
    return {prefix, k};
}

void score_images(const ScoreArguments& p, int64_t begin, int64_t end, int32_t* room) {
    for (int64_t n = begin; n < end; ++n) {
        const int32_t* const largest = p.workspace + n * 2 * p.groups;
        const float* const map = p.anomaly_map + n * p.pixels;
        const int32_t bound = p.k <= p.groups ? kth_largest(largest, p.groups, p.k).key : 0;
        int64_t kept = 0;
        bool number = true;
        for (int64_t group = 0; group < p.groups; ++group) {
            if (largest[group] < bound) continue;
            number = number && largest[group] <= KEY_OF_INFINITY;
            const int64_t first = group * SCORE_GROUP, stop = first + SCORE_GROUP < p.pixels ? first + SCORE_GROUP : p.pixels;
            for (int64_t i = first; i < stop; ++i) {
                room[kept] = key_of(map[i]);
                kept += room[kept] >= bound;
            }
        }
        const Chosen chosen = kth_largest(room, kept, p.k);
        double sum = static_cast<double>(chosen.left) * value_of(chosen.key);
        for (int64_t i = 0; i < kept; ++i) sum += room[i] > chosen.key ? value_of(room[i]) : 0.0f;
        const float mean = static_cast<float>(sum / static_cast<double>(p.k));
        const float score = number ? (mean < 1.0f ? mean : 1.0f) : value_of(KEY_OF_INFINITY + 0x400000);
        p.pred_score[n] = score;
        p.pred_label[n] = score > *p.threshold;
    }
}

}  // namespace

ScorePasses score_passes(const ScoreArguments& p) {
    switch (p.type) {
        case FloatType::float16: return {map_groups<half>, score_images};
        case FloatType::bfloat16: return {map_groups<bfloat16>, score_images};
        default: return {map_groups<float>, score_images};
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
