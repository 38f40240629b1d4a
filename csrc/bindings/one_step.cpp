// The op `one_step` over raw pointers.
#include "../cpu/one_step.h"

#include "common.h"

namespace dfe {
namespace {

void one_step(uintptr_t x_t, uintptr_t eps, uintptr_t x_0, uintptr_t pair, uintptr_t reconstruction, int image_type, int type, int64_t pixels,
              int64_t channels, std::array<int64_t, 4> strides, const std::vector<float>& from_x, const std::vector<float>& from_eps,
              float weight, float unit_gain, float unit_offset, int threads, bool stream, const std::string& level) {
    OneStepArguments p{};
    p.x_t = pointer<const void>(x_t), p.eps = pointer<const void>(eps), p.x_0 = pointer<const void>(x_0);
    p.pair = pointer<void>(pair), p.reconstruction = pointer<float>(reconstruction);
    p.image_type = static_cast<FloatType>(image_type), p.type = static_cast<FloatType>(type);
    p.pixels = pixels, p.channels = channels;
    p.x_t_stride = strides[0], p.eps_stride = strides[1], p.x_0_stride = strides[2], p.pair_stride = strides[3];
    p.scales = static_cast<int>(from_x.size());
    if (p.scales < 1 || p.scales > 2 || from_eps.size() != from_x.size()) throw std::invalid_argument("one or two scales, with both numbers");
    for (int s = 0; s < p.scales; ++s) p.numbers.from_x[s] = from_x[s], p.numbers.from_eps[s] = from_eps[s];
    p.numbers.weight = weight, p.numbers.unit_gain = unit_gain, p.numbers.unit_offset = unit_offset;
    if (pixels * channels == 0) return;
    plan_one_step(p);
    const OneStepTiles run = DFE_AT_LEVEL(level_named(level), one_step_tiles);

    const Unlocked unlocked;
    const Scratch scratch(p.scratch_floats, pieces_of(p.tiles, threads));
    parallel_for(p.tiles, threads, [&](int piece, int64_t begin, int64_t end) { run(p, stream, begin, end, scratch.of(piece)); },
                 p.pixels * p.channels);
}

}  // namespace

void plan_one_step(OneStepArguments& p) {
    p.tile_pixels = std::max<int64_t>(16, 1536 / p.channels / 16 * 16);
    p.tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
    // Gathered x_t and x_0 of three tensors, eps of two; the result, x_0 converted, unit pixels; the pair, twice as large.
    p.scratch_floats = 10 * p.tile_pixels * p.channels;
}

void bind_one_step(py::module_& module) {
    module.def("one_step", &one_step, py::arg("x_t"), py::arg("eps"), py::arg("x_0"), py::arg("pair"), py::arg("reconstruction"),
               py::arg("image_type"), py::arg("type"), py::arg("pixels"), py::arg("channels"), py::arg("strides"), py::arg("from_x"),
               py::arg("from_eps"), py::arg("weight"), py::arg("unit_gain"), py::arg("unit_offset"), py::arg("threads"),
               py::arg("stream") = false, py::arg("level") = "",
               "The op `one_step` over raw pointers; see kernels/one_step.py. strides: from one pixel to the next of x_t, eps, x_0 and pair; "
               "reconstruction may be 0.");
}

}  // namespace dfe
