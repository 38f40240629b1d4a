// The op `attention` (csrc/cpu/attention.h) in float32 vectors.
#include "attention_items.h"
#include "vector.h"

namespace dfe {
namespace DFE_ISA {
namespace {

// Of the sums that stay in registers: ROWS x PANELS of 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8, PANELS = 2;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 4, PANELS = 1;
#else
constexpr int LANES = 4, ROWS = 2, PANELS = 1;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define DFE_UNROLL _Pragma("GCC unroll 8")

// Terms that are summed one after the other; longer sums are sums of such.
constexpr int64_t TERMS = 64;

template <int Columns>
DFE_HD void multiply_rows(const Panels<float>& p, const float* a, const float* b, int64_t length, bool add, float* c) {
    constexpr int VECTORS = 16 / LANES;
    Vector sums[ROWS][Columns * VECTORS] = {};
    for (int64_t k = 0; k < length; ++k) {
        Vector right[Columns * VECTORS];
        DFE_UNROLL
        for (int j = 0; j < Columns * VECTORS; ++j) {
            right[j] = *reinterpret_cast<const Vector*>(b + j / VECTORS * p.stride_b + 16 * k + j % VECTORS * LANES);
        }
        DFE_UNROLL
        for (int i = 0; i < ROWS; ++i) {
            const float left = a[i * p.pitch_a + k];
            DFE_UNROLL
            for (int j = 0; j < Columns * VECTORS; ++j) sums[i][j] += left * right[j];
        }
    }
    DFE_UNROLL
    for (int i = 0; i < ROWS; ++i) {
        DFE_UNROLL
        for (int j = 0; j < Columns * VECTORS; ++j) {
            Vector* const to = reinterpret_cast<Vector*>(c + i * p.pitch_c + j * LANES);
            *to = add ? *to + sums[i][j] : sums[i][j];
        }
    }
}

template <typename T>
struct Floating {
    using Element = float;
    using Value = T;
    static constexpr int64_t KEYS = attention_keys(Product::float32), PITCH = scores_pitch(Product::float32);

    static Floats some(const T* from, int64_t left) {
        return left >= WIDTH ? load_vector(from) : load_some(from, static_cast<int>(left > 0 ? left : 0));
    }

    void pack_keys(const AttentionArguments& p, const T* from, float* to) {
        for (int64_t k = 0; k < p.keys; k += WIDTH, to += WIDTH * p.length) {
            for (int64_t c = 0; c < p.length; c += WIDTH) {
                float block[WIDTH][WIDTH];
                for (int64_t i = 0; i < WIDTH; ++i) {
                    store_vector(block[i], some(from + (k + i) * p.pitch_qkv + c, k + i < p.pixels ? p.depth - c : 0));
                }
                const int64_t count = p.length - c < WIDTH ? p.length - c : WIDTH;
                for (int64_t i = 0; i < count; ++i) {
                    for (int64_t j = 0; j < WIDTH; ++j) to[(c + i) * WIDTH + j] = block[j][i];
                }
            }
        }
    }

    void pack_values(const AttentionArguments& p, const T* from, float* to) {
        for (int64_t c = 0; c < p.width; c += WIDTH) {
            for (int64_t k = 0; k < p.keys; ++k, to += WIDTH) store_vector(to, some(from + k * p.pitch_qkv + c, k < p.pixels ? p.depth - c : 0));
        }
    }

    void take_queries(const AttentionArguments& p, const T* from, int64_t rows, float /*factor*/, float* to) {
        for (int64_t r = 0; r < ATTENTION_QUERIES; ++r, to += p.length) {
            for (int64_t c = 0; c < p.length; ++c) to[c] = r < rows && c < p.depth ? load(from + r * p.pitch_qkv + c) : 0.0f;
        }
    }

    template <int Columns>
    static void multiply(const Panels<float>& p) {
        for (int64_t r = 0; r < p.rows; r += ROWS) {
            const float* const a = p.a + r * p.pitch_a;
            float* const c = p.c + r * p.pitch_c;
            for (int j = 0; j < Columns; j += PANELS) {
                const float* const b = p.b + j * p.stride_b;
                for (int64_t k = 0; k < p.length; k += TERMS) {
                    const int64_t length = p.length - k < TERMS ? p.length - k : TERMS;
                    multiply_rows<(Columns < PANELS ? Columns : PANELS)>(p, a + k, b + 16 * k, length, p.add || k > 0, c + 16 * j);
                }
            }
        }
    }

    static float largest_of(const float* scores, int64_t keys) {
        float largest = scores[0];
        int64_t k = 0;
        if (keys >= WIDTH) {
            Floats lanes = load_vector(scores);
            for (k = WIDTH; k + WIDTH <= keys; k += WIDTH) lanes = larger(load_vector(scores + k), lanes);
            for (int i = 0; i < WIDTH; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
        }
        for (; k < keys; ++k) largest = scores[k] > largest ? scores[k] : largest;
        return largest;
    }

    // 2^x, but 0 where it is too small to count beside 1: products with it might be subnormal, which is slow.
    static Floats power(Floats x) {
        const Floats found = power_of_two<digits_of<T>()>(x);
        return x < -80.0f ? Floats{} : found;
    }

    void exponentials(const Softmax& s, int64_t keys) const {
        for (int64_t r = 0; r < s.rows; ++r) {
            float *const scores = s.scores + r * PITCH, *const sums = s.sums + r * s.width;
            const float largest = largest_of(scores, keys) * s.factor;
            Floats total = {};
            if (s.first) {
                s.largest[r] = largest;
            } else {
                total = load_vector(s.totals + 16 * r);
                if (largest > s.largest[r]) {
                    const Floats share = power_of_two<Digits::all>(broadcast(s.largest[r] - largest));
                    total *= share;
                    for (int64_t c = 0; c < s.width; c += WIDTH) store_vector(sums + c, load_vector(sums + c) * share);
                    s.largest[r] = largest;
                }
            }
            const float away = s.largest[r];
            int64_t k = 0;
            for (; k + WIDTH <= keys; k += WIDTH) {
                const Floats term = power(load_vector(scores + k) * s.factor - away);
                store_vector(scores + k, term);
                total += term;
            }
            if (k < keys) {
                const Floats term = power(load_some(scores + k, static_cast<int>(keys - k)) * s.factor - away);
                store_vector(scores + k, Floats{});
                store_some(scores + k, term, static_cast<int>(keys - k));
                total += load_vector(scores + k);
                k += WIDTH;
            }
            for (; k % 32 != 0; k += WIDTH) store_vector(scores + k, Floats{});
            store_vector(s.totals + 16 * r, total);
        }
    }

    static void write(const float* sums, const float* totals, int64_t depth, T* y) {
        float total = 0.0f;
        for (int i = 0; i < WIDTH; ++i) total += totals[i];
        const float share = 1.0f / total;
        for (int64_t c = 0; c < depth; c += WIDTH) {
            const Floats value = load_vector(sums + c) * share;
            if (depth - c >= WIDTH) {
                store_vector(y + c, value);
            } else {
                store_some(y + c, value, static_cast<int>(depth - c));
            }
        }
    }
};

}  // namespace

AttentionItems attention_items(FloatType type) {
    switch (type) {
        case FloatType::float16: return attend<Floating<half>>;
        case FloatType::bfloat16: return attend<Floating<bfloat16>>;
        default: return attend<Floating<float>>;
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
