// The op `conv2d` (csrc/cpu/conv2d.h): the product in float32, and a band from its input to its outputs.
#include "conv2d.h"

#include "conv2d_band.h"
#include "conv2d_outputs.h"

namespace dfe {
namespace DFE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define DFE_UNROLL _Pragma("GCC unroll 32")

// The sum of the lanes of each vector.
#if defined(__AVX512F__)
inline void add_lanes(const Vector (&sums)[16], float* totals) {
    __m512 pairs[8], fours[4];
    DFE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const __m512 a = (__m512)sums[2 * i], b = (__m512)sums[2 * i + 1];
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    DFE_UNROLL
    for (int i = 0; i < 4; ++i) {
        const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
    _mm512_store_ps(totals, halves(halves(fours[0], fours[1]), halves(fours[2], fours[3])));
}
#else
template <int Count>
inline void add_lanes(const Vector (&sums)[Count], float* totals) {
    for (int i = 0; i < Count; ++i) {
        float total = 0.0f;
        for (int l = 0; l < LANES; ++l) total += sums[i][l];
        totals[i] = total;
    }
}
#endif

template <int Rows, int Vectors>
void float_block_at(const BlockArguments& p, int64_t at) {
    const float* DFE_RESTRICT b = static_cast<const float*>(p.b);
    float* const c = p.c + at * Vectors * LANES;
    const int64_t pitch = p.pitch;
    Vector sums[Rows][Vectors] = {};
    for (int64_t r = 0; r < p.runs; ++r) {
        const float* a = static_cast<const float*>(p.a) + at * pitch + p.starts[r];
        for (const float* const end = a + p.length; a != end; ++a, b += Vectors * LANES) {
            Vector weights[Vectors];
            DFE_UNROLL
            for (int j = 0; j < Vectors; ++j) weights[j] = *reinterpret_cast<const Vector*>(b + j * LANES);
            DFE_UNROLL
            for (int i = 0; i < Rows; ++i) {
                const float value = a[i * pitch];
                DFE_UNROLL
                for (int j = 0; j < Vectors; ++j) sums[i][j] += value * weights[j];
            }
        }
    }
    DFE_UNROLL
    for (int i = 0; i < Rows; ++i) {
        DFE_UNROLL
        for (int j = 0; j < Vectors; ++j) *reinterpret_cast<Vector*>(c + (i * Vectors + j) * LANES) = sums[i][j];
    }
}

template <int Rows, int Vectors>
void float_block(const BlockArguments& p) {
    for (int64_t i = 0; i < p.count; ++i) float_block_at<Rows, Vectors>(p, i * Rows);
}

// Few outputs, which would leave most lanes of the block above idle: here the lanes are values of a run, summed up at the end. Weights:
// (values / 16, Outputs, 16). c still has 16 outputs, the others 0.
template <int Pixels, int Outputs>
void few_block_at(const BlockArguments& p, int64_t at) {
    const float* DFE_RESTRICT b = static_cast<const float*>(p.b);
    float* const c = p.c + at * 16;
    const int64_t pitch = p.pitch;
    Vector sums[Pixels * Outputs] = {};
    for (int64_t r = 0; r < p.runs; ++r) {
        const float* a = static_cast<const float*>(p.a) + at * pitch + p.starts[r];
        for (const float* const end = a + p.length; a != end; a += 16, b += 16 * Outputs) {
            DFE_UNROLL
            for (int l = 0; l < 16; l += LANES) {
                DFE_UNROLL
                for (int i = 0; i < Pixels; ++i) {
                    const Vector values = *reinterpret_cast<const Vector*>(a + i * pitch + l);
                    DFE_UNROLL
                    for (int o = 0; o < Outputs; ++o) sums[i * Outputs + o] += values * *reinterpret_cast<const Vector*>(b + 16 * o + l);
                }
            }
        }
    }
    alignas(64) float totals[Pixels * Outputs];
    add_lanes(sums, totals);
    for (int i = 0; i < Pixels; ++i) {
        memset(c + 16 * i, 0, 64);
        memcpy(c + 16 * i, totals + i * Outputs, sizeof(float) * Outputs);
    }
}

template <int Pixels, int Outputs>
void few_block(const BlockArguments& p) {
    for (int64_t i = 0; i < p.count; ++i) few_block_at<Pixels, Outputs>(p, i * Pixels);
}

template <typename T, typename G>
void items(const Conv2dArguments& p, int64_t begin, int64_t end, float* scratch) {
    float* const c = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
    const int64_t sums = p.multiplier.most * p.multiplier.pixels * p.multiplier.outputs;
    G* const band = reinterpret_cast<G*>(c + 2 * sums);
    alignas(64) char state[STATE_BYTES];
    const int64_t halo = 2 * p.margin, block_size = p.runs * p.length * p.multiplier.outputs;
    if (p.multiplier.begin != nullptr) p.multiplier.begin(p.step, state);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t index = item % p.bands, n = item / p.bands % p.batch, split = item / p.bands / p.batch;
        const int64_t top = index * p.band_rows, rows = p.height - top < p.band_rows ? p.height - top : p.band_rows;
        const T* const from_x = static_cast<const T*>(p.x) + (n * p.height + top) * p.width * p.pitch_x;
        if (p.direct) {
            // nothing to prepare
        } else if (item > begin && index > 0) {  // the last rows of the band before are the first of this one
            memmove(static_cast<void*>(band), band + p.band_rows * p.row * p.padded, static_cast<size_t>((p.margin + halo * p.row) * p.padded) * sizeof(G));
            fill<T, G>(p, n, top, halo, rows + halo, band);
        } else {
            clear(p, band, p.margin * p.padded);
            fill<T, G>(p, n, top, 0, rows + halo, band);
        }
        const int64_t last = (rows - 1) * p.row + p.width, step = p.multiplier.pixels * p.multiplier.most;
        const int64_t from = split * p.split_blocks, to = from + p.split_blocks < p.blocks ? from + p.split_blocks : p.blocks;
        // A block's sums are finished while the next one's are made: the processor has products and vectors at work together.
        int64_t waiting = -1, waiting_stop = 0, waiting_block = 0, turn = 0;
        const auto finish_waiting = [&]() {
            if (waiting >= 0) finish<T, sizeof(G) == 1>(p, n, top, waiting, waiting_stop, waiting_block, c + (turn ^ 1) * sums);
        };
        const auto run = [&](int64_t start, int64_t block) {
            const int64_t stop = start + step < last ? start + step : last, count = (stop - start + p.multiplier.pixels - 1) / p.multiplier.pixels;
            const G* const weights = static_cast<const G*>(p.weights) + block * block_size;
            const void* a = band + start * p.padded;
            int64_t pitch = p.padded;
            if (p.direct && (n * p.height + top) * p.width + start + count * p.multiplier.pixels <= p.batch * p.height * p.width) {
                a = from_x + start * p.pitch_x;
                pitch = p.pitch_x;
            } else if (p.direct) {  // the block would read past the end of x
                for (int64_t i = 0; i < stop - start; ++i) {
                    memcpy(static_cast<void*>(band + i * p.padded), from_x + (start + i) * p.pitch_x, static_cast<size_t>(p.padded) * sizeof(T));
                }
                a = band;
            }
            p.multiplier.block({a, pitch, p.starts, p.runs, p.length, weights, c + turn * sums, p.step, count});
            finish_waiting();
            waiting = start, waiting_stop = stop, waiting_block = block, turn ^= 1;
        };
        if (p.inner_blocks) {
            for (int64_t start = 0; start < last; start += step) {
                for (int64_t block = from; block < to; ++block) run(start, block);
            }
        } else {
            for (int64_t block = from; block < to; ++block) {
                for (int64_t start = 0; start < last; start += step) run(start, block);
            }
        }
        finish_waiting();
    }
    if (p.multiplier.end != nullptr) p.multiplier.end(state);
}

}  // namespace

