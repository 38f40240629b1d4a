// The op `group_norm` and its gradient (formulas: kernels/group_norm.py), a sample at a time: its activation stays in the second-level cache
// between the two passes. Every loop runs along a row of `lanes` values, in which lane l belongs to channel l % channels.
#include "group_norm.h"

#include "gradient_rows.h"

namespace dfe {
namespace DFE_ISA {
namespace {

constexpr int64_t SUMS = 3;    // that a tile leaves for each channel
constexpr int64_t SAMPLE = 8;  // the rows from one to the next whose mean is the centre of a tile's sums

struct Tile {
    int64_t offset, pixels;  // first value, in elements from the start of the activation; number of pixels
};

Tile tile_of(const GroupNormArguments& p, int64_t n, int64_t tile) {
    const int64_t first = tile * p.tile_pixels, left = p.pixels - first;
    return {(n * p.pixels + first) * p.channels, left < p.tile_pixels ? left : p.tile_pixels};
}

// The parts of `shared`: totals of the channels, sums of each tile, lanes for the last pass.
double* totals_of(const GroupNormArguments& p, float* shared, int64_t which) {
    return reinterpret_cast<double*>(shared) + which * p.channels;
}

float* sums_of(const GroupNormArguments& p, float* shared, int64_t tile) { return shared + (2 + tile) * SUMS * p.channels; }

float* lanes_of(const GroupNormArguments& p, float* shared, int64_t which) {
    return shared + (2 + p.tiles) * SUMS * p.channels + which * p.lanes;
}

// dz of the whole sample.
float* kept_of(const GroupNormArguments& p, float* shared) { return lanes_of(p, shared, 3); }

// Leaves per channel: a centre close to the tile's mean, and the sums of (x - centre) and (x - centre)^2. The centre is the mean of every SAMPLE-th
// row, of k of the n values. Those alone differ from the tile's mean by k (centre - mean)^2 in sum of squares or more, so that the squared differences
// from the centre sum to 1 + n / k <= SAMPLE + 2 times those from the mean at most: few digits are lost in the merge.
template <typename T>
void forward_sums(const GroupNormArguments& p, int64_t n, int64_t begin, int64_t end, float* shared, float* scratch) {
    const int64_t channels = p.channels, lanes = p.lanes;
    float *const centre = scratch, *const sum = scratch + lanes, *const squares = scratch + 2 * lanes;
    for (int64_t tile = begin; tile < end; ++tile) {
        const Tile at = tile_of(p, n, tile);
        const T* const x = static_cast<const T*>(p.x) + at.offset;
        const int64_t size = at.pixels * channels;
        float* const out = sums_of(p, shared, tile);
        const int64_t rows = (size + lanes - 1) / lanes, last = size - (rows - 1) * lanes;
        const int64_t sampled = rows == 1 ? 1 : (rows - 1 + SAMPLE - 1) / SAMPLE;  // whole rows, but for a tile of one
        add_rows(x, sampled, SAMPLE * lanes, lanes, rows == 1 ? last : lanes, sum);
        fold(sum, lanes, channels, centre);
        const float share = 1.0f / static_cast<float>(rows == 1 ? at.pixels : sampled * p.row_pixels);
        for (int64_t c = 0; c < channels; ++c) centre[c] *= share;
        spread(centre, lanes, channels);
        add_rows_centred(x, rows, lanes, lanes, last, size, centre, sum, squares);
        for (int64_t c = 0; c < channels; ++c) out[c] = centre[c];
        fold(sum, lanes, channels, out + channels);
        fold(squares, lanes, channels, out + 2 * channels);
    }
}

// Merge the moments of `more` values, given by a centre and sums around it, into mean and m2, the sum of squared differences from the mean,
// of the `count` values before (Chan, Golub and LeVeque 1979).
void merge(const float* DFE_RESTRICT sums, int64_t channels, double more, double count, double* DFE_RESTRICT mean, double* DFE_RESTRICT m2) {
    const double each = 1.0 / more, share = more / (count + more), spread = count * share;
    for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums[channels + c], d = sums[c] + sum * each - mean[c];
        mean[c] += d * share;
        m2[c] += sums[2 * channels + c] - sum * sum * each + d * d * spread;
    }
}

void forward_join(const GroupNormArguments& p, int64_t n, float* shared) {
    const int64_t channels = p.channels, size = channels / p.groups;
    double *const mean = totals_of(p, shared, 0), *const m2 = totals_of(p, shared, 1);
    for (int64_t c = 0; c < 2 * channels; ++c) mean[c] = 0.0;
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
        const double count = static_cast<double>(tile * p.tile_pixels), more = static_cast<double>(tile_of(p, n, tile).pixels);
        merge(sums_of(p, shared, tile), channels, more, count, mean, m2);
    }

