// The ops `upsample_bilinear` and `max_pool` over raw pointers.
#include "../cpu/resample.h"

#include "common.h"

namespace dfe {
namespace {

ResampleArguments resample_arguments(uintptr_t x, uintptr_t y, int type, std::array<int64_t, 4> shape, std::array<int64_t, 2> strides) {
    ResampleArguments p{};
    p.x = pointer<const void>(x), p.y = pointer<void>(y);
    p.type = static_cast<FloatType>(type);
    p.batch = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
    p.x_stride = strides[0], p.y_stride = strides[1];
    return p;
}

void run_rows(const ResampleArguments& p, ResampleRows run, int64_t rows, int64_t scratch_floats, int threads) {
    if (p.batch * p.width * p.channels == 0) return;
    const Unlocked unlocked;
    const Scratch scratch(scratch_floats, pieces_of(rows, threads));
    parallel_for(rows, threads, [&](int piece, int64_t begin, int64_t end) { run(p, begin, end, scratch.of(piece)); });
}

void upsample_bilinear(uintptr_t x, uintptr_t y, int type, std::array<int64_t, 4> shape, std::array<int64_t, 2> strides, int threads,
                       bool stream, const std::string& level) {
    ResampleArguments p = resample_arguments(x, y, type, shape, strides);
    p.stream = stream;
    const ResampleRows run = DFE_AT_LEVEL(level_named(level), upsample_bilinear_rows);
    run_rows(p, run, p.batch * 2 * p.height, (p.width + 2) * p.channels, threads);
}

void max_pool(uintptr_t x, uintptr_t y, int type, std::array<int64_t, 4> shape, std::array<int64_t, 2> strides, int threads,
              const std::string& level) {
    const ResampleArguments p = resample_arguments(x, y, type, shape, strides);
    run_rows(p, DFE_AT_LEVEL(level_named(level), max_pool_rows), p.batch * (p.height / 2), 0, threads);
}

}  // namespace

void bind_resample(py::module_& module) {
    module.def("upsample_bilinear", &upsample_bilinear, py::arg("x"), py::arg("y"), py::arg("type"), py::arg("shape"), py::arg("strides"),
               py::arg("threads"), py::arg("stream") = false, py::arg("level") = "",
               "The op `upsample_bilinear` over raw pointers; see kernels/resample.py. shape: that of x; strides: from one pixel to the next.");
    module.def("max_pool", &max_pool, py::arg("x"), py::arg("y"), py::arg("type"), py::arg("shape"), py::arg("strides"), py::arg("threads"),
               py::arg("level") = "", "The op `max_pool` over raw pointers; as upsample_bilinear.");
}

}  // namespace dfe
