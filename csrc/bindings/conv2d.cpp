// The op `conv2d` over raw pointers.
#include "../cpu/conv2d.h"

#include <numeric>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "call.h"
#include "common.h"
#include "product.h"

namespace dfe {
namespace {

// Of the second-level cache, with what is usual where the system does not tell.
int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (found > 0) return found;
#endif
    return 1 << 20;
}

Multiplier multiplier_of(Product product, Level level, int64_t outputs) {
#if defined(DFE_NARROW_PRODUCTS)
    if (product == Product::pairs) return pairs_multiplier(outputs);
    if (product == Product::tiles) return tiles_multiplier(outputs);
    if (product == Product::fours) return fours_multiplier(outputs);
    if (product == Product::byte_tiles) return byte_tiles_multiplier(outputs);
#endif
    return DFE_AT_LEVEL(level, float_multiplier)(outputs);
}

Conv2dPasses passes_of(const Conv2dArguments& p, Level level) {
    if (p.product != Product::float32) level = std::max(level, Level::avx512);  // which the processor has, and lower ones know no bytes
    return DFE_AT_LEVEL(level, conv2d_passes)(p);
}

// One call with all of its arguments, to be run any number of times. shape: (batch, height, width, outputs) of y, channels of x and of x2;
// pitches: of x, x2, residual, y; codes: type, resample, residual_resample, prologue, activation, product; tensors: x, x2, residual, y, scale,
// offset, bias, moments, weights, factors, 0 for those that are absent; steps: (steps_per_unit, zero) where the product is of bytes.
class Conv2d : public Call {
public:
    Conv2d(std::array<int64_t, 6> shape, std::array<int64_t, 4> pitches, std::array<int, 6> codes, int64_t kernel, int64_t dilation,
           std::array<uintptr_t, 10> tensors, std::array<float, 2> steps, int64_t bias_pitch, int64_t tile_pixels, int64_t padded, int64_t block_outputs,
           const std::string& level)
        : level_(level_named(level)) {
        Conv2dArguments& p = arguments_;
        p.batch = shape[0], p.height = shape[1], p.width = shape[2], p.outputs = shape[3], p.channels_1 = shape[4], p.channels_2 = shape[5];
        p.pitch_x = pitches[0], p.pitch_x2 = pitches[1], p.pitch_residual = pitches[2], p.pitch_y = pitches[3];
        p.type = static_cast<FloatType>(codes[0]);
        p.resample = static_cast<Resample>(codes[1]), p.residual_resample = static_cast<Resample>(codes[2]);
        p.prologue = static_cast<Activation>(codes[3]), p.activation = static_cast<Activation>(codes[4]);
        p.product = static_cast<Product>(codes[5]);
        p.kernel = kernel, p.dilation = dilation;
        p.x = pointer<const void>(tensors[0]), p.x2 = pointer<const void>(tensors[1]), p.residual = pointer<const void>(tensors[2]);
        p.y = pointer<void>(tensors[3]);
        p.scale = pointer<const float>(tensors[4]), p.offset = pointer<const float>(tensors[5]), p.bias = pointer<const float>(tensors[6]);
        p.moments = pointer<float>(tensors[7]), p.weights = pointer<const void>(tensors[8]);
        p.factors = pointer<const float>(tensors[9]), p.steps_per_unit = steps[0], p.zero = steps[1];
        p.bias_pitch = bias_pitch, p.tile_pixels = tile_pixels, p.padded = padded;
        if (!product_supported(p.product)) throw std::invalid_argument("this processor does not have the instructions of this product");
        if (p.product != Product::float32 && p.type != FloatType::bfloat16) throw std::invalid_argument("this product takes bfloat16");
        p.multiplier = multiplier_of(p.product, level_, block_outputs);
        passes_ = passes_of(p, level_);
    }

    void run(int threads) const override {
        Conv2dArguments p = arguments_;
        const int64_t items = plan_conv2d(p, threads);
        const Scratch scratch(p.scratch_floats, pieces_of(items, threads));
        parallel_for(items, threads, [&](int piece, int64_t begin, int64_t end) { passes_.items(p, begin, end, scratch.of(piece)); });
        if (p.moments != nullptr && !p.fused_moments) {
            const int64_t tiles = p.batch * ((p.height * p.width + p.tile_pixels - 1) / p.tile_pixels);
            parallel_for(tiles, threads, [&](int, int64_t begin, int64_t end) { passes_.moments(p, begin, end); });
        }
    }

private:
    Level level_;
    Conv2dArguments arguments_{};
    Conv2dPasses passes_;
};

// The values of a run that a tile's row of 64 bytes takes: a divisor of `length`, in whole words, the largest.
int64_t step_of(int64_t length, int64_t size) {
    int64_t step = 64 / size;
    while (length % step != 0) step -= 4 / size;
    return step;
}

}  // namespace

