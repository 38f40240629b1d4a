"""conv2d on tensor cores: the table of tiles, packing of the weight and the launcher of csrc/cuda/conv2d.cu and
conv2d_wgmma.cu (formula: kernels/conv2d.py).

A thread block makes PIXELS pixels, as rows of a power of two of them, times a block of outputs; input channels come in
chunks, each source's last one filled up with zeros. float16 and bfloat16, devices from sm_80 on; with `wgmma`, which
only sm_90a has, where a measurement chose it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfengine.kernels import cuda_launch
from dfengine.kernels.conv2d import ACTIVATIONS, OP, RESAMPLES, can_run
from dfengine.kernels.conv_weight import ConvWeight, whole
from dfengine.kernels.registry import CannotRunError
from dfengine.kernels.slices import pixel_stride

NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
SHARED_BYTES = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
"""Shared memory that one thread block may have, by compute capability; others are taken to have the least."""
MOST_OF_FEW_OUTPUTS = 32
"""Beyond it, tiles of 16 outputs are not taken by rule: each of many blocks would activate the whole input again."""


@dataclass(frozen=True)
class Tile:
    """One compiled tile (csrc/common/conv2d_tile.h: Conv2dTile).

    pixels, outputs: of a thread block; channels: of a chunk; warps: along pixels and outputs; stages: of the ring of
    weights; vectors: runs of 8 channels that a thread loads for a chunk, at most; blocks: that are meant to share a
    multiprocessor.
    """

    name: str
    pixels: int
    outputs: int
    channels: int
    warps: tuple[int, int]
    stages: int
    vectors: int
    blocks: int
    warpgroups: bool = False
    """Whether warps multiply by fours, by wgmma (csrc/cuda/conv2d_wgmma.cu)."""

    @property
    def op(self) -> str:
        """The file of csrc/cuda with its kernels."""
        return "conv2d_wgmma" if self.warpgroups else "conv2d"

    @property
    def threads(self) -> int:
        return 32 * self.warps[0] * self.warps[1]

    @property
    def products_of_a_read(self) -> float:
        """Products of mma.m16n8k16 for each read of 512 bytes of shared memory by a warp."""
        fragments, pairs = self.pixels // self.warps[0] // 16, self.outputs // self.warps[1] // 16
        return 2 * fragments * pairs / (fragments + pairs)

    def padded(self, channels: Sequence[int]) -> int:
        """Channels with those that fill the last chunk of each source."""
        return sum(-(-count // self.channels) * self.channels for count in channels)

    def shared_bytes(self, halo_pixels: int) -> int:
        """Dynamic shared memory of a block: weights, two buffers of input, a chunk's scale and offset, and where each
        pixel is read; or what the epilogue needs in their place."""
        weights = self.stages * 2 * self.channels * self.outputs
        staging = 16 * (4 * self.outputs // self.warps[1] + 32) * self.threads // 32
        epilogue = staging + self.pixels // 16 * self.outputs * 8
        return max(weights + halo_pixels * (2 * (2 * self.channels + 16) + 4) + 8 * self.channels, epilogue)


TILES = (
    Tile("128x128", 128, 128, 32, (2, 4), 2, 3, 2),
    Tile("128x128w4", 128, 128, 32, (2, 2), 3, 6, 2),
    Tile("256x128", 256, 128, 32, (4, 2), 3, 7, 1),
    Tile("128x64", 128, 64, 32, (4, 2), 4, 4, 2),
    Tile("128x64x16", 128, 64, 16, (4, 2), 4, 2, 2),
    Tile("64x64", 64, 64, 32, (2, 2), 4, 5, 4),
    Tile("128x16", 128, 16, 32, (8, 1), 4, 4, 2),
)
"""In order of preference, not yet timed on a device: 256x128 stands behind the others of 128 outputs, as its epilogue
has no second block on the multiprocessor to hide behind."""
WGMMA_TILES = (
    Tile("wgmma_128x256", 128, 256, 64, (8, 1), 4, 8, 1, True),
    Tile("wgmma_256x128", 256, 128, 64, (8, 1), 4, 13, 1, True),
    Tile("wgmma_128x128", 128, 128, 64, (4, 1), 3, 15, 2, True),
    Tile("wgmma_128x64", 128, 64, 64, (8, 1), 4, 8, 2, True),
    Tile("wgmma_64x128", 64, 128, 64, (4, 1), 3, 9, 2, True),
)
"""Never taken by rule: they were not run on a device yet. Tactics try them where the device has wgmma."""
WGMMA_DEVICES = ((9, 0),)
FAST_TENSOR_CORES = ((8, 0), (9, 0), (10, 0))
"""Devices that make more than two products of mma.m16n8k16 in the time of one read of 512 bytes of shared memory: there
the tiles that read less for a product come first."""


@dataclass(frozen=True)
class Placement:
    """A tile as it is laid on images: rows of `width` pixels."""

    tile: Tile
    width: int

    @property
    def height(self) -> int:
        return self.tile.pixels // self.width

    def halo_pixels(self, reach: int) -> int:
        """Pixels read for a tile; reach: how far the taps go to each side."""
        return (self.width + 2 * reach) * (self.height + 2 * reach)

    def grid(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """Thread blocks for a y of `shape` (N, H, W, O): of outputs, of pixels, samples."""
        batch, height, width, outputs = shape
        return -(-outputs // self.tile.outputs), -(-height // self.height) * -(-width // self.width), batch

    def blocks(self, shape: tuple[int, int, int, int]) -> int:
        return math.prod(self.grid(shape))

    def fits(self, reach: int, capability: tuple[int, int]) -> bool:
        """Whether the device has the instructions, registers hold a thread's part of the halo, and shared memory the
        tile."""
        if self.tile.warpgroups and capability not in WGMMA_DEVICES:
            return False
        halo = self.halo_pixels(reach)
        runs = -(-halo // 8) * self.tile.channels  # 8 pixels of a group of 8 channels stay together
        limit = SHARED_BYTES.get(capability, min(SHARED_BYTES.values()))
        return runs <= self.tile.vectors * self.tile.threads and self.tile.shared_bytes(halo) <= limit

    def moment_run(self, size: tuple[int, int], tile_pixels: int) -> int:
        """Pixels of the tile, in its order, that make a tile of the moments of an image (H, W); 0 where none does.

        Tiles of the moments are runs of pixels of the image. A run must lie in one tile: be a part of its row where
        the image is divided into whole such rows, or whole rows where these are the image's (or it has but one).
        """
        height, width = size
        pixels = self.tile.pixels
        if tile_pixels >= height * width and self.blocks((1, height, width, 1)) == 1:
            return pixels
        if tile_pixels % 16 or pixels % tile_pixels:
            return 0
        if self.width == width or (height == 1 and self.height == 1):
            return tile_pixels
        return tile_pixels if width % self.width == 0 and self.width % tile_pixels == 0 else 0


def shapes_of(tile: Tile, reach: int, capability: tuple[int, int]) -> list[Placement]:
    """Those in which the tile fits the device."""
    places = (Placement(tile, 1 << shift) for shift in range(3, tile.pixels.bit_length()))
    return [place for place in places if place.fits(reach, capability)]


def placements(
    size: tuple[int, int],
    reach: int,
    capability: tuple[int, int],
    tile_pixels: int = 0,
    tiles: Sequence[Tile] = TILES,
) -> Iterator[Placement]:
    """For each of `tiles` that can serve images of `size` (H, W), the shape that covers them with least to compute,
    then with least to read. tile_pixels: of the moments, 0 for none."""
    fast = capability in FAST_TENSOR_CORES
    for tile in sorted(tiles, key=lambda tile: -tile.outputs * fast * tile.products_of_a_read):
        legal = [p for p in shapes_of(tile, reach, capability) if not tile_pixels or p.moment_run(size, tile_pixels)]
        if legal:
            yield min(legal, key=lambda p: (p.blocks((1, *size, 1)), p.halo_pixels(reach), -p.width))


@functools.lru_cache(maxsize=4096)
def placement_for(
    shape: tuple[int, int, int, int],
    channels: tuple[int, ...],
    reach: int,
    tile_pixels: int = 0,
    capability: tuple[int, int] = (8, 9),
    multiprocessors: int = 128,
) -> Placement:
    """The tile for a y of `shape` (N, H, W, O), by rule: of those that compute less than twice what the best of them
    does, the first that makes a block for each multiprocessor, else the one that makes most.

    channels: of each source; reach: of the taps. Raises CannotRunError where none is legal.
    """
    legal = list(placements(shape[1:3], reach, capability, tile_pixels))
    if not legal:
        what = f"tiles of {tile_pixels} pixels for the moments" if tile_pixels else f"taps {reach} pixels away"
        raise CannotRunError(f"no tile of the kernel serves {shape[1]} x {shape[2]} pixels with {what}")
    if shape[3] > MOST_OF_FEW_OUTPUTS:
        legal = [place for place in legal if place.tile.outputs > 16] or legal

    def computed(place: Placement) -> int:
        """Products of the tensor cores, with what fills tiles and chunks."""
        return place.blocks(shape) * place.tile.pixels * place.tile.outputs * place.tile.padded(channels)

    least = min(map(computed, legal))
    fitting = [p for p in legal if computed(p) < 2 * least]
    enough = (p for p in fitting if p.blocks(shape) >= multiprocessors)
    return next(enough, max(fitting, key=lambda p: p.blocks(shape)))


def moment_tile(
    shape: tuple[int, int, int, int],
    channels: tuple[int, ...],
    reach: int,
    placement: Placement | None = None,
    capability: tuple[int, int] = (8, 9),
    multiprocessors: int = 128,
) -> int:
    """The largest tile_pixels of the moments that `placement` can leave, or else the tile that is best without moments,
    in whatever shape; 0 for none. Where one tile holds the whole image that is the number of its pixels."""
    places = [placement]
    if placement is None:
        best = placement_for(shape, channels, reach, 0, capability, multiprocessors)
        places = shapes_of(best.tile, reach, capability)
    runs = [shape[1] * shape[2], *(places[0].tile.pixels >> shift for shift in range(5))]
    return next((run for run in runs if any(place.moment_run(shape[1:3], run) for place in places)), 0)


def moment_tile_on(device: torch.device, shape, channels: tuple[int, ...], reach: int) -> int:
    """`moment_tile` without a placement, on a device."""
    if reach == 0:
        shape = (shape[0], 1, shape[1] * shape[2], shape[3])
    return moment_tile(shape, channels, reach, None, capability_of(device), multiprocessors_of(device))


def pack(packed: Tensor, channels: Sequence[int], chunk: int, warpgroups: bool = False) -> Tensor:
    """The weight (K, K, C, O) in the order in which the kernels read it, zeros where there is no channel or output.

    (chunks, taps, chunk / 16, ceil(O / 16), 32, 8), the last two being 16 channels of 16 outputs: for mma.m16n8k16 for
    each lane the two registers of one fragment of 8 outputs, then those of the next, where register b of lane l holds
    the channels 8 b + 2 (l % 4) + (0, 1) of output l / 4; for wgmma (warpgroups) core matrices of 8 outputs by 8
    channels, K-major: outputs 0 to 7 with the first 8 channels, then with the others, then outputs 8 to 15.
    """
    taps, outputs = packed.shape[0] * packed.shape[1], packed.shape[3]
    parts = packed.reshape(taps, -1, outputs).split(list(channels), dim=1)
    parts = [F.pad(part, (0, -outputs % 16, 0, -part.shape[1] % chunk)) for part in parts]
    weight = torch.cat(parts, dim=1).reshape(taps, -1, chunk // 16, 2, 4, 2, -(-outputs // 16), 2, 8)
    # taps, chunks, steps, register, quad, half, fragments of 16, fragment of 8, output
    order = (7, 3, 8, 4, 5) if warpgroups else (8, 4, 7, 3, 5)
    weight = weight.permute(1, 0, 2, 6, *order).reshape(-1, taps, chunk // 16, -(-outputs // 16), 32, 8)
    return weight.contiguous()


def prepacked(weight: ConvWeight, channels: Sequence[int], tile: Tile) -> Tensor:
    """`pack` of the weight for a tile, made once."""
    key = f"{'wgmma' if tile.warpgroups else 'cuda'} {tile.channels} {'+'.join(map(str, channels))}"
    if key not in weight.prepacked:
        weight.prepacked[key] = pack(weight.taps(), channels, tile.channels, tile.warpgroups)
    return weight.prepacked[key]


def capability_of(device: torch.device) -> tuple[int, int]:
    """That of the device, without a number of the current one; on the host, where only the tests run this, that of an
    RTX 4090."""
    return _capability(cuda_launch.index_of(device)) if device.type == "cuda" else (8, 9)


def multiprocessors_of(device: torch.device) -> int:
    """Of the device, as `capability_of`."""
    return _multiprocessors(cuda_launch.index_of(device)) if device.type == "cuda" else 128


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chosen(device, shape, channels, reach, tile_pixels) -> Placement:
    return placement_for(shape, channels, reach, tile_pixels, capability_of(device), multiprocessors_of(device))


def _kernel(dtype: torch.dtype, tile: Tile) -> str:
    return f"conv2d_{NAMES[dtype]}_{tile.name}"


def tiles_on(device: torch.device, dtype: torch.dtype) -> tuple[Tile, ...]:
    """TILES, and those of WGMMA_TILES that run there."""
    if capability_of(device) not in WGMMA_DEVICES:
        return TILES
    return TILES + tuple(tile for tile in WGMMA_TILES if not cuda_launch.refusal(_kernel(dtype, tile), device))


def geometry(weight, resample, residual, residual_resample, y) -> tuple[int, tuple[int, int, int, int]]:
    """(reach of the taps, shape of y as the kernel sees it: without taps beside a pixel, an image is one row)."""
    batch, height, width, outputs = y.shape
    reach = weight.dilation * (weight.kernel[0] // 2)
    if reach == 0 and resample == "none" and (residual is None or residual_resample == "none"):
        height, width = 1, height * width
    return reach, (batch, height, width, outputs)


def _run_cuda(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels, placement=None, half_sums=False, tile="", width=0,
) -> None:  # fmt: skip
    """placement: instead of the one chosen, or tile and width, the name of its tile and the width of its rows.
    half_sums: sum the products of each chunk and tap in float16, in the tile 128x64 only. Were each step of 16 products
    rounded once, as on the host, the error of a sum would be at most 2^-10 of the sum of its products' magnitudes, plus
    2^-24 for each chunk and tap; a tensor core may round more often and lose more, how much is not measured."""
    channels = tuple(t.shape[3] for t in (x, x2) if t is not None)
    reach, shape = geometry(weight, resample, residual, residual_resample, y)
    wanted = tile_pixels if moments is not None else 0
    if tile:
        placement = Placement(next(known for known in TILES + WGMMA_TILES if known.name == tile), width)
    place = placement or _chosen(x.device, shape, channels, reach, wanted)
    if not place.fits(reach, capability_of(x.device)) or place.width & (place.width - 1) or place.width < 8:
        raise CannotRunError(f"the tile {place.tile.name} in rows of {place.width} does not fit this device")
    if max(place.grid(shape)[1:]) > 65535:
        raise CannotRunError("more than 65535 samples, or tiles of a sample")
    run = place.moment_run(shape[1:3], wanted) if wanted else 0
    if wanted and not run:
        raise CannotRunError(f"the tile {place.tile.name} does not leave moments of {tile_pixels} pixels")
    if half_sums and (x.dtype != torch.float16 or place.tile.name != "128x64"):
        raise CannotRunError("float16 sums are for float16 in the tile 128x64")
    pitches = [0 if t is None else pixel_stride("", t) for t in (x, x2, residual, y)]
    aligned = sum(
        1 << i
        for i, t in enumerate((x, x2, residual, y))
        if t is not None and pitches[i] % 8 == 0 and t.data_ptr() % 16 == 0
    )
    in_size = (1, shape[2]) if shape[1:3] != tuple(y.shape[1:3]) else tuple(x.shape[1:3])
    numbers = (
        *shape[1:3], *in_size, *pitches, 0 if bias is None or bias.ndim == 1 else shape[3],
        channels[0], sum(channels[1:]), shape[3], weight.packed.shape[0], weight.dilation,
        RESAMPLES[resample], ACTIVATIONS[prologue_act], RESAMPLES[residual_resample], ACTIVATIONS[act],
        place.width.bit_length() - 1, run, aligned,
    )  # fmt: skip
    kernel = "conv2d_half_sums_128x64" if half_sums else _kernel(x.dtype, place.tile)
    cuda_launch.launch(
        place.tile.op, kernel, place.grid(shape), (place.tile.threads, 1, 1),
        (
            x, x2, prepacked(weight, channels, place.tile), bias, scale, offset, residual, y, moments,
            *map(np.int32, numbers),
        ),
        shared=place.tile.shared_bytes(place.halo_pixels(reach)),
    )  # fmt: skip


def _can_run_cuda(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels,
) -> None:  # fmt: skip
    can_run(x, x2, weight)
    whole(weight)
    weight.taps()
    if x.dtype not in NAMES:
        raise CannotRunError(f"x: {x.dtype} is neither float16 nor bfloat16")
    capability = capability_of(x.device)
    if capability < (8, 0):
        raise CannotRunError(f"compute capability {capability[0]}.{capability[1]} is below 8.0")
    channels = tuple(t.shape[3] for t in (x, x2) if t is not None)
    reach, shape = geometry(weight, resample, residual, residual_resample, y)
    if max(t.shape[1] * t.shape[2] for t in (x, residual, y) if t is not None) >= 2**31 - 2**20:
        raise CannotRunError("an image of more than 2^31 - 2^20 pixels")
    place = _chosen(x.device, shape, channels, reach, tile_pixels if moments is not None else 0)
    if max(place.grid(shape)) > 65535:
        raise CannotRunError("more than 65535 samples, or tiles of a sample")
    if x.is_cuda and (reason := cuda_launch.refusal(_kernel(x.dtype, place.tile), x.device)):
        raise CannotRunError(reason)


def _configurations(
    x, x2, weight, bias, scale, offset, prologue_act, resample, residual, residual_resample, act, y, moments,
    tile_pixels,
) -> list[dict]:  # fmt: skip
    """Every legal tile, in its best shape."""
    reach, shape = geometry(weight, resample, residual, residual_resample, y)
    wanted = tile_pixels if moments is not None else 0
    found = placements(shape[1:3], reach, capability_of(x.device), wanted, tiles_on(x.device, x.dtype))
    legal = [place for place in found if max(place.grid(shape)[1:]) <= 65535]
    return [{"tile": place.tile.name, "width": place.width} for place in legal]


OP.register("cuda", _run_cuda, cuda_launch.available, _can_run_cuda, configurations=_configurations)
