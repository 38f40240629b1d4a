// The stages of `group_norm` at inference on CUDA (formulas: kernels/group_norm_{moments,merge,apply}.py). A thread takes V channels, 16 bytes
// where layouts allow it and else one: threadIdx.x runs along the vectors of a pixel, threadIdx.y along pixels or tiles.
#include "kernel.h"

namespace dfe {

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T values[V];
};

template <typename T, int V>
DFE_HD void load_pack(const T* from, float* values) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] = load(pack.values + v);
}

template <typename T, int V>
DFE_HD void store_pack(T* to, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

struct Moments {
    float count, mean, m2;
};

// The moments of the values of both (Chan, Golub and LeVeque 1979); either may be empty.
DFE_HD Moments merged(const Moments& a, const Moments& b) {
    const float count = a.count + b.count, share = count > 0.0f ? b.count / count : 0.0f, d = b.mean - a.mean;
    return {count, a.mean + d * share, a.m2 + b.m2 + d * d * (a.count * share)};
}

// Block (tile, channels, sample). Each thread reads every blockDim.y-th pixel of the tile once (Welford); the rows are merged in their order.
template <typename T, int V>
__device__ __forceinline__ void moments_block(const T* x, float* moments, int64_t pixels, int64_t channels, int64_t pixel_stride,
                                              int64_t tile_pixels, int64_t tiles, float* shared) {
    const int64_t n = blockIdx.z, tile = blockIdx.x, first = tile * tile_pixels;
    const int64_t last = first + tile_pixels < pixels ? first + tile_pixels : pixels;
    const int width = static_cast<int>(blockDim.x) * V, rows = static_cast<int>(blockDim.y);
    const int column = static_cast<int>(threadIdx.x) * V, row = static_cast<int>(threadIdx.y);
    const int64_t start = static_cast<int64_t>(blockIdx.y) * width;
    float mean[V], m2[V], u[V];
#pragma unroll
    for (int v = 0; v < V; ++v) mean[v] = m2[v] = 0.0f;
    if (start + column < channels) {
        const T* const source = x + n * pixels * pixel_stride + start + column;
        float count = 0.0f;
        for (int64_t pixel = first + row; pixel < last; pixel += rows) {
            load_pack<T, V>(source + pixel * pixel_stride, u);
            count += 1.0f;
            const float share = 1.0f / count;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const float d = u[v] - mean[v];
                mean[v] += d * share;
                m2[v] += d * (u[v] - mean[v]);
            }
        }
    }
    float* const means = shared;
    float* const squares = shared + rows * width;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        means[row * width + column + v] = mean[v];
        squares[row * width + column + v] = m2[v];
    }
    __syncthreads();
    for (int c = row * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x); c < width; c += rows * static_cast<int>(blockDim.x)) {
        if (start + c >= channels) break;
        Moments all = {0.0f, 0.0f, 0.0f};
        for (int r = 0; r < rows && first + r < last; ++r) {
            const float count = static_cast<float>((last - first - r + rows - 1) / rows);
            all = merged(all, {count, means[r * width + c], squares[r * width + c]});
        }
        float* const to = moments + (n * tiles + tile) * 2 * channels + start + c;
        to[0] = all.mean;
        to[channels] = all.m2;
    }
}

// The channels of one source that belong to a group, merged over the tiles: to each channel its threads of one column, each with every
// blockDim.y-th tile; then the column in a tree. `kept` takes (mean, M2) of every channel of the group; returns the number of pixels.
__device__ __forceinline__ float merge_source(const float* moments, const int* counts, int64_t tiles, int64_t channels, int64_t n, int64_t from,
                                              int size, float* column, float* kept) {
    const int threads = static_cast<int>(blockDim.x * blockDim.y), rows = static_cast<int>(blockDim.y), row = static_cast<int>(threadIdx.y);
    const int mine = row * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    float pixels = 0.0f;
    for (int base = 0; base < size; base += static_cast<int>(blockDim.x)) {
        const int lane = base + static_cast<int>(threadIdx.x);
        const int64_t channel = from + lane;
        const bool live = lane < size && channel >= 0 && channel < channels;
        Moments all = {0.0f, 0.0f, 0.0f};
        if (live) {
#pragma unroll 4
            for (int64_t tile = row; tile < tiles; tile += rows) {
                const float* const at = moments + (n * tiles + tile) * 2 * channels + channel;
                all = merged(all, {static_cast<float>(counts[tile]), at[0], at[channels]});
            }
        }
        for (int half = rows / 2; half > 0; half /= 2) {
            column[mine] = all.count, column[threads + mine] = all.mean, column[2 * threads + mine] = all.m2;
            __syncthreads();
            const int other = mine + half * static_cast<int>(blockDim.x);
            if (row < half) all = merged(all, {column[other], column[threads + other], column[2 * threads + other]});
            __syncthreads();
        }
        if (row == 0 && live) kept[lane] = all.mean, kept[size + lane] = all.m2;
        if (row == 0) column[threadIdx.x] = all.count;
        __syncthreads();
        for (int k = 0; k < static_cast<int>(blockDim.x); ++k) pixels = column[k] > pixels ? column[k] : pixels;
        __syncthreads();
    }
    return pixels;
}