    float *const centre = lanes_of(p, shared, 0), *const scale = lanes_of(p, shared, 1), *const offset = lanes_of(p, shared, 2);
    const float* const shift = p.shift == nullptr ? nullptr : p.shift + n * channels;
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t first = g * size, last = first + size;
        double group_mean = 0.0, group_m2 = 0.0;
        for (int64_t c = first; shift != nullptr && c < last; ++c) mean[c] += shift[c];
        for (int64_t c = first; c < last; ++c) group_mean += mean[c] / static_cast<double>(size);
        for (int64_t c = first; c < last; ++c) group_m2 += m2[c] + static_cast<double>(p.pixels) * (mean[c] - group_mean) * (mean[c] - group_mean);
        const double rstd = 1.0 / sqrt(group_m2 / static_cast<double>(size * p.pixels) + p.eps);
        p.mean[n * p.groups + g] = static_cast<float>(group_mean);
        p.rstd[n * p.groups + g] = static_cast<float>(rstd);
        for (int64_t c = first; c < last; ++c) {
            const double exact = shift == nullptr ? group_mean : group_mean - shift[c];
            centre[c] = static_cast<float>(exact);
            scale[c] = static_cast<float>(rstd * p.weight[c]);
            offset[c] = static_cast<float>(p.bias[c] - (exact - centre[c]) * rstd * p.weight[c]);
        }
    }
    spread(centre, p.lanes, channels);
    spread(scale, p.lanes, channels);
    spread(offset, p.lanes, channels);
}

// From the last tile to the first: those that were read last are still in the cache.
template <typename T, Activation A>
void forward_apply(const GroupNormArguments& p, int64_t n, int64_t begin, int64_t end, float* shared, float* scratch) {
    for (int64_t tile = end - 1; tile >= begin; --tile) {
        const Tile at = tile_of(p, n, tile);
        const int64_t size = at.pixels * p.channels;
        const T* const x = static_cast<const T*>(p.x) + at.offset;
        T* const y = static_cast<T*>(p.y) + at.offset;
        for (int64_t i = 0; i < size; i += p.lanes) {
            const int64_t count = size - i < p.lanes ? size - i : p.lanes;
            T* const to = p.stream ? reinterpret_cast<T*>(scratch) : y + i;
            fetch_ahead(x + i - p.tile_pixels * p.channels, p.stream ? nullptr : y + i - p.tile_pixels * p.channels, count);
            activate_row<T, A, true>(x + i, count, lanes_of(p, shared, 0), lanes_of(p, shared, 1), lanes_of(p, shared, 2), to);
            if (p.stream) stream_copy(y + i, to, count * static_cast<int64_t>(sizeof(T)));
        }
    }
    if (p.stream) stream_fence();
}

// The lanes of the gradient's passes, in the scratch of a thread.
GradientLanes gradient_lanes(const GroupNormArguments& p, int64_t n, float* shared, float* scratch) {
    const int64_t channels = p.channels, size = channels / p.groups;
    const auto part = [&](int64_t which) { return scratch + which * p.lanes; };
    const GradientLanes lanes{part(0), part(1), part(2), part(3), part(4), part(5), part(6), lanes_of(p, shared, 0), lanes_of(p, shared, 1)};
    for (int64_t c = 0; c < channels; ++c) {
        const int64_t group = n * p.groups + c / size;
        lanes.centre[c] = p.shift == nullptr ? p.mean[group] : p.mean[group] - p.shift[n * channels + c];
        lanes.rstd[c] = p.rstd[group];
        lanes.weight[c] = p.weight[c];
        lanes.bias[c] = p.bias[c];
    }
    for (int64_t which = 0; which < 4; ++which) spread(part(which), p.lanes, channels);
    return lanes;
}

// Leaves per channel the sums of dz, dz * xhat and xhat, with dz = dy * act'(z), and dz itself where p.keep says so.
template <typename T, Activation A, bool Keep>
void backward_sums(const GroupNormArguments& p, int64_t n, int64_t begin, int64_t end, float* shared, float* scratch) {
    const int64_t channels = p.channels;
    const GradientLanes lanes = gradient_lanes(p, n, shared, scratch);
    for (int64_t tile = begin; tile < end; ++tile) {
        const Tile at = tile_of(p, n, tile);
        const int64_t size = at.pixels * channels;
        const T* const x = static_cast<const T*>(p.x) + at.offset;
        const T* const dy = static_cast<const T*>(p.dy) + at.offset;
        float* const kept = Keep ? kept_of(p, shared) + tile * p.tile_pixels * channels : nullptr;
        clear(lanes.sum, SUMS * p.lanes);
        for (int64_t i = 0; i < size; i += p.lanes) {
            const int64_t count = size - i < p.lanes ? size - i : p.lanes;
            add_gradients<T, A, Keep>(lanes, x + i, dy + i, count, Keep ? kept + i : nullptr);
        }
        float* const out = sums_of(p, shared, tile);
        for (int64_t k = 0; k < SUMS; ++k) fold(lanes.sum + k * p.lanes, p.lanes, channels, out + k * channels);
    }
}

