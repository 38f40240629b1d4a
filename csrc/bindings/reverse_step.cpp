// The op `reverse_step` over raw pointers.
#include "../cpu/reverse_step.h"

#include "common.h"

namespace dfe {
namespace {

void reverse_step(uintptr_t x_t, uintptr_t eps, uintptr_t out, int image_type, int type, std::array<int64_t, 3> shape,
                  std::array<int64_t, 3> strides, std::array<float, 5> numbers, uint64_t seed, uint32_t draw, uint32_t step, int threads,
                  const std::string& level) {
    ReverseStepArguments p{};
    p.x_t = pointer<const void>(x_t), p.eps = pointer<const void>(eps), p.out = pointer<void>(out);
    p.image_type = static_cast<FloatType>(image_type), p.type = static_cast<FloatType>(type);
    p.batch = shape[0], p.pixels = shape[1], p.channels = shape[2];
    p.x_t_stride = strides[0], p.eps_stride = strides[1], p.out_stride = strides[2];
    p.numbers = {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    p.key[0] = static_cast<uint32_t>(seed), p.key[1] = static_cast<uint32_t>(seed >> 32);
    p.draw = draw, p.step = step;
    if (p.batch * p.pixels * p.channels == 0) return;
    plan_reverse_step(p);
    const ReverseStepTiles run = DFE_AT_LEVEL(level_named(level), reverse_step_tiles);

    const Unlocked unlocked;
    const Scratch scratch(p.scratch_floats, pieces_of(p.tiles, threads));
    parallel_for(p.tiles, threads, [&](int piece, int64_t begin, int64_t end) { run(p, begin, end, scratch.of(piece)); });
}

}  // namespace

void plan_reverse_step(ReverseStepArguments& p) {
    p.tile_pixels = std::max<int64_t>(16, 1536 / p.channels / 16 * 16);
    p.tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
    p.scratch_floats = 4 * p.tile_pixels * p.channels + 4 * p.tile_pixels;  // noise, gathered x_t and eps, result; rows of normals
}

void bind_reverse_step(py::module_& module) {
    module.def("reverse_step", &reverse_step, py::arg("x_t"), py::arg("eps"), py::arg("out"), py::arg("image_type"), py::arg("type"),
               py::arg("shape"), py::arg("strides"), py::arg("numbers"), py::arg("seed"), py::arg("draw"), py::arg("step"), py::arg("threads"),
               py::arg("level") = "",
               "The op `reverse_step` over raw pointers; see kernels/reverse_step.py. shape: (batch, pixels, channels); strides: from one pixel "
               "to the next of x_t, eps and out; numbers: from_x, from_eps, from_x0, from_xt, sigma.");
}

}  // namespace dfe
