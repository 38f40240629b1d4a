// The op `score` over raw pointers.
#include "../cpu/score.h"

#include "common.h"

namespace dfe {
namespace {

void score(uintptr_t logits, int type, std::array<int64_t, 3> shape, int64_t stride, uintptr_t threshold, int64_t k, uintptr_t anomaly_map,
           uintptr_t pred_score, uintptr_t pred_label, uintptr_t workspace, int threads, const std::string& level) {
    ScoreArguments p{};
    p.logits = pointer<const void>(logits);
    p.type = static_cast<FloatType>(type);
    p.maps = shape[0], p.batch = shape[1], p.pixels = shape[2], p.stride = stride;
    p.threshold = pointer<const float>(threshold);
    p.k = k;
    if (k < 1 || k > p.pixels || p.maps < 1) throw std::invalid_argument("k is not within 1 and the number of pixels, or there is no map");
    p.anomaly_map = pointer<float>(anomaly_map), p.pred_score = pointer<float>(pred_score), p.pred_label = pointer<uint8_t>(pred_label);
    p.workspace = pointer<int32_t>(workspace);
    p.groups = (p.pixels + SCORE_GROUP - 1) / SCORE_GROUP;
    const ScorePasses passes = DFE_AT_LEVEL(level_named(level), score_passes)(p);

    const Unlocked unlocked;
    parallel_for(p.batch * p.groups, threads, [&](int, int64_t begin, int64_t end) { passes.groups(p, begin, end); });
    const Scratch room(p.pixels + 1, pieces_of(p.batch, threads));
    parallel_for(p.batch, threads, [&](int piece, int64_t begin, int64_t end) {
        passes.images(p, begin, end, reinterpret_cast<int32_t*>(room.of(piece)));
    });
}

}  // namespace

void bind_score(py::module_& module) {
    module.def("score", &score, py::arg("logits"), py::arg("type"), py::arg("shape"), py::arg("stride"), py::arg("threshold"), py::arg("k"),
               py::arg("anomaly_map"), py::arg("pred_score"), py::arg("pred_label"), py::arg("workspace"), py::arg("threads"),
               py::arg("level") = "",
               "The op `score` over raw pointers; see kernels/score.py. shape: (maps, batch, pixels); stride: from one pixel to the next.");
}

}  // namespace dfe
