// The op `group_norm` and its gradient over raw pointers.
#include "../cpu/group_norm.h"

#include <numeric>

#include "common.h"

namespace dfe {
namespace {

GroupNormArguments group_norm_arguments(std::array<int64_t, 4> shape, int type, int activation, float eps, uintptr_t x, uintptr_t weight,
                                             uintptr_t bias, uintptr_t shift, uintptr_t mean, uintptr_t rstd) {
    GroupNormArguments p{};
    p.batch = shape[0], p.pixels = shape[1], p.channels = shape[2], p.groups = shape[3];
    p.type = static_cast<FloatType>(type);
    p.activation = static_cast<Activation>(activation);
    p.eps = eps;
    p.x = pointer<const void>(x);
    p.weight = pointer<const float>(weight), p.bias = pointer<const float>(bias), p.shift = pointer<const float>(shift);
    p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
    return p;
}

// Whole samples to the threads where there are enough of them, so that each stays in one thread's cache; else the tiles of one sample.
// The results are the same.
void run_passes(const GroupNormArguments& p, const GroupNormPasses& passes, int threads) {
    const int64_t values = p.pixels * p.channels;
    if (p.batch >= threads) {
        const Scratch scratch(p.shared_floats + p.scratch_floats, pieces_of(p.batch, threads));
        const auto samples = [&](int piece, int64_t begin, int64_t end) {
            float* const shared = scratch.of(piece);
            for (int64_t n = begin; n < end; ++n) {
                passes.sums(p, n, 0, p.tiles, shared, shared + p.shared_floats);
                passes.join(p, n, shared);
                passes.apply(p, n, 0, p.tiles, shared, shared + p.shared_floats);
            }
        };
        parallel_for(p.batch, threads, samples, p.batch * values);
        return;
    }
    const Scratch scratch(p.scratch_floats, pieces_of(p.tiles, threads), p.shared_floats);
    float* const shared = scratch.shared();
    for (int64_t n = 0; n < p.batch; ++n) {
        const auto sums = [&](int piece, int64_t begin, int64_t end) { passes.sums(p, n, begin, end, shared, scratch.of(piece)); };
        const auto apply = [&](int piece, int64_t begin, int64_t end) { passes.apply(p, n, begin, end, shared, scratch.of(piece)); };
        parallel_for(p.tiles, threads, sums, values);
        passes.join(p, n, shared);
        parallel_for(p.tiles, threads, apply, values);
    }
}

void group_norm(std::array<int64_t, 4> shape, int type, int activation, float eps, uintptr_t x, uintptr_t weight, uintptr_t bias,
                uintptr_t shift, uintptr_t mean, uintptr_t rstd, uintptr_t y, bool stream, int threads, const std::string& level) {
    GroupNormArguments p = group_norm_arguments(shape, type, activation, eps, x, weight, bias, shift, mean, rstd);
    p.y = pointer<void>(y);
    p.stream = stream;
    plan_group_norm(p);
    const auto passes = DFE_AT_LEVEL(level_named(level), group_norm_forward)(p);
    const Unlocked unlocked;
    run_passes(p, passes, threads);
}

void group_norm_backward(std::array<int64_t, 4> shape, int type, int activation, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t shift,
                         uintptr_t mean, uintptr_t rstd, uintptr_t dy, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t dshift,
                         int threads, const std::string& level) {
    GroupNormArguments p = group_norm_arguments(shape, type, activation, 0.0f, x, weight, bias, shift, mean, rstd);
    p.dy = pointer<const void>(dy);
    p.dx = pointer<void>(dx);
    p.dshift = pointer<float>(dshift);
    plan_group_norm(p);
    const auto passes = DFE_AT_LEVEL(level_named(level), group_norm_backward)(p);
    const Unlocked unlocked;
    std::vector<double> parts(static_cast<size_t>(2 * p.batch * p.channels));
    p.dweight = parts.data();
    p.dbias = parts.data() + p.batch * p.channels;
    run_passes(p, passes, threads);
    for (int64_t c = 0; c < p.channels; ++c) {
        double weight_sum = 0.0, bias_sum = 0.0;
        for (int64_t n = 0; n < p.batch; ++n) {
            weight_sum += p.dweight[n * p.channels + c];
            bias_sum += p.dbias[n * p.channels + c];
        }
        pointer<float>(dweight)[c] = static_cast<float>(weight_sum);
        pointer<float>(dbias)[c] = static_cast<float>(bias_sum);
    }
}

}  // namespace

void plan_group_norm(GroupNormArguments& p) {
    p.row_pixels = 128 / std::gcd<int64_t>(p.channels, 128);
    p.lanes = p.row_pixels * p.channels;
    p.tile_pixels = std::max<int64_t>(4, 8192 / p.lanes) * p.row_pixels;
    p.tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
    p.keep = p.dy != nullptr && p.activation != Activation::none && p.pixels * p.channels <= 1 << 18;
    p.shared_floats = (6 + 3 * p.tiles) * p.channels + 3 * p.lanes + (p.keep ? p.pixels * p.channels : 0);
    p.scratch_floats = 7 * p.lanes;
}

void bind_group_norm(py::module_& module) {
    module.def("group_norm", &group_norm, py::arg("shape"), py::arg("type"), py::arg("activation"), py::arg("eps"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("shift"), py::arg("mean"), py::arg("rstd"), py::arg("y"), py::arg("stream"),
               py::arg("threads"), py::arg("level") = "",
               "The op `group_norm` over raw pointers; see kernels/group_norm.py. shape: (batch, pixels, channels, groups); shift may be 0.");
    module.def("group_norm_backward", &group_norm_backward, py::arg("shape"), py::arg("type"), py::arg("activation"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("shift"), py::arg("mean"), py::arg("rstd"), py::arg("dy"), py::arg("dx"),
               py::arg("dweight"), py::arg("dbias"), py::arg("dshift"), py::arg("threads"), py::arg("level") = "",
               "Its gradient over raw pointers; shift and dshift may be 0.");
}

}  // namespace dfe