template <Activation A, typename T, int V>
__device__ __forceinline__ void apply_pixels(const T* x, const float* a, const float* b, T* y, int64_t first, int64_t step, int count, int64_t items,
                                             int64_t width, int64_t pixel_stride, int64_t y_stride, int resample) {
    float u[V];
    Pack<T, V> result;
    for (int k = 0; k < count; ++k) {
        const int64_t item = first + k * step;
        if (item >= items) return;
        if (resample == 1) {
            const int64_t half = width / 2;
            const T* const from = x + (item / half * (2 * width) + item % half * 2) * pixel_stride;
            float sum[V];
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
                load_pack<T, V>(from + (corner / 2 * width + corner % 2) * pixel_stride, u);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float z = activated<A>(u[v] * a[v] + b[v]);
                    sum[v] = corner == 0 ? z : sum[v] + z;
                }
            }
#pragma unroll
            for (int v = 0; v < V; ++v) store(result.values + v, 0.25f * sum[v]);
            store_pack<T, V>(y + item * y_stride, result);
            continue;
        }
        load_pack<T, V>(x + item * pixel_stride, u);
#pragma unroll
        for (int v = 0; v < V; ++v) store(result.values + v, activated<A>(u[v] * a[v] + b[v]));
        if (resample == 0) {
            store_pack<T, V>(y + item * y_stride, result);
            continue;
        }
        T* const to = y + (item / width * (4 * width) + item % width * 2) * y_stride;
        store_pack<T, V>(to, result);
        store_pack<T, V>(to + y_stride, result);
        store_pack<T, V>(to + 2 * width * y_stride, result);
        store_pack<T, V>(to + (2 * width + 1) * y_stride, result);
    }
}

// Block (pixels, vectors of both sources, sample).
template <typename T, int V>
__device__ __forceinline__ void apply_block(const T* x, const T* x2, const float* scale, const float* offset, T* y, int64_t pixels,
                                            int64_t y_pixels, int64_t items, int64_t width, int64_t channels, int64_t channels2,
                                            int64_t pixel_stride, int64_t pixel_stride2, int64_t y_stride, int activation, int resample,
                                            int pixels_of_a_thread) {
    const int64_t n = blockIdx.z, all = channels + channels2;
    const int64_t channel = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * V;
    if (channel >= all) return;
    const bool second = channel >= channels;
    const int64_t stride = second ? pixel_stride2 : pixel_stride;
    const T* const from = (second ? x2 + (channel - channels) : x + channel) + n * pixels * stride;
    T* const to = y + n * y_pixels * y_stride + channel;
    float a[V], b[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
        a[v] = scale == nullptr ? 1.0f : scale[n * all + channel + v];
        b[v] = scale == nullptr ? 0.0f : offset[n * all + channel + v];
    }
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * pixels_of_a_thread + threadIdx.y, step = blockDim.y;
    switch (static_cast<Activation>(activation)) {
        case Activation::gelu:
            return apply_pixels<Activation::gelu, T, V>(from, a, b, to, first, step, pixels_of_a_thread, items, width, stride, y_stride, resample);
        case Activation::silu:
            return apply_pixels<Activation::silu, T, V>(from, a, b, to, first, step, pixels_of_a_thread, items, width, stride, y_stride, resample);
        case Activation::relu:
            return apply_pixels<Activation::relu, T, V>(from, a, b, to, first, step, pixels_of_a_thread, items, width, stride, y_stride, resample);
        default:
            return apply_pixels<Activation::none, T, V>(from, a, b, to, first, step, pixels_of_a_thread, items, width, stride, y_stride, resample);
    }
}

}  // namespace dfe

