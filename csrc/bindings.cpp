// The Python module dfengine._native: CPU kernels over raw pointers. The launchers in kernels/ check shapes, strides and types; nothing is
// copied and the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/ingest.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

struct Level {
    const char* name;
    bool usable;
    dfe::IngestTiles ingest;
};

std::vector<Level> find_levels() {
    std::vector<Level> levels{{"base", true, dfe::base::ingest_tiles}};
#if defined(DFE_X86_LEVELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    levels.push_back({"avx2", avx2, dfe::avx2::ingest_tiles});
    levels.push_back({"avx512", avx512, dfe::avx512::ingest_tiles});
#endif
    return levels;
}

const std::vector<Level>& levels() {
    static const std::vector<Level> found = find_levels();
    return found;
}

// The named level, or the best usable one for "".
const Level& level_named(const std::string& name) {
    const Level* best = nullptr;
    for (const Level& level : levels()) {
        if (level.usable && (name.empty() || name == level.name)) best = &level;
    }
    if (best == nullptr) throw std::invalid_argument("this processor does not run the level '" + name + "'");
    return *best;
}

std::map<std::string, bool> cpu_levels() {
    std::map<std::string, bool> result;
    for (const Level& level : levels()) result[level.name] = level.usable;
    return result;
}

void ingest(uintptr_t images, int pixel_type, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, uintptr_t x_0, uintptr_t x_t,
            int output_type, float gain, float offset, const std::vector<float>& a, const std::vector<float>& b, uint64_t seed,
            uint32_t draw, uint32_t step, int threads, bool stream, const std::string& level) {
    dfe::IngestArguments p{};
    p.images = reinterpret_cast<const void*>(images);
    p.pixel_type = static_cast<dfe::PixelType>(pixel_type);
    p.batch = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
    p.stride_n = strides[0], p.stride_y = strides[1], p.stride_x = strides[2], p.stride_c = strides[3];
    p.x_0 = reinterpret_cast<void*>(x_0);
    p.x_t = reinterpret_cast<void*>(x_t);
    p.output_type = static_cast<dfe::OutputType>(output_type);
    p.gain = gain, p.offset = offset;
    p.scales = static_cast<int>(a.size());
    if (p.scales < 1 || p.scales > 2 || b.size() != a.size()) throw std::invalid_argument("one or two scales, with a and b alike");
    for (int s = 0; s < p.scales; ++s) p.a[s] = a[s], p.b[s] = b[s];
    p.key[0] = static_cast<uint32_t>(seed), p.key[1] = static_cast<uint32_t>(seed >> 32);
    p.draw = draw, p.step = step;
    if (p.batch * p.height * p.width * p.channels == 0) return;
    const int64_t tiles = dfe::plan_tiles(p);
    const dfe::IngestTiles run = level_named(level).ingest;

    py::gil_scoped_release unlocked;
    dfe::parallel_for(tiles, threads, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<float> scratch;
        scratch.resize(static_cast<size_t>(p.scratch_floats));
        run(p, stream, begin, end, scratch.data());
    });
}

}  // namespace

int64_t dfe::plan_tiles(IngestArguments& p) {
    const bool flat = p.stride_y == p.width * p.stride_x;
    p.rows = flat ? 1 : p.height;
    p.row_length = flat ? p.height * p.width : p.width;
    p.tile_pixels = std::max<int64_t>(16, 1536 / p.channels / 16 * 16);
    p.tiles_per_row = (p.row_length + p.tile_pixels - 1) / p.tile_pixels;
    // Noise of two scales, three staged outputs, staged pixels; four rows of normals.
    p.scratch_floats = 6 * p.tile_pixels * p.channels + 4 * p.tile_pixels;
    return p.rows * p.tiles_per_row;
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "CPU kernels of dfengine";
    levels();  // found now: a fork during the first call would leave the child waiting for it
    module.attr("compiler") = DFE_COMPILER;
    module.def("cpu_levels", &cpu_levels, "Instruction-set levels compiled in, and whether this processor runs them; the last usable one is taken.");
    module.def("ingest", &ingest, py::arg("images"), py::arg("pixel_type"), py::arg("shape"), py::arg("strides"), py::arg("x_0"), py::arg("x_t"),
               py::arg("output_type"), py::arg("gain"), py::arg("offset"), py::arg("a"), py::arg("b"), py::arg("seed"), py::arg("draw"),
               py::arg("step"), py::arg("threads"), py::arg("stream") = false, py::arg("level") = "",
               "The op `ingest` over raw pointers; see kernels/ingest.py. Strides are in elements.");
}