Multiplier float_multiplier(int64_t outputs) {
    constexpr int SUMS = LANES == 16 ? 16 : 8;  // vectors that stay in registers
    if (outputs == 1) return {few_block<SUMS, 1>, SUMS, 96 / SUMS, 16, nullptr, nullptr};
    if (outputs == 2) return {few_block<SUMS / 2, 2>, SUMS / 2, 192 / SUMS, 16, nullptr, nullptr};
    if (outputs == 4) return {few_block<SUMS / 4, 4>, SUMS / 4, 384 / SUMS, 16, nullptr, nullptr};
    constexpr int WIDE = LANES == 16 ? 2 * ROWS : ROWS;  // rows of a block of 16 outputs
    if (outputs == 32 && LANES == 16) return {float_block<ROWS, 2>, ROWS, 8, 32, nullptr, nullptr};
    return {float_block<WIDE, 16 / LANES>, WIDE, 96 / WIDE, 16, nullptr, nullptr};
}

Conv2dPasses conv2d_passes(const Conv2dArguments& p) {
    switch (p.type) {
        case FloatType::float16: return {items<half, float>, moments<half>};
        case FloatType::bfloat16:
#if defined(__AVX512F__)
            if (of_bytes(p.product)) return {items<bfloat16, uint8_t>, moments<bfloat16>};
#endif
            return {p.product == Product::float32 ? items<bfloat16, float> : items<bfloat16, bfloat16>, moments<bfloat16>};
        default: return {items<float, float>, moments<float>};
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
