// The op `channel_attention` over raw pointers.
#include "../cpu/channel_attention.h"

#include "../common/channel_attention.h"
#include "common.h"

namespace dfe {
namespace {

constexpr int64_t POOL_CHANNELS = 64;  // that a thread pools at a time where a sample is divided

// Whole samples to the threads where there are enough of them, or where they are small, so that each stays in one thread's cache; else the
// channels and then the rows of one sample. The results are the same.
void run_passes(const ChannelAttentionArguments& p, const ChannelAttentionPasses& passes, int threads) {
    if (p.batch >= threads || p.height * p.width * p.channels <= SMALL_LOOP) {
        const Scratch scratch(p.scratch_floats, pieces_of(p.batch, threads));
        parallel_for(p.batch, threads, [&](int piece, int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                if (p.w1 != nullptr) passes.pool(p, n, 0, p.channels, scratch.of(piece));
                passes.gate(p, n, scratch.of(piece));
                passes.apply(p, n, 0, p.height, scratch.of(piece));
            }
        });
        return;
    }
    const int64_t blocks = (p.channels + POOL_CHANNELS - 1) / POOL_CHANNELS;
    const Scratch scratch(p.scratch_floats, std::max(pieces_of(blocks, threads), pieces_of(p.height, threads)));
    for (int64_t n = 0; n < p.batch; ++n) {
        if (p.w1 != nullptr) {
            parallel_for(blocks, threads, [&](int piece, int64_t begin, int64_t end) {
                passes.pool(p, n, begin * POOL_CHANNELS, std::min(end * POOL_CHANNELS, p.channels), scratch.of(piece));
            });
        }
        passes.gate(p, n, scratch.of(0));
        parallel_for(p.height, threads, [&](int piece, int64_t begin, int64_t end) { passes.apply(p, n, begin, end, scratch.of(piece)); });
    }
}

void channel_attention(std::array<int64_t, 4> shape, int type, uintptr_t x, uintptr_t residual, uintptr_t y, std::array<int64_t, 3> strides,
                       int64_t hidden, uintptr_t w1, uintptr_t w2, uintptr_t spatial_weight, uintptr_t spatial_bias, uintptr_t pooled,
                       uintptr_t gate, int threads, bool stream, const std::string& level) {
    ChannelAttentionArguments p{};
    p.batch = shape[0], p.height = shape[1], p.width = shape[2], p.channels = shape[3], p.hidden = hidden;
    p.type = static_cast<FloatType>(type);
    p.x = pointer<const void>(x), p.residual = pointer<const void>(residual), p.y = pointer<void>(y);
    p.x_stride = strides[0], p.residual_stride = strides[1], p.y_stride = strides[2];
    p.w1 = pointer<const float>(w1), p.w2 = pointer<const float>(w2);
    p.spatial_weight = pointer<const float>(spatial_weight), p.spatial_bias = pointer<const float>(spatial_bias);
    p.pooled = pointer<float>(pooled), p.gate = pointer<float>(gate);
    p.stream = stream;
    plan_channel_attention(p);
    const auto passes = DFE_AT_LEVEL(level_named(level), channel_attention)(p);
    const Unlocked unlocked;
    run_passes(p, passes, threads);
}

}  // namespace

void plan_channel_attention(ChannelAttentionArguments& p) {
    p.pitch = p.width + 2 * SPATIAL_REACH;
    p.step_rows = std::min(p.height, std::max<int64_t>(1, (1 << 16) / (p.width * p.channels)));
    // For y two planes of maps, the gate of the rows at hand, and a pixel; averages and hidden values for the channel gate.
    const int64_t maps = 2 * (p.height + 2 * SPATIAL_REACH) * p.pitch + p.step_rows * p.pitch;
    p.scratch_floats = p.channels + std::max(maps, 2 * p.hidden);
}

void bind_channel_attention(py::module_& module) {
    module.def("channel_attention", &channel_attention, py::arg("shape"), py::arg("type"), py::arg("x"), py::arg("residual"), py::arg("y"),
               py::arg("strides"), py::arg("hidden"), py::arg("w1"), py::arg("w2"), py::arg("spatial_weight"), py::arg("spatial_bias"),
               py::arg("pooled"), py::arg("gate"), py::arg("threads"), py::arg("stream") = false, py::arg("level") = "",
               "The op `channel_attention` over raw pointers; see kernels/channel_attention.py. strides: from one pixel to the next of x, "
               "residual and y; pooled, gate: room for (batch, 2, channels) and (batch, channels) floats; residual, w1 with w2, and "
               "spatial_weight with spatial_bias may be 0.");
}

}  // namespace dfe
