// The op `channel_attention` on CUDA (formula: kernels/channel_attention.py). Small images are one launch, a block for each (`sample`); larger ones
// four: sums and maxima of tiles of pixels (`pool`), the channel gate (`gate`), the mean and maximum over the channels at each pixel (`maps`) and y
// (`apply`). A thread moves 16 bytes at a time where every tensor is aligned so (Count values, else 1). Every sum has one order, hence one result.
#include "../common/channel_attention.h"
#include "kernel.h"
#include "vectors.h"

namespace dfe {

template <int Count, typename T>
__device__ __forceinline__ void load_values(const T* from, float* to) {
    if constexpr (Count == 1) to[0] = load(from);
    else load_run<Count>(from, to);
}

template <int Count, typename T>
__device__ __forceinline__ void store_values(T* to, const float* from) {
    if constexpr (Count == 1) store(to, from[0]);
    else store_run<Count>(to, from);
}

// The same in all lanes.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ __forceinline__ float warp_largest(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = larger(__shfl_xor_sync(0xffffffffu, value, distance), value);
    return value;
}

// Sums and maxima over pixels [first, after) of the channels from `channel` on, as many as the block has columns of Count; the threads of a column
// take pixels in turn. room: 2 * Count floats a thread.
template <int Count, typename T>
__device__ __forceinline__ void pool(const T* x, int64_t stride, int first, int after, int channel, int channels, int columns, float* room,
                                     float* sums, float* tops) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
    const int rows = threads / columns, column = thread % columns, row = thread / columns, mine = channel + column * Count;
    float sum[Count], top[Count];
#pragma unroll
    for (int k = 0; k < Count; ++k) sum[k] = 0.0f, top[k] = lowest();
    if (mine < channels) {
#pragma unroll 4
        for (int pixel = first + row; pixel < after; pixel += rows) {
            float values[Count];
            load_values<Count>(x + pixel * stride + mine, values);
#pragma unroll
            for (int k = 0; k < Count; ++k) sum[k] += values[k], top[k] = larger(values[k], top[k]);
        }
    }
#pragma unroll
    for (int k = 0; k < Count; ++k) {
        room[(k * rows + row) * columns + column] = sum[k];
        room[((Count + k) * rows + row) * columns + column] = top[k];
    }
    __syncthreads();
    for (int i = thread; i < columns * Count && channel + i < channels; i += threads) {
        const float* const from = room + i % Count * rows * columns + i / Count;
        float total = from[0], largest = from[Count * rows * columns];
        for (int r = 1; r < rows; ++r) {
            total += from[r * columns];
            largest = larger(from[(Count * rows + r) * columns], largest);
        }
        sums[channel + i] = total;
        tops[channel + i] = largest;
    }
    __syncthreads();
}

// The channel gate from averages and maxima; hidden: room for as many floats. Ends before all threads see it.
__device__ __forceinline__ void make_gate(const float* average, const float* top, const float* w1, const float* w2, int channels, int hidden_channels,
                                          float* hidden, float* gate) {
    const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    for (int r = thread / 32; r < hidden_channels; r += threads / 32) {
        float of_average = 0.0f, of_top = 0.0f;
        for (int c = lane; c < channels; c += 32) {
            const float w = w1[r * channels + c];
            of_average += w * average[c];
            of_top += w * top[c];
        }
        of_average = warp_sum(of_average);
        of_top = warp_sum(of_top);
        if (lane == 0) hidden[r] = activated<Activation::gelu>(of_average) + activated<Activation::gelu>(of_top);
    }
    __syncthreads();
    for (int c = thread; c < channels; c += threads) {
        float z = 0.0f;
        for (int r = 0; r < hidden_channels; ++r) z += hidden[r] * w2[r * channels + c];
        gate[c] = sigmoid(z);
    }
}

// By a warp: mean and maximum over the channels of x * gate at a pixel. gate may be null.
template <int Count, typename T>
__device__ __forceinline__ void make_map(const T* x, const float* gate, int channels, float* map) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float sum = 0.0f, top = lowest();
    for (int c = lane * Count; c < channels; c += 32 * Count) {
        float values[Count];
        load_values<Count>(x + c, values);
#pragma unroll
        for (int k = 0; k < Count; ++k) {
            const float u = gate == nullptr ? values[k] : values[k] * gate[c + k];
            sum += u;
            top = larger(u, top);
        }
    }
    sum = warp_sum(sum);
    top = warp_largest(top);
    if (lane == 0) map[0] = sum / static_cast<float>(channels), map[1] = top;
}

