// The stages of `group_norm` at inference (formulas: kernels/group_norm_stages.py). Loops run along rows: the channels of one pixel, or of as many
// as fill vectors where pixels follow each other without a gap; lane l of a row belongs to channel l % channels.
#include "group_norm_stages.h"

#include "rows.h"

namespace dfe {
namespace DFE_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Merge the moments of `more` values into mean and m2, those of `count` values before (Chan, Golub and LeVeque 1979).
template <typename T>
void merge(const float* DFE_RESTRICT more_mean, const float* DFE_RESTRICT more_m2, int64_t channels, double more, double count,
           T* DFE_RESTRICT mean, T* DFE_RESTRICT m2) {
    const T share = static_cast<T>(more / (count + more)), spread = static_cast<T>(count * more / (count + more));
    for (int64_t c = 0; c < channels; ++c) {
        const T d = more_mean[c] - mean[c];
        mean[c] += d * share;
        m2[c] += more_m2[c] + d * d * spread;
    }
}

template <typename T>
void tiles_of(const MomentsArguments& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = p.channels, lanes = p.row_pixels * channels, stride = p.row_pixels * p.pixel_stride;
    float *const sum = scratch, *const centre = sum + lanes, *const squares = centre + lanes;
    float *const m2 = squares + lanes, *const error = m2 + channels;  // of the rounded mean of a chunk
    for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / p.tiles, first = item % p.tiles * p.tile_pixels, last = smaller(first + p.tile_pixels, p.pixels);
        float* const out = p.moments + item * 2 * channels;
        clear(out, 2 * channels);
        for (int64_t pixel = first; pixel < last; pixel += p.chunk_pixels) {
            const T* const x = static_cast<const T*>(p.x) + (n * p.pixels + pixel) * p.pixel_stride;
            const int64_t pixels = smaller(p.chunk_pixels, last - pixel), rows = (pixels + p.row_pixels - 1) / p.row_pixels;
            const int64_t last_lanes = lanes - (rows * p.row_pixels - pixels) * channels;
            const float share = 1.0f / static_cast<float>(pixels);
            add_rows(x, rows, stride, lanes, last_lanes, sum);
            fold(sum, lanes, channels, centre);
            for (int64_t c = 0; c < channels; ++c) centre[c] *= share;
            spread(centre, lanes, channels);
            add_rows_centred(x, rows, stride, lanes, last_lanes, pixels * p.pixel_stride, centre, sum, squares);
            fold(sum, lanes, channels, error);
            fold(squares, lanes, channels, m2);
            for (int64_t c = 0; c < channels; ++c) {
                m2[c] -= error[c] * error[c] * share;
                centre[c] += error[c] * share;
            }
            merge(centre, m2, channels, static_cast<double>(pixels), static_cast<double>(pixel - first), out, out + channels);
        }
    }
}

// Merge the tiles, in their order, of the channels [from, to) of the concatenation that this source holds, which begins at `start`.
// Returns the number of pixels.
double merge_source(const MomentsSource& source, int64_t n, int64_t start, int64_t from, int64_t to, double* mean, double* m2) {
    const int64_t first = from > start ? from : start, last = smaller(to, start + source.channels);
    if (source.moments == nullptr || first >= last) return 0.0;
    double count = 0.0;
    for (int64_t tile = 0; tile < source.tiles; ++tile) {
        const float* const moments = source.moments + (n * source.tiles + tile) * 2 * source.channels + first - start;
        const double more = static_cast<double>(source.counts[tile]);
        merge(moments, moments + source.channels, last - first, more, count, mean + first - from, m2 + first - from);
        count += more;
    }
    return count;
}

template <typename T>
void deliver(T* to, const T* from, int64_t count, bool stream) {
    if (stream) {
        stream_copy(to, from, count * static_cast<int64_t>(sizeof(T)));
    } else {
        memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    }
}

constexpr int64_t AHEAD = 4096;  // values that are fetched before they are needed

// One line of one source; y points at the source's channels in the first result pixel of the line.
template <typename T, Activation A>
void line(const ApplyArguments& p, const ApplySource& source, int64_t n, int64_t row, const float* scale, const float* offset, T* staged, T* y) {
    const int64_t stride = source.pixel_stride, lanes = p.row_pixels * source.channels;
    const bool pool = p.resample == Resample::down;
    const T* x = static_cast<const T*>(source.x) + (n * p.height + (pool ? 2 * row : row)) * p.width * stride;
    if (p.resample == Resample::none) {
        for (int64_t at = 0; at < p.width; at += p.row_pixels) {
            const int64_t count = smaller(lanes, (p.width - at) * source.channels);
            T* const to = y + at * p.y_stride;
            fetch_ahead(x + at * stride + AHEAD, p.stream ? nullptr : to + AHEAD, count);
            activate_row<T, A, false>(x + at * stride, count, nullptr, scale, offset, p.stream ? staged : to);
            if (p.stream) stream_copy(to, staged, count * static_cast<int64_t>(sizeof(T)));
        }
    } else if (pool) {
        for (int64_t at = 0; at < p.width / 2; ++at, x += 2 * stride, y += p.y_stride) {
            fetch_ahead<T>(x + AHEAD, nullptr, 2 * lanes);
            fetch_ahead<T>(x + p.width * stride + AHEAD, p.stream ? nullptr : y + AHEAD / 2, 2 * lanes);
            activate_and_pool<T, A>(x, x + p.width * stride, stride, lanes, scale, offset, p.stream ? staged : y);
            if (p.stream) stream_copy(y, staged, lanes * static_cast<int64_t>(sizeof(T)));
        }
    } else {
        for (int64_t at = 0; at < p.width; ++at, x += stride, y += 2 * p.y_stride) {
            T* const below = y + 2 * p.width * p.y_stride;
            if (!p.stream) fetch_ahead<T>(nullptr, y + AHEAD, 2 * lanes), fetch_ahead<T>(nullptr, below + AHEAD, 2 * lanes);
            activate_row<T, A, false>(x, lanes, nullptr, scale, offset, staged);
            deliver(y, staged, lanes, p.stream);
            deliver(y + p.y_stride, staged, lanes, p.stream);
            deliver(below, staged, lanes, p.stream);
            deliver(below + p.y_stride, staged, lanes, p.stream);
        }
    }
}

