// The op `score` on CUDA (formula: kernels/score.py). score_map_<type>: a warp for each group of SCORE_GROUP pixels, four a lane; grid: warps,
// rounded up. score_select: a block for each image finds the k-th largest of the groups' largest keys, which bounds the k-th largest pixel from
// below, and then that among the pixels of the groups that reach it. Counts are integers, so the order of the atomic additions has no effect.
#include "../common/score.h"
#include "kernel.h"

namespace dfe {

template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

template <typename T>
__device__ void score_group(int64_t at, int lane, const T* logits, float* anomaly_map, int* workspace, int64_t maps, int64_t batch,
                            int64_t pixels, int64_t groups, int64_t stride, bool vectors) {
    const int64_t n = at / groups, group = at % groups, pixel = group * SCORE_GROUP + 4 * lane;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int largest = 0;
    if (pixel < pixels) {
        for (int64_t m = 0; m < maps; ++m) {
            const T* const from = logits + ((m * batch + n) * pixels + pixel) * stride;
            Four<T> four;
            if (vectors) four = *reinterpret_cast<const Four<T>*>(from);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (!vectors && pixel + j < pixels) four.values[j] = from[j * stride];
                if (pixel + j < pixels) sums[j] += sigmoid(load(four.values + j));
            }
        }
        Four<float> result;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            result.values[j] = maps == 1 ? sums[j] : sums[j] / static_cast<float>(maps);
            const int key = key_of(result.values[j]);
            if (pixel + j < pixels) largest = key > largest ? key : largest;
        }
        float* const to = anomaly_map + n * pixels + pixel;
        if (vectors) *reinterpret_cast<Four<float>*>(to) = result;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (!vectors && pixel + j < pixels) to[j] = result.values[j];
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        const int other = __shfl_xor_sync(~0u, largest, mask);
        largest = other > largest ? other : largest;
    }
    if (lane == 0) workspace[n * 2 * groups + group] = largest;
}

struct Chosen {
    int key;   // the k-th largest
    int left;  // how many of its equals are among the k largest
};

// Digit by digit from the highest: those of the k-th largest key, of at least k. each(visit) calls visit(key) for this thread's keys.
template <typename Each>
__device__ Chosen kth_largest(const Each& each, int k, int* counts, int* found) {
    const int lane = static_cast<int>(threadIdx.x);
    int prefix = 0, left = k;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = lane; i < 256; i += static_cast<int>(blockDim.x)) counts[i] = 0;
        __syncthreads();
        each([&](int key) {
            if (shift == 24 || (key ^ prefix) >> (shift + 8) == 0) atomicAdd(counts + ((key >> shift) & 255), 1);
        });
        __syncthreads();
        if (lane < 32) {  // eight digits a lane
            int own = 0;
            for (int j = 0; j < 8; ++j) own += counts[8 * lane + j];
            int reached = own;  // by this lane and those of higher digits
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_down_sync(~0u, reached, offset);
                if (lane + offset < 32) reached += other;
            }
            int above = reached - own, digit = 8 * lane + 7;
            if (above < left && left <= reached) {
                for (; above + counts[digit] < left; --digit) above += counts[digit];
                found[0] = digit;
                found[1] = left - above;
            }
        }
        __syncthreads();
        prefix |= found[0] << shift;
        left = found[1];
    }
    return {prefix, left};
}

// The sum over the block, in one order whatever its threads do, for thread 0; `parts` holds a value for each warp.
__device__ inline float block_sum(float value, float* parts) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
    if (threadIdx.x == 0) {
        for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += parts[warp];
    }
    return sum;
}

}  // namespace dfe

#define DFE_SCORE_MAP(NAME, T)                                                                                                                \
    extern "C" __global__ void score_map_##NAME(const T* logits, float* anomaly_map, int* workspace, int64_t maps, int64_t batch,              \
                                                int64_t pixels, int64_t groups, int64_t stride, int vectors) {                                \
        const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;                                                \
        if (at >= batch * groups) return;                                                                                                     \
        dfe::score_group(at, static_cast<int>(threadIdx.x % 32), logits, anomaly_map, workspace, maps, batch, pixels, groups, stride,         \
                         vectors != 0);                                                                                                       \
    }                                                                                                                                         \
    DFE_KERNEL(score_map_##NAME)

DFE_SCORE_MAP(float32, float)
DFE_SCORE_MAP(float16, dfe::half)
DFE_SCORE_MAP(bfloat16, dfe::bfloat16)

extern "C" __global__ void score_select(const float* anomaly_map, const int* workspace, const float* threshold, float* pred_score,
                                        uint8_t* pred_label, int k, int64_t pixels, int64_t groups) {
    __shared__ int counts[256], found[2], not_numbers;
    __shared__ float parts[32];
    const int64_t n = blockIdx.x;
    const int* const largest = workspace + n * 2 * groups;
    const float* const map = anomaly_map + n * pixels;
    if (threadIdx.x == 0) not_numbers = 0;
    int bound = 0;
    if (k <= groups) {
        bound = dfe::kth_largest([&](auto visit) { for (int64_t i = threadIdx.x; i < groups; i += blockDim.x) visit(largest[i]); }, k, counts,
                                 found).key;
    }
    const auto each_pixel = [&](auto visit) {
        for (int64_t group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
            if (largest[group] < bound) continue;
            for (int j = 0; j < dfe::SCORE_GROUP; j += 32) {
                const int64_t pixel = group * dfe::SCORE_GROUP + j + threadIdx.x % 32;
                if (pixel < pixels) visit(dfe::key_of(map[pixel]));
            }
        }
    };
    const dfe::Chosen chosen = dfe::kth_largest(each_pixel, k, counts, found);
    float sum = 0.0f;
    each_pixel([&](int key) {
        if (key > chosen.key) sum += dfe::value_of(key);
        if (key > dfe::KEY_OF_INFINITY) atomicAdd(&not_numbers, 1);
    });
    sum = dfe::block_sum(sum, parts);
    if (threadIdx.x == 0) {
        const float mean = (sum + static_cast<float>(chosen.left) * dfe::value_of(chosen.key)) / static_cast<float>(k);
        const float score = not_numbers > 0 ? dfe::value_of(dfe::KEY_OF_INFINITY + 0x400000) : mean < 1.0f ? mean : 1.0f;
        pred_score[n] = score;
        pred_label[n] = score > *threshold;
    }
}
DFE_KERNEL(score_select)
