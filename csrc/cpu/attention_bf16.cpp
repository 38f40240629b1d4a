// The op `attention` in bfloat16 with sums in float32, on processors that have AVX512_BF16 or AMX. Compiled once, with those instructions; the
// rules of isa.h hold.
#include <immintrin.h>

#include "attention_items.h"
#include "tiles.h"

namespace dfe {
namespace {

using Bits = uint16_t;  // of a bfloat16

constexpr float BOUND = 60.0f;            // of scores times factor, whose powers of two need no largest score beside them
constexpr Bits LARGEST_VALUE = 167 << 7;  // 2^40: so that their sums with such powers stay finite

__mmask32 first_of(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count > 0 ? count : 0)) - 1; }

__m512 squares_added(__m512 sum, __m512i pairs) { return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)pairs); }

// 2^x, half a unit of bfloat16 too large: cut short to one it is rounded. The polynomial is within 8e-5 on [0, 1).
__m512 power_to_cut(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 power = _mm512_fmadd_ps(f, _mm512_set1_ps(0.0780245215f), _mm512_set1_ps(0.226067156f));
    power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.695833564f));
    power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(0.999925196f + 0x1p-8f));
    return _mm512_scalef_ps(power, x);  // takes the floor of x
}

// 2^x for x <= 0, to 1e-7.
float power_of_two(float x) {
    const __m512 at = _mm512_set1_ps(x < -125.0f ? -125.0f : x);
    const __m512 f = _mm512_reduce_ps(at, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const float coefficients[6] = {0.99999994f, 0.693153083f, 0.240153611f, 0.0558263175f, 0.00898933969f, 0.00187757669f};
    __m512 power = _mm512_set1_ps(coefficients[5]);
    for (int k = 4; k >= 0; --k) power = _mm512_fmadd_ps(f, power, _mm512_set1_ps(coefficients[k]));
    return _mm512_cvtss_f32(_mm512_scalef_ps(power, at));
}

// Rows of 16 words into columns.
void transpose(__m512i* rows) {
    __m512i other[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
        other[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
        other[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
        other[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0xdd);
    }
}

// What both products share. The pairs of the second product are of the keys j and 16 + j of 32, so that two vectors of scores become one.
struct Common {
    using Element = Bits;
    using Value = Bits;
    static constexpr int64_t KEYS = attention_keys(Product::pairs), PITCH = scores_pitch(Product::pairs);

    float largest_key = 0.0f;  // of the squares of their lengths
    bool small_values = false, bounded = false;

    void pack_keys(const AttentionArguments& p, const Bits* from, Bits* to) {
        __m512 largest = _mm512_setzero_ps();
        for (int64_t k = 0; k < p.keys; k += 16) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t c = 0; c < p.length; c += 32) {
                __m512i rows[16];
                for (int64_t i = 0; i < 16; ++i) {
                    rows[i] = _mm512_maskz_loadu_epi16(k + i < p.pixels ? first_of(p.depth - c) : 0, from + (k + i) * p.pitch_qkv + c);
                }
                transpose(rows);
                const int64_t pairs = p.length - c < 32 ? (p.length - c) / 2 : 16;
                for (int64_t i = 0; i < pairs; ++i, to += 32) {
                    squares = squares_added(squares, rows[i]);
                    _mm512_storeu_si512(to, rows[i]);
                }
            }
            largest = _mm512_max_ps(largest, squares);
        }
        largest_key = _mm512_reduce_max_ps(largest);
    }

    void pack_values(const AttentionArguments& p, const Bits* from, Bits* to) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t c = 0; c < p.width; c += 16) {
            const __mmask16 mask = static_cast<__mmask16>(first_of(p.depth - c < 16 ? p.depth - c : 16));
            for (int64_t k = 0; k < p.keys; k += 32) {
                for (int64_t i = k; i < k + 16; ++i, to += 32) {
                    const __m256i low = _mm256_maskz_loadu_epi16(i < p.pixels ? mask : 0, from + i * p.pitch_qkv + c);
                    const __m256i high = _mm256_maskz_loadu_epi16(i + 16 < p.pixels ? mask : 0, from + (i + 16) * p.pitch_qkv + c);
                    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
                    largest = _mm512_max_epu16(largest, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7fff)));
                    _mm512_storeu_si512(to, pairs);
                }
            }
        }
        small_values = _mm512_cmpgt_epu16_mask(largest, _mm512_set1_epi16(static_cast<short>(LARGEST_VALUE))) == 0;
    }

    // No score exceeds the product of the lengths. (A length that is no number may pass unseen: its powers are none either.)
    void take_queries(const AttentionArguments& p, const Bits* from, int64_t rows, float factor, Bits* to) {
        float largest = 0.0f;
        for (int64_t r = 0; r < ATTENTION_QUERIES; ++r) {
            __m512 squares = _mm512_setzero_ps();
            for (int64_t c = 0; c < p.length; c += 32) {
                const __m512i pairs = _mm512_maskz_loadu_epi16(r < rows ? first_of(p.depth - c) : 0, from + r * p.pitch_qkv + c);
                squares = squares_added(squares, pairs);
                _mm512_mask_storeu_epi16(to + r * p.length + c, first_of(p.length - c), pairs);
            }
            const float length = _mm512_reduce_add_ps(squares);
            largest = length > largest ? length : largest;
        }
        bounded = small_values && factor * factor * largest * largest_key <= BOUND * BOUND;
    }

    template <bool Bounded>
    static __m512i probabilities(const float* scores, __m512 factor, __m512 shift) {
        __m512 low = _mm512_fmsub_ps(_mm512_loadu_ps(scores), factor, shift), high = _mm512_fmsub_ps(_mm512_loadu_ps(scores + 16), factor, shift);
        if (!Bounded) {  // NaN stays
            const __m512 least = _mm512_set1_ps(-125.0f);
            low = _mm512_max_ps(least, low), high = _mm512_max_ps(least, high);
        }
        const __m512i bits = _mm512_srli_epi32(_mm512_castps_si512(power_to_cut(low)), 16);
        return _mm512_mask_mov_epi16(bits, 0xaaaaaaaa, _mm512_castps_si512(power_to_cut(high)));
    }

    template <bool Bounded>
    static void row(float* scores, int64_t keys, __m512 factor, float shift, float* totals) {
        const __m512 away = _mm512_set1_ps(shift);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        __m512 total = _mm512_loadu_ps(totals);
        int64_t k = 0;
        for (; k + 32 <= keys; k += 32) {
            const __m512i pairs = probabilities<Bounded>(scores + k, factor, away);
            total = _mm512_dpbf16_ps(total, (__m512bh)pairs, ones);
            _mm512_storeu_si512(scores + k / 2, pairs);
        }
        if (k < keys) {
            const __mmask32 mask = _pdep_u32(first_of(keys - k), 0x55555555u) | _pdep_u32(first_of(keys - k) >> 16, 0xaaaaaaaau);
            const __m512i pairs = _mm512_maskz_mov_epi16(mask, probabilities<Bounded>(scores + k, factor, away));
            total = _mm512_dpbf16_ps(total, (__m512bh)pairs, ones);
            _mm512_storeu_si512(scores + k / 2, pairs);
        }
        _mm512_storeu_ps(totals, total);
    }

    static float largest_of(const float* scores, int64_t keys) {
        const __m512 least = _mm512_set1_ps(-HUGE_VALF);
        __m512 largest = least;
        int64_t k = 0;
        for (; k + 16 <= keys; k += 16) largest = _mm512_max_ps(_mm512_loadu_ps(scores + k), largest);  // NaN is passed over
        const __mmask16 mask = static_cast<__mmask16>(first_of(keys - k));
        return _mm512_reduce_max_ps(_mm512_max_ps(_mm512_mask_loadu_ps(least, mask, scores + k), largest));
    }

    // The scores of `keys` keys that exist, in place; what was summed before is brought to the new largest score.
    void exponentials(const Softmax& s, int64_t keys) const {
        const __m512 factor = _mm512_set1_ps(s.factor);
        for (int64_t r = 0; r < s.rows; ++r) {
            float *const scores = s.scores + r * PITCH, *const totals = s.totals + 16 * r;
            if (s.first) _mm512_storeu_ps(totals, _mm512_setzero_ps());
            if (bounded) {
                row<true>(scores, keys, factor, 0.0f, totals);
                continue;
            }
            const float largest = largest_of(scores, keys) * s.factor;
            if (s.first) {
                s.largest[r] = largest;
            } else if (largest > s.largest[r]) {
                const __m512 share = _mm512_set1_ps(power_of_two(s.largest[r] - largest));
                _mm512_storeu_ps(totals, _mm512_mul_ps(_mm512_loadu_ps(totals), share));
                float* const sums = s.sums + r * s.width;
                for (int64_t c = 0; c < s.width; c += 16) _mm512_storeu_ps(sums + c, _mm512_mul_ps(_mm512_loadu_ps(sums + c), share));
                s.largest[r] = largest;
            }
            row<false>(scores, keys, factor, s.largest[r], totals);
        }
    }

    static void write(const float* sums, const float* totals, int64_t depth, Bits* y) {
        const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(_mm512_loadu_ps(totals)));
        for (int64_t c = 0; c < depth; c += 16) {
            const __m256i bits = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + c), share));
            _mm256_mask_storeu_epi16(y + c, static_cast<__mmask16>(first_of(depth - c < 16 ? depth - c : 16)), bits);
        }
    }
};

