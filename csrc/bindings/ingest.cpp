// The op `ingest` over raw pointers.
#include "../cpu/ingest.h"

#include "common.h"

namespace dfe {
namespace {

void ingest(uintptr_t images, int pixel_type, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, uintptr_t x_0, uintptr_t x_t,
            int output_type, float gain, float offset, const std::vector<float>& a, const std::vector<float>& b, uint64_t seed,
            uint32_t draw, uint32_t step, uintptr_t noise, int threads, bool stream, const std::string& level) {
    IngestArguments p{};
    p.images = pointer<const void>(images);
    p.pixel_type = static_cast<PixelType>(pixel_type);
    p.batch = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3];
    p.stride_n = strides[0], p.stride_y = strides[1], p.stride_x = strides[2], p.stride_c = strides[3];
    p.x_0 = pointer<void>(x_0);
    p.x_t = pointer<void>(x_t);
    p.output_type = static_cast<FloatType>(output_type);
    p.gain = gain, p.offset = offset;
    p.scales = static_cast<int>(a.size());
    if (p.scales < 1 || p.scales > 2 || b.size() != a.size()) throw std::invalid_argument("one or two scales, with a and b alike");
    for (int s = 0; s < p.scales; ++s) p.a[s] = a[s], p.b[s] = b[s];
    p.key[0] = static_cast<uint32_t>(seed), p.key[1] = static_cast<uint32_t>(seed >> 32);
    p.draw = draw, p.step = step;
    p.noise = pointer<const float>(noise);
    if (p.batch * p.height * p.width * p.channels == 0) return;
    const int64_t tiles = plan_tiles(p);
    const IngestTiles run = DFE_AT_LEVEL(level_named(level), ingest_tiles);

    const Unlocked unlocked;
    const Scratch scratch(p.scratch_floats, pieces_of(tiles, threads));
    parallel_for(tiles, threads, [&](int piece, int64_t begin, int64_t end) { run(p, stream, begin, end, scratch.of(piece)); });
}

}  // namespace

int64_t plan_tiles(IngestArguments& p) {
    const bool flat = p.stride_y == p.width * p.stride_x;
    p.rows = flat ? 1 : p.height;
    p.row_length = flat ? p.height * p.width : p.width;
    p.tile_pixels = std::max<int64_t>(16, 1536 / p.channels / 16 * 16);
    p.tiles_per_row = (p.row_length + p.tile_pixels - 1) / p.tile_pixels;
    // Noise of two scales, three staged outputs, staged pixels; four rows of normals.
    p.scratch_floats = 6 * p.tile_pixels * p.channels + 4 * p.tile_pixels;
    return p.rows * p.tiles_per_row;
}

void bind_ingest(py::module_& module) {
    module.def("ingest", &ingest, py::arg("images"), py::arg("pixel_type"), py::arg("shape"), py::arg("strides"), py::arg("x_0"), py::arg("x_t"),
               py::arg("output_type"), py::arg("gain"), py::arg("offset"), py::arg("a"), py::arg("b"), py::arg("seed"), py::arg("draw"),
               py::arg("step"), py::arg("noise"), py::arg("threads"), py::arg("stream") = false, py::arg("level") = "",
               "The op `ingest` over raw pointers; see kernels/ingest.py. Strides are in elements; noise may be 0.");
}

}  // namespace dfe
