// Stands in for csrc/cuda/wgmma.h on the host. A product starts where it is issued and ends where it is waited for: in between the registers of its
// sums hold what is not a number, and it comes to nothing else where meanwhile they, its first factors or its second factors in shared memory were
// written; where a fence is missing before it; where the descriptors of a warpgroup differ. Layouts: PTX ISA, "Register Fragments and Shared Memory
// Matrix Layouts" of wgmma.
#pragma once

#include <algorithm>
#include <limits>

namespace on_host {

// A matrix descriptor's fields, in bytes; swizzle: bytes of a swizzled row, 0 for none.
struct Matrix {
    uint32_t start, leading, stride, swizzle;

    explicit Matrix(uint64_t descriptor) {
        start = (descriptor & 0x3fff) << 4;
        leading = (descriptor >> 16 & 0x3fff) << 4;
        stride = (descriptor >> 32 & 0x3fff) << 4;
        constexpr uint32_t modes[] = {0, 128, 64, 32};
        swizzle = modes[descriptor >> 62];
        const uint64_t reserved = ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62);
        if ((descriptor & reserved) != 0) {  // a base offset, too: patterns begin at multiples of their length here
            std::fprintf(stderr, "cuda_on_host: matrix descriptor %016llx\n", static_cast<unsigned long long>(descriptor));
            std::abort();
        }
    }

    // Where 8 of the 16 values of a column are, K-major.
    uint32_t run(int column, int half) const {
        if (swizzle == 0) return start + column / 8 * stride + column % 8 * 16 + half * leading;
        const uint32_t plain = start + column / 8 * stride + column % 8 * swizzle + half * 16;
        return plain ^ (plain >> 7 & (swizzle / 16 - 1)) << 4;
    }
};

// The second factors of a product as they lie in shared memory: 16 values of each column.
inline std::vector<uint16_t> gathered(uint64_t descriptor, int columns) {
    const Matrix matrix(descriptor);
    std::vector<uint16_t> values(16 * columns);
    for (int run = 0; run < 2 * columns; ++run) memcpy(&values[8 * run], in_shared(matrix.run(run / 2, run % 2)), 16);
    return values;
}

// Of a warp, the same for its lanes: found by the first of them.
struct SecondFactors {
    unsigned number = 0;  // of the product, from 1
    std::vector<uint16_t> bits;
    std::vector<float> values;
    bool visible;  // all fences were there
};

// One product of one thread. more: what it adds to the thread's sums.
struct Product {
    float* sums;
    std::vector<float> more;
    const uint32_t* a;
    uint32_t a_then[4];
    uint64_t b;
    std::vector<uint16_t> b_then;
};
// The sums that a thread's products under way add to.
struct Sums {
    std::vector<float> values;
    int products;
};
struct Products {
    unsigned issued;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;  // the oldest first
    std::map<float*, Sums> sums;
};
static std::vector<Products> products;                // of each thread
static std::vector<SecondFactors> second_factors;     // of each warp
static std::vector<std::vector<uint64_t>> descriptors;  // of each warpgroup, in order

inline void start_warpgroup_block() {
    products.assign(threads.size(), {});
    second_factors.assign(threads.size() / 32 + 1, {});
    descriptors.assign(threads.size() / 128 + 1, {});
}

constexpr uint32_t UNDER_WAY = 0x7fc0dead;  // not a number
inline bool is_under_way(float value) { return dfe::bits_of(value) == UNDER_WAY; }

// Whether the thread's next product has the descriptor that the other threads of its warpgroup give it.
inline bool same_for_all(size_t thread, unsigned number, uint64_t descriptor) {
    std::vector<uint64_t>& seen = descriptors[thread / 128];
    if (seen.size() < number) seen.push_back(descriptor);
    return seen[number - 1] == descriptor;
}

inline void finish(Products& mine, const Product& product) {
    Sums& sums = mine.sums.at(product.sums);
    const int count = static_cast<int>(sums.values.size());
    const bool whole = std::equal(product.a_then, product.a_then + 4, product.a) && gathered(product.b, 2 * count) == product.b_then &&
                       std::all_of(product.sums, product.sums + count, is_under_way);
    for (int i = 0; i < count; ++i) sums.values[i] = whole ? sums.values[i] + product.more[i] : std::numeric_limits<float>::quiet_NaN();
    if (--sums.products > 0) return;
    std::copy(sums.values.begin(), sums.values.end(), product.sums);
    mine.sums.erase(product.sums);
}

}  // namespace on_host

namespace dfe {

inline void wgmma_fence() {
    on_host::unfenced[on_host::number(*on_host::running)].registers = false;
}
inline void async_proxy_fence() {
    std::vector<uint32_t>& runs = on_host::unfenced[on_host::number(*on_host::running)].runs;
    for (const uint32_t run : runs) --on_host::unfenced_runs[run];
    runs.clear();
}
inline void wgmma_commit() {
    on_host::Products& mine = on_host::products[on_host::number(*on_host::running)];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}
template <int Left>
void wgmma_wait() {
    on_host::Products& mine = on_host::products[on_host::number(*on_host::running)];
    while (mine.groups.size() > Left) {
        for (const on_host::Product& product : mine.groups.front()) on_host::finish(mine, product);
        mine.groups.pop_front();
    }
}

template <typename T, int N>
void wgmma(float (&sums)[N][4], const uint32_t (&a)[4], uint64_t b) {
    using namespace on_host;
    const size_t thread = number(*running), lane = thread % 32;
    Products& mine = products[thread];
    Shown& my = shown[thread];
    const unsigned turn = my.turn ^= 1, issued = ++mine.issued;
    for (int i = 0; i < 4; ++i) unpack(a[i], my.a[turn][2 * i], my.a[turn][2 * i + 1], T{});
    const bool ordered = same_for_all(thread, issued, b) && !unfenced[thread].registers;
    wait(State::at_warp);
    SecondFactors& second = second_factors[thread / 32];
    if (second.number != issued) {
        second.number = issued;
        second.bits = gathered(b, 8 * N);
        second.values.resize(second.bits.size());
        for (size_t i = 0; i < second.bits.size(); ++i) second.values[i] = from_16_bits(second.bits[i], T{});
        second.visible = true;
        for (int run = 0; run < 16 * N; ++run) second.visible = second.visible && unfenced_runs[Matrix(b).run(run / 2, run % 2) / 16] == 0;
    }
    float left[2][16];
    rows_of_first_factors(turn, left);
    Product product{&sums[0][0], std::vector<float>(4 * N), a, {a[0], a[1], a[2], a[3]}, b, second.bits};
    for (int i = 0; i < 4 * N; ++i) {
        const float* const column = &second.values[16 * (i / 4 * 8 + lane % 4 * 2 + i % 2)];
        float total = ordered && second.visible ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        for (int k = 0; k < 16; ++k) total += left[i / 2 % 2][k] * column[k];
        product.more[i] = total;
    }
    Sums& held = mine.sums[product.sums];
    if (held.products++ == 0) {
        held.values.assign(product.sums, product.sums + 4 * N);
        std::fill(product.sums, product.sums + 4 * N, float_of(UNDER_WAY));
    }
    mine.open.push_back(std::move(product));
}

template <int N>
void arrived(float (&)[N][4]) {}

}  // namespace dfe