// By a warp: the spatial gate at a pixel, the same in all lanes.
__device__ __forceinline__ float spatial_gate(const float* maps, const float* weight, float bias, int pixel, int height, int width) {
    float z = 0.0f;
    for (int tap = static_cast<int>(threadIdx.x) % 32; tap < SPATIAL_SIZE * SPATIAL_SIZE; tap += 32) {
        const int row = pixel / width + tap / SPATIAL_SIZE - SPATIAL_REACH, column = pixel % width + tap % SPATIAL_SIZE - SPATIAL_REACH;
        if (row < 0 || row >= height || column < 0 || column >= width) continue;
        const float* const map = maps + 2 * (row * width + column);
        z += weight[2 * tap] * map[0] + weight[2 * tap + 1] * map[1];
    }
    return sigmoid(warp_sum(z) + bias);
}

// By a warp: y at a pixel. gate and residual may be null.
template <int Count, typename T>
__device__ __forceinline__ void write_pixel(const T* x, const float* gate, float s, const T* residual, int channels, T* y) {
    for (int c = static_cast<int>(threadIdx.x) % 32 * Count; c < channels; c += 32 * Count) {
        float values[Count], rest[Count];
        load_values<Count>(x + c, values);
        if (residual != nullptr) load_values<Count>(residual + c, rest);
#pragma unroll
        for (int k = 0; k < Count; ++k) {
            const float u = gate == nullptr ? values[k] : values[k] * gate[c + k];
            values[k] = residual == nullptr ? u * s : u * s + rest[k];
        }
        store_values<Count>(y + c, values);
    }
}

// The whole of a sample by one block. shared: what `pool` needs; averages or maps, maxima, gate, hidden.
template <int Count, typename T>
__device__ __forceinline__ void attend_sample(const T* x, const float* w1, const float* w2, const float* spatial_weight, const float* spatial_bias,
                                              const T* residual, T* y, int height, int width, int channels, int hidden_channels, int64_t x_stride,
                                              int64_t residual_stride, int64_t y_stride, int columns, float* shared) {
    const int pixels = height * width, warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
    float *const average = shared + 2 * Count * blockDim.x, *const top = average + channels, *const hidden = top + channels;
    float *const maps = hidden + hidden_channels, *gate = nullptr;
    if (w1 != nullptr) {
        for (int c = 0; c < channels; c += columns * Count) pool<Count>(x, x_stride, 0, pixels, c, channels, columns, shared, average, top);
        const float share = 1.0f / static_cast<float>(pixels);
        for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) average[c] *= share;
        __syncthreads();
        gate = maps + 2 * pixels;
        make_gate(average, top, w1, w2, channels, hidden_channels, hidden, gate);
        __syncthreads();
    }
    if (spatial_weight != nullptr) {
        for (int pixel = warp; pixel < pixels; pixel += warps) make_map<Count>(x + pixel * x_stride, gate, channels, maps + 2 * pixel);
        __syncthreads();
    }
    for (int pixel = warp; pixel < pixels; pixel += warps) {
        const float s = spatial_weight == nullptr ? 1.0f : spatial_gate(maps, spatial_weight, spatial_bias[0], pixel, height, width);
        write_pixel<Count>(x + pixel * x_stride, gate, s, residual == nullptr ? residual : residual + pixel * residual_stride, channels,
                           y + pixel * y_stride);
    }
}

}  // namespace dfe

// Grid: batch. Partials are (batch, tiles, 2, channels). Dynamic shared: 2 * channels + hidden floats.
extern "C" __global__ void channel_attention_gate(const float* partials, const float* w1, const float* w2, float* gate, int pixels, int tiles,
                                                  int channels, int hidden_channels) {
    DFE_DYNAMIC_SHARED(float, average);
    float *const top = average + channels, *const hidden = top + channels;
    const int64_t n = blockIdx.x;
    const float share = 1.0f / static_cast<float>(pixels);
    for (int c = static_cast<int>(threadIdx.x); c < channels; c += static_cast<int>(blockDim.x)) {
        const float* const from = partials + n * tiles * 2 * channels + c;
        float total = from[0], largest = from[channels];
        for (int tile = 1; tile < tiles; ++tile) {
            total += from[tile * 2 * channels];
            largest = dfe::larger(from[(tile * 2 + 1) * channels], largest);
        }
        average[c] = total * share;
        top[c] = largest;
    }
    __syncthreads();
    dfe::make_gate(average, top, w1, w2, channels, hidden_channels, hidden, gate + n * channels);
}
DFE_KERNEL(channel_attention_gate)

