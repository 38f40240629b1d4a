// The Python module dfengine._native: CPU kernels over raw pointers. The launchers in kernels/ check shapes, strides and types; nothing is
// copied and the interpreter lock is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/group_norm.h"
#include "cpu/ingest.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

struct Level {
    const char* name;
    bool usable;
    dfe::IngestTiles ingest;
    dfe::GroupNormPasses (*group_norm_forward)(const dfe::GroupNormArguments&);
    dfe::GroupNormPasses (*group_norm_backward)(const dfe::GroupNormArguments&);
};

std::vector<Level> find_levels() {
    std::vector<Level> levels{{"base", true, dfe::base::ingest_tiles, dfe::base::group_norm_forward, dfe::base::group_norm_backward}};
#if defined(DFE_X86_LEVELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    levels.push_back({"avx2", avx2, dfe::avx2::ingest_tiles, dfe::avx2::group_norm_forward, dfe::avx2::group_norm_backward});
    levels.push_back({"avx512", avx512, dfe::avx512::ingest_tiles, dfe::avx512::group_norm_forward, dfe::avx512::group_norm_backward});
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

// Floats for each piece of a parallel_for, far enough apart to share no cache line. The memory stays with the calling thread for its next
// call; it is valid until then.
class Scratch {
public:
    Scratch(int64_t floats, int pieces) : stride_((floats + 31) / 16 * 16) {
        static thread_local std::vector<float> held;
        held.resize(std::max(held.size(), static_cast<size_t>(stride_ * pieces)));
        start_ = held.data();
    }
    float* of(int piece) const { return start_ + piece * stride_; }

private:
    int64_t stride_;
    float* start_;
};

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
    p.output_type = static_cast<dfe::FloatType>(output_type);
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
    const Scratch scratch(p.scratch_floats, dfe::pieces_of(tiles, threads));
    dfe::parallel_for(tiles, threads, [&](int piece, int64_t begin, int64_t end) { run(p, stream, begin, end, scratch.of(piece)); });
}

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

dfe::GroupNormArguments group_norm_arguments(std::array<int64_t, 4> shape, int type, int activation, float eps, uintptr_t x, uintptr_t weight,
                                             uintptr_t bias, uintptr_t shift, uintptr_t mean, uintptr_t rstd) {
    dfe::GroupNormArguments p{};
    p.batch = shape[0], p.pixels = shape[1], p.channels = shape[2], p.groups = shape[3];
    p.type = static_cast<dfe::FloatType>(type);
    p.activation = static_cast<dfe::Activation>(activation);
    p.eps = eps;
    p.x = pointer<const void>(x);
    p.weight = pointer<const float>(weight), p.bias = pointer<const float>(bias), p.shift = pointer<const float>(shift);
    p.mean = pointer<float>(mean), p.rstd = pointer<float>(rstd);
    return p;
}

// Whole samples to the threads where there are enough of them, so that each stays in one thread's cache; else the tiles of one sample.
// The results are the same.
void run_passes(const dfe::GroupNormArguments& p, const dfe::GroupNormPasses& passes, int threads) {
    if (p.batch >= threads) {
        const Scratch scratch(p.shared_floats + p.scratch_floats, dfe::pieces_of(p.batch, threads));
        dfe::parallel_for(p.batch, threads, [&](int piece, int64_t begin, int64_t end) {
            float* const shared = scratch.of(piece);
            for (int64_t n = begin; n < end; ++n) {
                passes.sums(p, n, 0, p.tiles, shared, shared + p.shared_floats);
                passes.join(p, n, shared);
                passes.apply(p, n, 0, p.tiles, shared, shared + p.shared_floats);
            }
        });
        return;
    }
    std::vector<float> shared(static_cast<size_t>(p.shared_floats));
    const Scratch scratch(p.scratch_floats, dfe::pieces_of(p.tiles, threads));
    for (int64_t n = 0; n < p.batch; ++n) {
        dfe::parallel_for(p.tiles, threads, [&](int piece, int64_t begin, int64_t end) {
            passes.sums(p, n, begin, end, shared.data(), scratch.of(piece));
        });
        passes.join(p, n, shared.data());
        dfe::parallel_for(p.tiles, threads, [&](int piece, int64_t begin, int64_t end) {
            passes.apply(p, n, begin, end, shared.data(), scratch.of(piece));
        });
    }
}

void group_norm(std::array<int64_t, 4> shape, int type, int activation, float eps, uintptr_t x, uintptr_t weight, uintptr_t bias,
                uintptr_t shift, uintptr_t mean, uintptr_t rstd, uintptr_t y, int threads, const std::string& level) {
    dfe::GroupNormArguments p = group_norm_arguments(shape, type, activation, eps, x, weight, bias, shift, mean, rstd);
    p.y = pointer<void>(y);
    dfe::plan_group_norm(p);
    const auto passes = level_named(level).group_norm_forward(p);
    py::gil_scoped_release unlocked;
    run_passes(p, passes, threads);
}

void group_norm_backward(std::array<int64_t, 4> shape, int type, int activation, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t shift,
                         uintptr_t mean, uintptr_t rstd, uintptr_t dy, uintptr_t dx, uintptr_t dweight, uintptr_t dbias, uintptr_t dshift,
                         int threads, const std::string& level) {
    dfe::GroupNormArguments p = group_norm_arguments(shape, type, activation, 0.0f, x, weight, bias, shift, mean, rstd);
    p.dy = pointer<const void>(dy);
    p.dx = pointer<void>(dx);
    p.dshift = pointer<float>(dshift);
    dfe::plan_group_norm(p);
    const auto passes = level_named(level).group_norm_backward(p);
    py::gil_scoped_release unlocked;
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

void dfe::plan_group_norm(GroupNormArguments& p) {
    p.row_pixels = 128 / std::gcd<int64_t>(p.channels, 128);
    p.lanes = p.row_pixels * p.channels;
    p.tile_pixels = std::max<int64_t>(4, 8192 / p.lanes) * p.row_pixels;
    p.tiles = (p.pixels + p.tile_pixels - 1) / p.tile_pixels;
    p.keep = p.dy != nullptr && p.activation != Activation::none && p.pixels * p.channels <= 1 << 18;
    p.shared_floats = (6 + 3 * p.tiles) * p.channels + 3 * p.lanes + (p.keep ? p.pixels * p.channels : 0);
    p.scratch_floats = 8 * p.lanes;
}

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
    module.def("group_norm", &group_norm, py::arg("shape"), py::arg("type"), py::arg("activation"), py::arg("eps"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("shift"), py::arg("mean"), py::arg("rstd"), py::arg("y"), py::arg("threads"),
               py::arg("level") = "",
               "The op `group_norm` over raw pointers; see kernels/group_norm.py. shape: (batch, pixels, channels, groups); shift may be 0.");
    module.def("group_norm_backward", &group_norm_backward, py::arg("shape"), py::arg("type"), py::arg("activation"), py::arg("x"),
               py::arg("weight"), py::arg("bias"), py::arg("shift"), py::arg("mean"), py::arg("rstd"), py::arg("dy"), py::arg("dx"),
               py::arg("dweight"), py::arg("dbias"), py::arg("dshift"), py::arg("threads"), py::arg("level") = "",
               "Its gradient over raw pointers; shift and dshift may be 0.");
}