struct Tiles : Common {
    alignas(64) char state[TILE_STATE_BYTES];

    Tiles() {
        TileShapes shapes;
        for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = 16;
        tiles_begin(shapes, state);
    }
    ~Tiles() { tiles_end(state); }

    template <int Columns>
    static void multiply(const Panels<Bits>& p) {
        const int64_t pitch_a = 2 * p.pitch_a, pitch_c = 4 * p.pitch_c;
        const Bits *const below = p.a + 16 * p.pitch_a, *const right = p.b + p.stride_b;
        float* const c = p.c + 16 * p.pitch_c;
        __asm__ volatile("" : : : "memory");  // the compiler is not told that tiles are loaded from memory
        if (p.add) {
            _tile_loadd(0, p.c, pitch_c);
            _tile_loadd(2, c, pitch_c);
            if (Columns == 2) _tile_loadd(1, p.c + 16, pitch_c);
            if (Columns == 2) _tile_loadd(3, c + 16, pitch_c);
        } else {
            _tile_zero(0);
            _tile_zero(2);
            if (Columns == 2) _tile_zero(1);
            if (Columns == 2) _tile_zero(3);
        }
        for (int64_t k = 0; k < p.length; k += 32) {
            _tile_loadd(6, p.b + 16 * k, 64);
            _tile_loadd(4, p.a + k, pitch_a);
            if (Columns == 2) _tile_loadd(7, right + 16 * k, 64);
            _tile_loadd(5, below + k, pitch_a);
            _tile_dpbf16ps(0, 4, 6);
            if (Columns == 2) _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            if (Columns == 2) _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, p.c, pitch_c);
        _tile_stored(2, c, pitch_c);
        if (Columns == 2) _tile_stored(1, p.c + 16, pitch_c);
        if (Columns == 2) _tile_stored(3, c + 16, pitch_c);
    }
};