// Block (group, sample).
extern "C" __global__ void group_norm_merge(const float* moments, const int* counts, const float* moments2, const int* counts2, const float* weight,
                                            const float* bias, const float* shift, float* scale, float* offset, float* mean, float* rstd,
                                            int64_t tiles, int64_t tiles2, int64_t channels, int64_t channels2, int64_t shift_stride, int size,
                                            float eps) {
    DFE_DYNAMIC_SHARED(float, shared);
    const int threads = static_cast<int>(blockDim.x * blockDim.y), mine = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    float *const column = shared, *const kept = shared + 3 * threads;
    const int64_t n = blockIdx.y, group = blockIdx.x, first = group * size, all = channels + channels2;
    float pixels = 0.0f;
    if (first < channels) pixels = dfe::merge_source(moments, counts, tiles, channels, n, first, size, column, kept);
    if (first + size > channels) pixels = dfe::merge_source(moments2, counts2, tiles2, channels2, n, first - channels, size, column, kept);
    __syncthreads();
    float group_mean = 0.0f, group_m2 = 0.0f;
    for (int c = 0; c < size; ++c) group_mean += kept[c] + (shift == nullptr ? 0.0f : shift[n * shift_stride + first + c]);
    group_mean /= static_cast<float>(size);
    for (int c = 0; c < size; ++c) {
        const float d = kept[c] + (shift == nullptr ? 0.0f : shift[n * shift_stride + first + c]) - group_mean;
        group_m2 += kept[size + c] + pixels * d * d;
    }
    const float group_rstd = 1.0f / sqrtf(group_m2 / (pixels * static_cast<float>(size)) + eps);
    for (int c = mine; c < size; c += threads) {
        const float moved = shift == nullptr ? 0.0f : shift[n * shift_stride + first + c], factor = group_rstd * weight[first + c];
        scale[n * all + first + c] = factor;
        offset[n * all + first + c] = bias[first + c] - (group_mean - moved) * factor;
    }
    if (mine != 0 || mean == nullptr) return;
    mean[n * gridDim.x + group] = group_mean;
    rstd[n * gridDim.x + group] = group_rstd;
}
DFE_KERNEL(group_norm_merge)

#define DFE_STAGES(NAME, TYPE, V)                                                                                                              \
    extern "C" __global__ void group_norm_moments_##NAME##_##V(const TYPE* x, float* moments, int64_t pixels, int64_t channels,                \
                                                               int64_t pixel_stride, int64_t tile_pixels, int64_t tiles) {                     \
        DFE_DYNAMIC_SHARED(float, shared);                                                                                                     \
        dfe::moments_block<TYPE, V>(x, moments, pixels, channels, pixel_stride, tile_pixels, tiles, shared);                                   \
    }                                                                                                                                          \
    DFE_KERNEL(group_norm_moments_##NAME##_##V)                                                                                                \
    extern "C" __global__ void group_norm_apply_##NAME##_##V(const TYPE* x, const TYPE* x2, const float* scale, const float* offset, TYPE* y,  \
                                                             int64_t pixels, int64_t y_pixels, int64_t items, int64_t width,                   \
                                                             int64_t channels, int64_t channels2, int64_t pixel_stride,                        \
                                                             int64_t pixel_stride2, int64_t y_stride, int activation, int resample,            \
                                                             int pixels_of_a_thread) {                                                         \
        dfe::apply_block<TYPE, V>(x, x2, scale, offset, y, pixels, y_pixels, items, width, channels, channels2, pixel_stride, pixel_stride2,   \
                                  y_stride, activation, resample, pixels_of_a_thread);                                                         \
    }                                                                                                                                          \
    DFE_KERNEL(group_norm_apply_##NAME##_##V)

DFE_STAGES(float32, float, 4)
DFE_STAGES(float32, float, 1)
DFE_STAGES(float16, dfe::half, 8)
DFE_STAGES(float16, dfe::half, 1)
DFE_STAGES(bfloat16, dfe::bfloat16, 8)
DFE_STAGES(bfloat16, dfe::bfloat16, 1)
