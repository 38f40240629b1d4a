// The stages of `group_norm` at inference over raw pointers.
#include "../cpu/group_norm_stages.h"

#include <numeric>

#include "call.h"
#include "common.h"

namespace dfe {
namespace {

using Source = std::array<uintptr_t, 4>;

void group_norm_moments(uintptr_t x, int type, std::array<int64_t, 3> shape, int64_t pixel_stride, int64_t tile_pixels, uintptr_t moments,
                        int threads, const std::string& level) {
    MomentsArguments p{};
    p.x = pointer<const void>(x);
    p.type = static_cast<FloatType>(type);
    p.batch = shape[0], p.pixels = shape[1], p.channels = shape[2], p.pixel_stride = pixel_stride;
    p.tile_pixels = tile_pixels;
    p.moments = pointer<float>(moments);
    plan_moments(p);
    const int64_t items = p.batch * p.tiles;
    const MomentsTiles run = DFE_AT_LEVEL(level_named(level), moments_tiles)(p);
    const Unlocked unlocked;
    const Scratch scratch(p.scratch_floats, pieces_of(items, threads));
    parallel_for(items, threads, [&](int piece, int64_t begin, int64_t end) { run(p, begin, end, scratch.of(piece)); },
                 p.batch * p.pixels * p.channels);
}

// sources: two of (moments, counts, tiles, channels); absent tensors are 0.
class GroupNormMerge : public Call {
public:
    GroupNormMerge(std::array<Source, 2> sources, int64_t batch, int64_t groups, uintptr_t weight, uintptr_t bias, uintptr_t shift,
                   int64_t shift_stride, float eps, uintptr_t scale, uintptr_t offset, uintptr_t mean, uintptr_t rstd, const std::string& level)
        : parts_(DFE_AT_LEVEL(level_named(level), merge_parts)) {
        MergeArguments& p = arguments_;
        for (int s = 0; s < 2; ++s) {
            const auto& [moments, counts, tiles, channels] = sources[s];
            p.sources[s] = {pointer<const float>(moments), pointer<const int32_t>(counts), static_cast<int64_t>(tiles), static_cast<int64_t>(channels)};
            p.channels += p.sources[s].channels;
        }
        p.batch = batch, p.groups = groups;
        p.weight = pointer<const float>(weight), p.bias = pointer<const float>(bias);
        p.shift = pointer<const float>(shift), p.shift_stride = shift_stride;
        p.eps = eps;
        p.scale = pointer<float>(scale), p.offset = pointer<float>(offset);
        p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
        plan_merge(p);
    }

    void run(int threads) const override {
        const int64_t items = arguments_.batch * arguments_.parts;
        const Scratch scratch(arguments_.scratch_floats, pieces_of(items, threads));
        parallel_for(items, threads, [&](int piece, int64_t begin, int64_t end) { parts_(arguments_, begin, end, scratch.of(piece)); });
    }

private:
    MergeArguments arguments_{};
    decltype(&base::merge_parts) parts_;
};

void group_norm_apply(std::array<std::array<uintptr_t, 3>, 2> sources, int type, int activation, int resample, std::array<int64_t, 3> shape,
                      uintptr_t scale, uintptr_t offset, uintptr_t y, int64_t y_stride, bool stream, int threads, const std::string& level) {
    ApplyArguments p{};
    for (int s = 0; s < 2; ++s) {
        const auto& [x, channels, stride] = sources[s];
        p.sources[s] = {pointer<const void>(x), static_cast<int64_t>(channels), static_cast<int64_t>(stride)};
        p.channels += p.sources[s].channels;
    }
    p.type = static_cast<FloatType>(type);
    p.activation = static_cast<Activation>(activation);
    p.resample = static_cast<Resample>(resample);
    p.batch = shape[0], p.height = shape[1], p.width = shape[2];
    p.scale = pointer<const float>(scale), p.offset = pointer<const float>(offset);
    p.y = pointer<void>(y), p.y_stride = y_stride;
    p.stream = stream;
    plan_apply(p);
    const int64_t items = p.batch * p.lines;
    const ApplyLines run = DFE_AT_LEVEL(level_named(level), apply_lines)(p);
    const Unlocked unlocked;
    const Scratch scratch(p.scratch_floats, pieces_of(items, threads));
    parallel_for(items, threads, [&](int piece, int64_t begin, int64_t end) { run(p, begin, end, scratch.of(piece)); },
                 p.batch * p.height * p.width * p.channels);
}

// Pixels that fill vectors whatever the number of channels.
int64_t pixels_of_a_row(int64_t channels) { return 128 / std::gcd<int64_t>(channels, 128); }

}  // namespace

void plan_moments(MomentsArguments& p) {
    p.tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
    p.row_pixels = p.pixel_stride == p.channels ? pixels_of_a_row(p.channels) : 1;
    const int64_t lanes = p.row_pixels * p.channels;
    p.chunk_pixels = std::max<int64_t>(4, 8192 / lanes) * p.row_pixels;
    p.scratch_floats = 5 * lanes;
}

void plan_merge(MergeArguments& p) {
    p.part_groups = std::min(p.groups, std::max<int64_t>(1, 64 * p.groups / p.channels));
    p.parts = (p.groups + p.part_groups - 1) / p.part_groups;
    p.scratch_floats = 4 * p.part_groups * (p.channels / p.groups);
}

void plan_apply(ApplyArguments& p) {
    p.lines = p.resample == Resample::down ? p.height / 2 : p.height;
    const bool packed = p.sources[1].x == nullptr && p.sources[0].pixel_stride == p.channels && p.y_stride == p.channels;
    p.row_pixels = packed && p.resample == Resample::none ? pixels_of_a_row(p.channels) : 1;
    p.scratch_floats = 3 * p.row_pixels * p.channels;
}

void bind_group_norm_stages(py::module_& module) {
    module.def("group_norm_moments", &group_norm_moments, py::arg("x"), py::arg("type"), py::arg("shape"), py::arg("pixel_stride"),
               py::arg("tile_pixels"), py::arg("moments"), py::arg("threads"), py::arg("level") = "",
               "The op `group_norm_moments` over raw pointers; see kernels/group_norm_moments.py. shape: (batch, pixels, channels).");
    py::class_<GroupNormMerge, Call, std::shared_ptr<GroupNormMerge>>(
        module, "GroupNormMerge", "A call of the op `group_norm_merge` over raw pointers; see kernels/group_norm_merge.py.")
        .def(py::init<std::array<Source, 2>, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, int64_t, float, uintptr_t, uintptr_t, uintptr_t,
                      uintptr_t, const std::string&>(),
             py::arg("sources"), py::arg("batch"), py::arg("groups"), py::arg("weight"), py::arg("bias"), py::arg("shift"), py::arg("shift_stride"),
             py::arg("eps"), py::arg("scale"), py::arg("offset"), py::arg("mean"), py::arg("rstd"), py::arg("level") = "");
    module.def("group_norm_apply", &group_norm_apply, py::arg("sources"), py::arg("type"), py::arg("activation"), py::arg("resample"),
               py::arg("shape"), py::arg("scale"), py::arg("offset"), py::arg("y"), py::arg("y_stride"), py::arg("stream"), py::arg("threads"),
               py::arg("level") = "",
               "The op `group_norm_apply` over raw pointers; sources: two of (x, channels, pixel stride); shape: (batch, height, width).");
}

}  // namespace dfe