struct Pairs : Common {
    template <int Columns>
    static void multiply(const Panels<Bits>& p) {
        constexpr int ROWS = 8;
        const int64_t pitch = p.pitch_a / 2;
        for (int64_t r = 0; r < p.rows; r += ROWS) {
            const uint32_t* const a = reinterpret_cast<const uint32_t*>(p.a) + r * pitch;
            const uint32_t* const b = reinterpret_cast<const uint32_t*>(p.b);
            float* const c = p.c + r * p.pitch_c;
            __m512 sums[ROWS][Columns];
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
                for (int j = 0; j < Columns; ++j) sums[i][j] = p.add ? _mm512_loadu_ps(c + i * p.pitch_c + 16 * j) : _mm512_setzero_ps();
            }
            for (int64_t k = 0; k < p.length / 2; ++k) {
                __m512bh right[Columns];
#pragma GCC unroll 2
                for (int j = 0; j < Columns; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * p.stride_b / 2 + 16 * k);
#pragma GCC unroll 8
                for (int i = 0; i < ROWS; ++i) {
                    const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * pitch + k]));
#pragma GCC unroll 2
                    for (int j = 0; j < Columns; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
                for (int j = 0; j < Columns; ++j) _mm512_storeu_ps(c + i * p.pitch_c + 16 * j, sums[i][j]);
            }
        }
    }
};

}  // namespace

AttentionItems attention_items_bfloat16(Product product) { return product == Product::tiles ? attend<Tiles> : attend<Pairs>; }

}  // namespace dfe