// dx = rstd (weight dz - (A + xhat B) / count), A and B the group's sums of weight dz and weight dz xhat.
void backward_join(const GroupNormArguments& p, int64_t n, float* shared) {
    const int64_t channels = p.channels, size = channels / p.groups;
    double *const sum = p.dbias + n * channels, *const product = p.dweight + n * channels, *const normalised = totals_of(p, shared, 0);
    for (int64_t c = 0; c < channels; ++c) sum[c] = product[c] = normalised[c] = 0.0;
    for (int64_t tile = 0; tile < p.tiles; ++tile) {
        const float* const sums = sums_of(p, shared, tile);
        for (int64_t c = 0; c < channels; ++c) {
            sum[c] += sums[c];
            product[c] += sums[channels + c];
            normalised[c] += sums[2 * channels + c];
        }
    }

    float *const constant = lanes_of(p, shared, 0), *const of_hat = lanes_of(p, shared, 1);
    for (int64_t g = 0; g < p.groups; ++g) {
        const int64_t first = g * size;
        const double rstd = p.rstd[n * p.groups + g], count = static_cast<double>(size * p.pixels);
        // The rounding of the saved mean moves every xhat of the group by what their mean now is.
        double moved = 0.0, group_sum = 0.0, group_product = 0.0;
        for (int64_t c = first; c < first + size; ++c) moved += normalised[c] / count;
        for (int64_t c = first; c < first + size; ++c) {
            normalised[c] -= moved * static_cast<double>(p.pixels);
            product[c] -= moved * sum[c];
            group_sum += p.weight[c] * sum[c];
            group_product += p.weight[c] * product[c];
        }
        for (int64_t c = first; c < first + size; ++c) {
            constant[c] = static_cast<float>(-rstd * (group_sum - moved * group_product) / count);
            of_hat[c] = static_cast<float>(-rstd * group_product / count);
            if (p.dshift == nullptr) continue;  // it is the sum of dx over the pixels
            const double common = (group_sum * static_cast<double>(p.pixels) + group_product * normalised[c]) / count;
            p.dshift[n * channels + c] = static_cast<float>(rstd * (p.weight[c] * sum[c] - common));
        }
    }
    spread(constant, p.lanes, channels);
    spread(of_hat, p.lanes, channels);
}

template <typename T, Activation A, bool Kept>
void backward_apply(const GroupNormArguments& p, int64_t n, int64_t begin, int64_t end, float* shared, float* scratch) {
    const GradientLanes lanes = gradient_lanes(p, n, shared, scratch);
    for (int64_t tile = begin; tile < end; ++tile) {
        const Tile at = tile_of(p, n, tile);
        const int64_t size = at.pixels * p.channels;
        const T* const x = static_cast<const T*>(p.x) + at.offset;
        const T* const dy = static_cast<const T*>(p.dy) + at.offset;
        T* const dx = static_cast<T*>(p.dx) + at.offset;
        for (int64_t i = 0; i < size; i += p.lanes) {
            const int64_t count = size - i < p.lanes ? size - i : p.lanes;
            if (Kept) {
                const float* const dz = kept_of(p, shared) + tile * p.tile_pixels * p.channels + i;
                write_gradients<T, float, Activation::none>(lanes, x + i, dz, count, dx + i);
            } else {
                write_gradients<T, T, A>(lanes, x + i, dy + i, count, dx + i);
            }
        }
    }
}

template <typename T, Activation A>
GroupNormPasses passes(const GroupNormArguments& p, bool backward) {
    if (backward && p.keep) return {backward_sums<T, A, true>, backward_apply<T, A, true>, backward_join};
    if (backward) return {backward_sums<T, A, false>, backward_apply<T, A, false>, backward_join};
    return {forward_sums<T>, forward_apply<T, A>, forward_join};
}

template <typename T>
GroupNormPasses passes_of(const GroupNormArguments& p, bool backward) {
    switch (p.activation) {
        case Activation::gelu: return passes<T, Activation::gelu>(p, backward);
        case Activation::silu: return passes<T, Activation::silu>(p, backward);
        case Activation::relu: return passes<T, Activation::relu>(p, backward);
        default: return passes<T, Activation::none>(p, backward);
    }
}

GroupNormPasses passes_for(const GroupNormArguments& p, bool backward) {
    switch (p.type) {
        case FloatType::float16: return passes_of<half>(p, backward);
        case FloatType::bfloat16: return passes_of<bfloat16>(p, backward);
        default: return passes_of<float>(p, backward);
    }
}

}  // namespace

GroupNormPasses group_norm_forward(const GroupNormArguments& p) { return passes_for(p, false); }
GroupNormPasses group_norm_backward(const GroupNormArguments& p) { return passes_for(p, true); }

}  // namespace DFE_ISA
}  // namespace dfe
