// The op `score` on the CPU (formula: kernels/score.py).
#pragma once

#include <cstdint>

#include "../common/convert.h"
#include "../common/score.h"
#include "levels.h"

namespace dfe {

struct ScoreArguments {
    const void* logits;  // (maps, batch, pixels), `stride` values from one pixel to the next
    FloatType type;
    int64_t maps, batch, pixels, stride;
    const float* threshold;
    int64_t k;
    float *anomaly_map, *pred_score;  // (batch, pixels), (batch)
    uint8_t* pred_label;              // (batch)
    int32_t* workspace;               // (batch, 2 groups): the largest key of each group in the first half
    int64_t groups;
};

struct ScorePasses {
    // The map and the largest keys of groups [begin, end) of those of all images.
    void (*groups)(const ScoreArguments&, int64_t begin, int64_t end);
    // Score and label of images [begin, end); `room` holds `pixels` keys.
    void (*images)(const ScoreArguments&, int64_t begin, int64_t end, int32_t* room);
};

DFE_DECLARE_AT_LEVELS(ScorePasses score_passes(const ScoreArguments&);)

}  // namespace dfe
