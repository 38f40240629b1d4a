// The op `attention` over raw pointers.
#include "../cpu/attention.h"

#include "call.h"
#include "common.h"
#include "product.h"

namespace dfe {
namespace {

AttentionItems items_of(Product product, Level level, FloatType type) {
#if defined(DFE_NARROW_PRODUCTS)
    if (product != Product::float32) return attention_items_bfloat16(product);
#endif
    return DFE_AT_LEVEL(level, attention_items)(type);
}

// One call with all of its arguments, to be run any number of times. shape: (batch, pixels, heads, channels of a head); pitches: of qkv, y.
class Attention : public Call {
public:
    Attention(std::array<int64_t, 4> shape, std::array<int64_t, 2> pitches, int type, int product, uintptr_t qkv, uintptr_t y,
              const std::string& level) {
        AttentionArguments& p = arguments_;
        p.batch = shape[0], p.pixels = shape[1], p.heads = shape[2], p.depth = shape[3];
        p.pitch_qkv = pitches[0], p.pitch_y = pitches[1];
        p.type = static_cast<FloatType>(type), p.product = static_cast<Product>(product);
        p.qkv = pointer<const void>(qkv), p.y = pointer<void>(y);
        if (!product_supported(p.product)) throw std::invalid_argument("this processor does not have the instructions of this product");
        if (p.product != Product::float32 && p.type != FloatType::bfloat16) throw std::invalid_argument("this product takes bfloat16");
        count_ = plan_attention(p);
        items_ = items_of(p.product, level_named(level), p.type);
    }

    void run(int threads) const override {
        const Scratch scratch(arguments_.scratch_floats, pieces_of(count_, threads));
        parallel_for(count_, threads, [&](int piece, int64_t begin, int64_t end) { items_(arguments_, begin, end, scratch.of(piece)); });
    }

private:
    AttentionArguments arguments_{};
    int64_t count_;
    AttentionItems items_;
};

}  // namespace

void bind_attention(py::module_& module) {
    py::class_<Attention, Call, std::shared_ptr<Attention>>(module, "Attention", "A call of the op `attention` over raw pointers; see kernels/attention_cpu.py.")
        .def(py::init<std::array<int64_t, 4>, std::array<int64_t, 2>, int, int, uintptr_t, uintptr_t, const std::string&>(), py::arg("shape"),
             py::arg("pitches"), py::arg("type"), py::arg("product"), py::arg("qkv"), py::arg("y"), py::arg("level") = "");
}

}  // namespace dfe