// `count`: the values of 16 bytes, or 1. Grids: `pool` (tiles, channels / (columns * count), batch), `sample` (batch), `maps` and `apply`
// (pixels / warps of a block, batch), each rounded up. Dynamic shared: `pool` 2 * count floats a thread, `sample` so many and
// 3 * channels + hidden + 2 * pixels.
#define DFE_CHANNEL_ATTENTION(NAME, T)                                                                                                        \
    extern "C" __global__ void channel_attention_pool_##NAME(const T* x, float* partials, int pixels, int tile_pixels, int channels,          \
                                                             int64_t stride, int columns, int count) {                                        \
        DFE_DYNAMIC_SHARED(float, room);                                                                                                      \
        const int64_t n = blockIdx.z;                                                                                                         \
        const int first = static_cast<int>(blockIdx.x) * tile_pixels, after = first + tile_pixels < pixels ? first + tile_pixels : pixels;    \
        const int channel = static_cast<int>(blockIdx.y) * columns * count;                                                                   \
        const T* const from = x + n * pixels * stride;                                                                                        \
        float* const sums = partials + (n * gridDim.x + blockIdx.x) * 2 * channels;                                                           \
        if (count == 1) dfe::pool<1>(from, stride, first, after, channel, channels, columns, room, sums, sums + channels);                    \
        else dfe::pool<16 / sizeof(T)>(from, stride, first, after, channel, channels, columns, room, sums, sums + channels);                  \
    }                                                                                                                                         \
    DFE_KERNEL(channel_attention_pool_##NAME)                                                                                                 \
    extern "C" __global__ void channel_attention_maps_##NAME(const T* x, const float* gate, float* maps, int pixels, int channels,            \
                                                             int64_t stride, int count) {                                                     \
        const int64_t n = blockIdx.y;                                                                                                         \
        const int pixel = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);                                                \
        if (pixel >= pixels) return;                                                                                                          \
        const T* const from = x + (n * pixels + pixel) * stride;                                                                              \
        const float* const mine = gate == nullptr ? gate : gate + n * channels;                                                               \
        float* const map = maps + (n * pixels + pixel) * 2;                                                                                   \
        if (count == 1) dfe::make_map<1>(from, mine, channels, map);                                                                          \
        else dfe::make_map<16 / sizeof(T)>(from, mine, channels, map);                                                                        \
    }                                                                                                                                         \
    DFE_KERNEL(channel_attention_maps_##NAME)                                                                                                 \
    extern "C" __global__ void channel_attention_apply_##NAME(                                                                                \
        const T* x, const float* gate, const float* maps, const float* spatial_weight, const float* spatial_bias, const T* residual, T* y,    \
        int height, int width, int channels, int64_t x_stride, int64_t residual_stride, int64_t y_stride, int count) {                        \
        const int64_t n = blockIdx.y, pixels = height * width;                                                                                \
        const int pixel = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);                                                \
        if (pixel >= pixels) return;                                                                                                          \
        const int64_t at = n * pixels + pixel;                                                                                                \
        const float* const mine = gate == nullptr ? gate : gate + n * channels;                                                               \
        const T* const added = residual == nullptr ? residual : residual + at * residual_stride;                                              \
        const float s = spatial_weight == nullptr                                                                                             \
                            ? 1.0f                                                                                                            \
                            : dfe::spatial_gate(maps + n * pixels * 2, spatial_weight, spatial_bias[0], pixel, height, width);                \
        if (count == 1) dfe::write_pixel<1>(x + at * x_stride, mine, s, added, channels, y + at * y_stride);                                  \
        else dfe::write_pixel<16 / sizeof(T)>(x + at * x_stride, mine, s, added, channels, y + at * y_stride);                                \
    }                                                                                                                                         \
    DFE_KERNEL(channel_attention_apply_##NAME)                                                                                                \
    extern "C" __global__ void channel_attention_sample_##NAME(                                                                               \
        const T* x, const float* w1, const float* w2, const float* spatial_weight, const float* spatial_bias, const T* residual, T* y,        \
        int height, int width, int channels, int hidden, int64_t x_stride, int64_t residual_stride, int64_t y_stride, int columns,            \
        int count) {                                                                                                                          \
        DFE_DYNAMIC_SHARED(float, shared);                                                                                                    \
        const int64_t first = static_cast<int64_t>(blockIdx.x) * height * width;                                                              \
        const T* const added = residual == nullptr ? residual : residual + first * residual_stride;                                           \
        if (count == 1)                                                                                                                       \
            dfe::attend_sample<1>(x + first * x_stride, w1, w2, spatial_weight, spatial_bias, added, y + first * y_stride, height, width,     \
                                  channels, hidden, x_stride, residual_stride, y_stride, columns, shared);                                    \
        else                                                                                                                                  \
            dfe::attend_sample<16 / sizeof(T)>(x + first * x_stride, w1, w2, spatial_weight, spatial_bias, added, y + first * y_stride,       \
                                               height, width, channels, hidden, x_stride, residual_stride, y_stride, columns, shared);        \
    }                                                                                                                                         \
    DFE_KERNEL(channel_attention_sample_##NAME)

DFE_CHANNEL_ATTENTION(float32, float)
DFE_CHANNEL_ATTENTION(float16, dfe::half)
DFE_CHANNEL_ATTENTION(bfloat16, dfe::bfloat16)