int64_t plan_conv2d(Conv2dArguments& p, int threads) {
    const int64_t size = p.product == Product::float32 ? 4 : of_bytes(p.product) ? 1 : 2, pixels = p.multiplier.most * p.multiplier.pixels;
    p.dilation = std::min(p.dilation, std::max(p.height, p.width));  // from there on the outer taps see zeros only
    p.margin = p.dilation * (p.kernel - 1) / 2;
    p.row = p.width + p.margin;
    p.runs = 0;
    const bool together = p.kernel == 1 || p.dilation == 1;  // whether the taps of a row are neighbours in memory
    p.length = together ? p.kernel * p.padded : p.padded;
    for (int64_t i = 0; i < p.kernel; ++i) {
        for (int64_t j = 0; j < (together ? 1 : p.kernel); ++j) p.starts[p.runs++] = (i * p.row + j) * p.dilation * p.padded;
    }
    p.step = p.multiplier.begin != nullptr ? step_of(p.length, size) : 0;

    p.blocks = (p.outputs + p.multiplier.outputs - 1) / p.multiplier.outputs;
    const int64_t cache = cache_bytes(), weight_bytes = p.blocks * p.runs * p.length * p.multiplier.outputs * size;
    p.inner_blocks = weight_bytes <= cache / 2;
    // Bands that fit the second-level cache; where the weights stay in it too, enough bands for several threads.
    const int64_t row_bytes = p.row * p.padded * size;
    int64_t rows = (p.inner_blocks ? cache / 4 : 5 * cache / 8) / row_bytes - 2 * p.margin;
    if (p.inner_blocks) rows = std::min(rows, std::max((p.height + 7) / 8, (255 + p.width) / p.width));
    rows = std::min(std::max<int64_t>(rows, 1), p.height);
    if (p.moments != nullptr && rows < p.height) {
        const int64_t whole = p.tile_pixels / std::gcd(p.tile_pixels, p.width);  // rows that hold whole tiles
        if (whole <= 2 * rows) rows = std::min(std::max(rows / whole, int64_t{1}) * whole, p.height);
    }
    p.band_rows = rows;
    p.bands = (p.height + rows - 1) / rows;
    p.fused_moments = p.moments != nullptr && (p.bands == 1 || rows * p.width % p.tile_pixels == 0);

    const FloatType type = p.product == Product::float32 ? FloatType::float32 : FloatType::bfloat16;  // that is multiplied
    p.direct = p.kernel == 1 && !of_bytes(p.product) && p.channels_2 == 0 && p.scale == nullptr && p.prologue == Activation::none && p.resample == Resample::none &&
               p.type == type && p.padded == p.channels_1 && p.pitch_x % 2 == 0;

    const int64_t items = p.batch * p.bands;
    p.splits = items < threads ? std::min<int64_t>(p.blocks, (threads + items - 1) / items) : 1;
    p.split_blocks = (p.blocks + p.splits - 1) / p.splits;
    p.splits = (p.blocks + p.split_blocks - 1) / p.split_blocks;
    const int64_t band_pixels = (rows + 2 * p.margin) * p.row + 3 * p.margin + pixels;  // the last block reads past the last row
    p.scratch_floats = 16 + 2 * pixels * p.multiplier.outputs + (band_pixels * p.padded * size + 3) / 4;
    return items * p.splits;
}

void bind_conv2d(py::module_& module) {
    // Found now: a fork during the first call would leave the child waiting.
    cache_bytes();
    best_product(FloatType::bfloat16);
    product_supported(Product::byte_tiles);
    module.def("product", [](int type) { return static_cast<int>(best_product(static_cast<FloatType>(type))); }, py::arg("type"),
               "The product (csrc/cpu/product.h) taken here for a type.");
    module.def("product_supported", [](int product) { return product_supported(static_cast<Product>(product)); }, py::arg("product"),
               "Whether this processor has the instructions of a product.");
    py::class_<Conv2d, Call, std::shared_ptr<Conv2d>>(module, "Conv2d", "A call of the op `conv2d` over raw pointers; see kernels/conv2d_cpu.py.")
        .def(py::init<std::array<int64_t, 6>, std::array<int64_t, 4>, std::array<int, 6>, int64_t, int64_t, std::array<uintptr_t, 10>, std::array<float, 2>, int64_t, int64_t,
                      int64_t, int64_t, const std::string&>(),
             py::arg("shape"), py::arg("pitches"), py::arg("codes"), py::arg("kernel"), py::arg("dilation"), py::arg("tensors"), py::arg("steps"), py::arg("bias_pitch"),
             py::arg("tile_pixels"), py::arg("padded"), py::arg("block_outputs"), py::arg("level") = "");
}

}  // namespace dfe
