// The op `one_step` (formula: kernels/one_step.py), one tile of pixels at a time: values are computed along the tile, whatever the number of
// channels, and then laid out in pairs.
#include "one_step.h"

#include "isa.h"
#include "run.h"
#include "slices.h"

namespace dfe {
namespace DFE_ISA {
namespace {

// Whole runs. One copy of it: another could round differently.
template <int Scales, bool Unit, typename X, typename T>
DFE_NOINLINE void reconstruct_runs(const OneStepNumbers& numbers, int64_t size, const X* DFE_RESTRICT x_s, const T* DFE_RESTRICT e_s,
                                   const X* DFE_RESTRICT x_b, const T* DFE_RESTRICT e_b, T* DFE_RESTRICT result, float* DFE_RESTRICT unit) {
    const OneStepNumbers n = numbers;
    for (int64_t i = 0; i < size; i += RUN) {
        float r[RUN];
        for (int64_t l = i; l < i + RUN; ++l) {
            r[l - i] = reconstructed<Scales>(n, load(x_s + l), load(e_s + l), Scales == 2 ? load(x_b + l) : 0.0f, Scales == 2 ? load(e_b + l) : 0.0f);
        }
        store_run(result + i, r);
        if (Unit) {
            for (int64_t l = 0; l < RUN; ++l) unit[i + l] = unit_pixel(n, r[l]);
        }
    }
}

template <int Scales, bool Unit, typename X, typename T>
void reconstruct(const OneStepNumbers& numbers, int64_t size, const X* x_s, const T* e_s, const X* x_b, const T* e_b, T* result, float* unit) {
    const int64_t whole = size / RUN * RUN, left = size - whole;
    reconstruct_runs<Scales, Unit>(numbers, whole, x_s, e_s, x_b, e_b, result, unit);
    if (left == 0) return;
    X x[2][RUN] = {};
    T e[2][RUN] = {}, r[RUN];
    float u[RUN];
    memcpy(x[0], x_s + whole, left * sizeof(X)), memcpy(e[0], e_s + whole, left * sizeof(T));
    memcpy(x[1], x_b + whole, left * sizeof(X)), memcpy(e[1], e_b + whole, left * sizeof(T));
    reconstruct_runs<Scales, Unit>(numbers, RUN, x[0], e[0], x[1], e[1], r, u);
    memcpy(result + whole, r, left * sizeof(T));
    if (Unit) memcpy(unit + whole, u, left * sizeof(float));
}

// x_0 in the type of the pair.
template <typename T>
const T* converted(const T* values, int64_t, T*) {
    return values;
}
template <typename T>
const T* converted(const float* DFE_RESTRICT values, int64_t size, T* DFE_RESTRICT room) {
    const int64_t whole = size / RUN * RUN;
    for (int64_t i = 0; i < whole; i += RUN) store_run(room + i, values + i);
    if (whole < size) {
        float last[RUN] = {};
        T rounded[RUN];
        memcpy(last, values + whole, (size - whole) * sizeof(float));
        store_run(rounded, last);
        memcpy(room + whole, rounded, (size - whole) * sizeof(T));
    }
    return room;
}
const float* converted(const float* values, int64_t, float*) { return values; }

#if defined(__AVX512F__)
// Where the lanes of three vectors of pairs of three channels come from: of a vector of x_0 and one of the result, both from value first[k] on.
template <int LANES, typename Index>
struct PairLanes {
    alignas(64) Index from[3][LANES];
    int first[3];
    constexpr PairLanes() : from{}, first{} {
        for (int k = 0; k < 3; ++k) {
            first[k] = LANES * k / 6 * 3;
            for (int l = 0; l < LANES; ++l) {
                const int value = LANES * k + l, own = value / 6 * 3 + value % 3 - first[k];
                from[k][l] = static_cast<Index>(value % 6 < 3 ? own : own + LANES);
            }
        }
    }
};

static inline __m512i lanes_of_two(__m512i a, const int32_t* from, __m512i b) { return _mm512_permutex2var_epi32(a, _mm512_load_si512(from), b); }
static inline __m512i lanes_of_two(__m512i a, const int16_t* from, __m512i b) { return _mm512_permutex2var_epi16(a, _mm512_load_si512(from), b); }

// Pairs of three channels without gaps between pixels, as far as whole vectors can be read; returns the pixels done.
template <typename T, typename Index>
int64_t lay_out_vectors(const T* x_0, const T* result, int64_t count, T* pair) {
    constexpr int LANES = 64 / static_cast<int>(sizeof(T)), PIXELS = LANES / 2;
    static constexpr PairLanes<LANES, Index> lanes;
    int64_t i = 0;
    for (; 3 * i + lanes.first[2] + LANES <= 3 * count; i += PIXELS) {
        for (int k = 0; k < 3; ++k) {
            const __m512i a = _mm512_loadu_si512(x_0 + 3 * i + lanes.first[k]), b = _mm512_loadu_si512(result + 3 * i + lanes.first[k]);
            _mm512_storeu_si512(pair + 6 * i + LANES * k, lanes_of_two(a, lanes.from[k], b));
        }
    }
    return i;
}
int64_t lay_out_vectors(const float* x_0, const float* result, int64_t count, float* pair) {
    return lay_out_vectors<float, int32_t>(x_0, result, count, pair);
}
template <typename T>
int64_t lay_out_vectors(const T* x_0, const T* result, int64_t count, T* pair) {
    return lay_out_vectors<T, int16_t>(x_0, result, count, pair);
}
#else
template <typename T>
int64_t lay_out_vectors(const T*, const T*, int64_t, T*) {
    return 0;
}
#endif

template <typename T>
void lay_out(const T* DFE_RESTRICT x_0, const T* DFE_RESTRICT result, int64_t channels, int64_t count, int64_t stride, T* DFE_RESTRICT pair) {
    if (channels == 3) {
        const int64_t done = stride == 6 ? lay_out_vectors(x_0, result, count, pair) : 0;
        pair += done * stride;
        for (int64_t i = done; i < count; ++i, pair += stride) {
            memcpy(pair, x_0 + 3 * i, 3 * sizeof(T));
            memcpy(pair + 3, result + 3 * i, 3 * sizeof(T));
        }
        return;
    }
    for (int64_t i = 0; i < count; ++i, pair += stride) {
        for (int64_t c = 0; c < channels; ++c) {
            pair[c] = x_0[i * channels + c];
            pair[channels + c] = result[i * channels + c];
        }
    }
}

template <typename X, typename T>
void tiles(const OneStepArguments& p, bool stream, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = p.channels, capacity = p.tile_pixels * channels;
    X* rooms_of_x[3];
    T* rooms[4];
    for (int k = 0; k < 3; ++k) rooms_of_x[k] = reinterpret_cast<X*>(scratch + k * capacity);
    for (int k = 0; k < 4; ++k) rooms[k] = reinterpret_cast<T*>(scratch + (3 + k) * capacity);
    float* const unit_room = scratch + 7 * capacity;
    T* const pair_room = reinterpret_cast<T*>(scratch + 8 * capacity);
    const bool second = p.scales == 2, stream_pair = stream && p.pair_stride == 2 * channels;

    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t first = tile * p.tile_pixels, left = p.pixels - first;
        const int64_t count = left < p.tile_pixels ? left : p.tile_pixels, size = count * channels;
        const X *x_t[2] = {nullptr, nullptr}, *x_0 = static_cast<const X*>(p.x_0) + first * p.x_0_stride;
        const T* eps[2] = {nullptr, nullptr};
        for (int s = 0; s < p.scales; ++s) {
            const int64_t pixel = s * p.pixels + first;
            x_t[s] = packed(static_cast<const X*>(p.x_t) + pixel * p.x_t_stride, p.x_t_stride, channels, count, rooms_of_x[s]);
            eps[s] = packed(static_cast<const T*>(p.eps) + pixel * p.eps_stride, p.eps_stride, channels, count, rooms[s]);
        }
        x_0 = packed(x_0, p.x_0_stride, channels, count, rooms_of_x[2]);

        T* const result = rooms[2];
        float* const unit = p.reconstruction == nullptr ? nullptr : p.reconstruction + first * channels;
        float* const to = stream ? unit_room : unit;
        if (second && unit != nullptr) reconstruct<2, true>(p.numbers, size, x_t[0], eps[0], x_t[1], eps[1], result, to);
        if (second && unit == nullptr) reconstruct<2, false>(p.numbers, size, x_t[0], eps[0], x_t[1], eps[1], result, to);
        if (!second && unit != nullptr) reconstruct<1, true>(p.numbers, size, x_t[0], eps[0], x_t[0], eps[0], result, to);
        if (!second && unit == nullptr) reconstruct<1, false>(p.numbers, size, x_t[0], eps[0], x_t[0], eps[0], result, to);

        T* const pair = static_cast<T*>(p.pair) + first * p.pair_stride;
        lay_out(converted(x_0, size, rooms[3]), static_cast<const T*>(result), channels, count, p.pair_stride, stream_pair ? pair_room : pair);
        if (stream_pair) stream_copy(pair, pair_room, 2 * size * static_cast<int64_t>(sizeof(T)));
        if (stream && unit != nullptr) stream_copy(unit, unit_room, size * static_cast<int64_t>(sizeof(float)));
    }
    if (stream) stream_fence();
}

}  // namespace

void one_step_tiles(const OneStepArguments& p, bool stream, int64_t begin, int64_t end, float* scratch) {
    const bool mixed = p.image_type == FloatType::float32;
    switch (p.type) {
        case FloatType::float32: return tiles<float, float>(p, stream, begin, end, scratch);
        case FloatType::float16: return (mixed ? tiles<float, half> : tiles<half, half>)(p, stream, begin, end, scratch);
        case FloatType::bfloat16: return (mixed ? tiles<float, bfloat16> : tiles<bfloat16, bfloat16>)(p, stream, begin, end, scratch);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