template <typename T, Activation A>
void lines_of(const ApplyArguments& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t lanes = p.row_pixels * p.channels;
    const int64_t line_pixels = p.resample == Resample::none ? p.width : p.resample == Resample::down ? p.width / 2 : 4 * p.width;
    float *const scale = scratch, *const offset = scratch + lanes;
    T* const staged = reinterpret_cast<T*>(scratch + 2 * lanes);
    int64_t sample = -1;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / p.lines;
        if (n != sample) {
            for (int64_t c = 0; c < p.channels; ++c) {
                scale[c] = p.scale == nullptr ? 1.0f : p.scale[n * p.channels + c];
                offset[c] = p.offset == nullptr ? 0.0f : p.offset[n * p.channels + c];
            }
            spread(scale, lanes, p.channels);
            spread(offset, lanes, p.channels);
            sample = n;
        }
        T* const y = static_cast<T*>(p.y) + item * line_pixels * p.y_stride;
        line<T, A>(p, p.sources[0], n, item % p.lines, scale, offset, staged, y);
        if (p.sources[1].x == nullptr) continue;
        const int64_t border = p.sources[0].channels;
        line<T, A>(p, p.sources[1], n, item % p.lines, scale + border, offset + border, staged, y + border);
    }
    if (p.stream) stream_fence();
}

template <typename T>
ApplyLines lines_for(Activation activation) {
    switch (activation) {
        case Activation::gelu: return lines_of<T, Activation::gelu>;
        case Activation::silu: return lines_of<T, Activation::silu>;
        case Activation::relu: return lines_of<T, Activation::relu>;
        default: return lines_of<T, Activation::none>;
    }
}

}  // namespace

MomentsTiles moments_tiles(const MomentsArguments& p) {
    switch (p.type) {
        case FloatType::float16: return tiles_of<half>;
        case FloatType::bfloat16: return tiles_of<bfloat16>;
        default: return tiles_of<float>;
    }
}

void merge_parts(const MergeArguments& p, int64_t begin, int64_t end, float* scratch) {
    const int64_t size = p.channels / p.groups;
    double *const mean = reinterpret_cast<double*>(scratch), *const m2 = mean + p.part_groups * size;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / p.parts, first_group = item % p.parts * p.part_groups;
        const int64_t groups = smaller(p.part_groups, p.groups - first_group), first = first_group * size, channels = groups * size;
        for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0.0;
        const double count_1 = merge_source(p.sources[0], n, 0, first, first + channels, mean, m2);
        const double count_2 = merge_source(p.sources[1], n, p.sources[0].channels, first, first + channels, mean, m2);
        const double pixels = count_1 > 0.0 ? count_1 : count_2;
        const float* const shift = p.shift == nullptr ? nullptr : p.shift + n * p.shift_stride + first;
        for (int64_t g = 0; g < groups; ++g) {
            double group_mean = 0.0, group_m2 = 0.0;
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                if (shift != nullptr) mean[c] += shift[c];
                group_mean += mean[c] / static_cast<double>(size);
            }
            for (int64_t c = g * size; c < (g + 1) * size; ++c) group_m2 += m2[c] + pixels * (mean[c] - group_mean) * (mean[c] - group_mean);
            const double rstd = 1.0 / sqrt(group_m2 / (pixels * static_cast<double>(size)) + p.eps);
            for (int64_t c = g * size; c < (g + 1) * size; ++c) {
                const double scale = rstd * p.weight[first + c], centre = shift == nullptr ? group_mean : group_mean - shift[c];
                p.scale[n * p.channels + first + c] = static_cast<float>(scale);
                p.offset[n * p.channels + first + c] = static_cast<float>(p.bias[first + c] - centre * scale);
            }
            if (p.mean == nullptr) continue;
            p.mean[n * p.groups + first_group + g] = static_cast<float>(group_mean);
            p.rstd[n * p.groups + first_group + g] = static_cast<float>(rstd);
        }
    }
}

ApplyLines apply_lines(const ApplyArguments& p) {
    switch (p.type) {
        case FloatType::float16: return lines_for<half>(p.activation);
        case FloatType::bfloat16: return lines_for<bfloat16>(p.activation);
        default: return lines_for<float>(p.activation);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
