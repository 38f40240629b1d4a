// The op `ingest` (formula: kernels/ingest.py), one tile of pixels at a time: the noise of a tile is drawn once and serves every image.
#include "ingest.h"

#include "../common/convert.h"
#include "isa.h"
#include "noise.h"

namespace dfe {
namespace DFE_ISA {
namespace {

template <int Scales, typename Pixel, typename Output>
void noised(const IngestArguments& p, const Pixel* DFE_RESTRICT pixels, int64_t count, const float* DFE_RESTRICT noise_0,
            const float* DFE_RESTRICT noise_1, Output* DFE_RESTRICT x_0, Output* DFE_RESTRICT x_t0, Output* DFE_RESTRICT x_t1) {
    const float gain = p.gain, offset = p.offset, a0 = p.a[0], a1 = p.a[1], b0 = p.b[0], b1 = p.b[1];
    for (int64_t i = 0; i < count; ++i) {
        const float x = gain * static_cast<float>(pixels[i]) + offset;
        store(x_0 + i, x);
        store(x_t0 + i, a0 * x + b0 * noise_0[i]);
        if (Scales == 2) store(x_t1 + i, a1 * x + b1 * noise_1[i]);
    }
}

template <typename Pixel, typename Output>
void tiles(const IngestArguments& p, bool stream, int64_t begin, int64_t end, float* scratch) {
    const int64_t channels = p.channels, capacity = p.tile_pixels * channels;
    float* const drawn_0 = scratch;
    float* const drawn_1 = drawn_0 + capacity;
    Output* staged[3];
    for (int k = 0; k < 3; ++k) staged[k] = reinterpret_cast<Output*>(drawn_1 + (k + 1) * capacity);
    Pixel* const gathered = reinterpret_cast<Pixel*>(drawn_1 + 4 * capacity);
    float* const rows = drawn_1 + 5 * capacity;

    const int64_t image_size = p.height * p.width * channels;
    const bool packed = p.stride_c == 1 && p.stride_x == channels;
    Output* const x_0 = static_cast<Output*>(p.x_0);
    Output* const x_t = static_cast<Output*>(p.x_t);

    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile / p.tiles_per_row, column = tile % p.tiles_per_row * p.tile_pixels;
        const int64_t left = p.row_length - column;
        const int64_t count = left < p.tile_pixels ? left : p.tile_pixels;
        const int64_t first = row * p.row_length + column, size = count * channels;
        const float *noise_0 = drawn_0, *noise_1 = drawn_1;
        if (p.noise != nullptr) {
            noise_0 = p.noise + first * channels;
            noise_1 = noise_0 + image_size;
        } else {
            draw_noise(channels, 2 * p.step, p.draw, p.key[0], p.key[1], first, count, drawn_0, rows);
            if (p.scales == 2) draw_noise(channels, 2 * p.step + 1, p.draw, p.key[0], p.key[1], first, count, drawn_1, rows);
        }

        for (int64_t n = 0; n < p.batch; ++n) {
            const Pixel* pixels = static_cast<const Pixel*>(p.images) + n * p.stride_n + row * p.stride_y + column * p.stride_x;
            if (!packed) {
                for (int64_t c = 0; c < channels; ++c) {
                    const Pixel* plane = pixels + c * p.stride_c;
                    for (int64_t i = 0; i < count; ++i) gathered[i * channels + c] = plane[i * p.stride_x];
                }
                pixels = gathered;
            }
            Output* out[3];
            out[0] = x_0 + n * image_size + first * channels;
            out[1] = x_t + n * image_size + first * channels;
            out[2] = out[1] + p.batch * image_size;
            Output* const* to = stream ? staged : out;
            if (p.scales == 2) {
                noised<2>(p, pixels, size, noise_0, noise_1, to[0], to[1], to[2]);
            } else {
                noised<1>(p, pixels, size, noise_0, noise_0, to[0], to[1], to[1]);
            }
            if (stream) {
                for (int k = 0; k <= p.scales; ++k) stream_copy(out[k], staged[k], size * static_cast<int64_t>(sizeof(Output)));
            }
        }
    }
    if (stream) stream_fence();
}

template <typename Pixel>
void tiles_of(const IngestArguments& p, bool stream, int64_t begin, int64_t end, float* scratch) {
    switch (p.output_type) {
        case FloatType::float32: return tiles<Pixel, float>(p, stream, begin, end, scratch);
        case FloatType::float16: return tiles<Pixel, half>(p, stream, begin, end, scratch);
        case FloatType::bfloat16: return tiles<Pixel, bfloat16>(p, stream, begin, end, scratch);
    }
}

}  // namespace

void ingest_tiles(const IngestArguments& p, bool stream, int64_t begin, int64_t end, float* scratch) {
    switch (p.pixel_type) {
        case PixelType::uint8: return tiles_of<uint8_t>(p, stream, begin, end, scratch);
        case PixelType::uint16: return tiles_of<uint16_t>(p, stream, begin, end, scratch);
        case PixelType::float32: return tiles_of<float>(p, stream, begin, end, scratch);
    }
}

}  // namespace DFE_ISA
}  // namespace dfe
