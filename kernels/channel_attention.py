"""channel_attention: the two gates of CBAM and the residual sum, which end a DACM block (DF 3.1).

    avg, max = mean and maximum of x over the pixels                         (N, C)
    gate     = sigmoid(W2 gelu(W1 avg) + W2 gelu(W1 max))                    channel gate: no bias, erf GELU; optional
    u        = x gate
    s        = sigmoid(conv7x7(mean over channels of u, maximum over channels of u) + b)     spatial gate; optional
    y        = u s + residual                                                residual: optional

The window of conv7x7 reaches 3 pixels to each side; outside of the image are zeros. At least one gate is given.

Shapes: x, residual, y (N, H, W, C), each may be a channel slice (kernels/slices.py); w1, w2 (R, C), w2 being W2
transposed; spatial_weight (7, 7, 2), its last dimension the mean and the maximum; spatial_bias (1,). `pack_gate` and
`pack_spatial` make these of a module's weights. workspace: `workspace_size(x.shape)` floats, which hold nothing before
or after a call.
Types: x, residual, y share float32, float16 or bfloat16 (the reference also float64); the others are float32 (float64).
Arithmetic is float32, and y is rounded once. Not-a-number spreads as in torch: by the means, which go along with every
maximum.

An image's y depends on that image alone, on neither batch nor threads. On a GPU, images of at most 64 pixels (the
middle of the U-Net at its own size) take one launch, a block for each image; larger ones four: sums and maxima of tiles
of pixels, the channel gate, the two maps, y.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/channel_attention.cu), cpu
(csrc/cpu/channel_attention.cpp).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from dfengine import native
from dfengine.kernels import channel_attention_triton as kernels
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride
from dfengine.kernels.triton_import import triton

ONE_LAUNCH_PIXELS = 64
"""Images of at most so many pixels are one launch on a GPU."""
TILES = 32
"""Tiles of an image, at most."""


def tile_pixels(pixels: int) -> int:
    """Pixels of a tile: a power of two, at least 16, which gives at most TILES tiles."""
    return max(16, 1 << (-(-pixels // TILES) - 1).bit_length())


def workspace_size(shape: tuple[int, ...]) -> int:
    """Floats that an x of this shape needs: sums and maxima of tiles, the channel gate, the two maps."""
    batch, height, width, channels = map(int, shape)  # torch.jit traces sizes as tensors
    pixels = height * width
    tiles = -(-pixels // tile_pixels(pixels)) if pixels else 0
    return batch * (2 * tiles * channels + channels + 2 * pixels)


def _room_sizes(x: torch.Tensor) -> list[int]:
    """Floats of the parts of the workspace: partials (N, T, 2, C), gate (N, C), maps (N, H W, 2)."""
    batch, height, width, channels = x.shape
    gate, maps = batch * channels, 2 * batch * height * width
    return [workspace_size(x.shape) - gate - maps, gate, maps]


def pack_gate(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(w1, w2) of the weights of the shared MLP's two linear layers, (R, C) and (C, R)."""
    return first.contiguous(), second.t().contiguous()


def pack_spatial(weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(spatial_weight, spatial_bias) of a convolution's weight (1, 2, 7, 7) and bias (1,)."""
    return weight[0].permute(1, 2, 0).contiguous(), bias.contiguous()


def reference(
    x: torch.Tensor,
    w1: torch.Tensor | None = None,
    w2: torch.Tensor | None = None,
    spatial_weight: torch.Tensor | None = None,
    spatial_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y of the module's formula in torch; float64 throughout for float64, else float32, rounded once."""
    u = x.to(torch.promote_types(x.dtype, torch.float32))
    if w1 is not None:
        hidden = F.gelu(u.mean(dim=(1, 2)) @ w1.t()) + F.gelu(u.amax(dim=(1, 2)) @ w1.t())
        u = u * (hidden @ w2).sigmoid()[:, None, None, :]
    y = u
    if spatial_weight is not None:
        maps = torch.stack((u.mean(dim=-1), u.amax(dim=-1)), dim=1)
        s = F.conv2d(maps, spatial_weight.permute(2, 0, 1)[None], spatial_bias, padding=3).sigmoid()
        y = u * s.movedim(1, -1)
    return (y if residual is None else y + residual).to(x.dtype)


def channel_attention(
    x: torch.Tensor,
    w1: torch.Tensor | None = None,
    w2: torch.Tensor | None = None,
    spatial_weight: torch.Tensor | None = None,
    spatial_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Return a new y (N, H, W, C), written by the chosen backend; None for w1 and w2 or the spatial ones: no such gate.

    Raises ValueError for arguments no backend accepts, CannotRunError when the forced backend does not serve them.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, H, W, C), got {tuple(x.shape)}")
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    workspace = torch.empty(workspace_size(x.shape), device=x.device)
    channel_attention_into(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, backend=backend)
    return y


def channel_attention_into(
    x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, backend: str | None = None
) -> None:
    """As `channel_attention`, into a given y, every element of which is written, with a given workspace."""
    _check(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace)
    _channel_attention(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, backend or "")


@registry.custom_op("channel_attention", mutates=("y", "workspace"))
def _channel_attention(
    x: torch.Tensor,
    w1: torch.Tensor | None,
    w2: torch.Tensor | None,
    spatial_weight: torch.Tensor | None,
    spatial_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    workspace: torch.Tensor,
    backend: str,
) -> None:
    OP(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, backend=backend)


def _check(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    if x.ndim != 4:
        raise ValueError(f"x: expected (N, H, W, C), got {tuple(x.shape)}")
    if (w1 is None) != (w2 is None):
        raise ValueError("w1 and w2: give both or neither")
    if (spatial_weight is None) != (spatial_bias is None):
        raise ValueError("spatial_weight and spatial_bias: give both or neither")
    if w1 is None and spatial_weight is None:
        raise ValueError("neither gate is given")
    for name, tensor in (("x", x), ("residual", residual), ("y", y)):
        if tensor is None:
            continue
        if tensor.shape != x.shape or tensor.dtype != x.dtype:
            raise ValueError(f"{name}: expected {tuple(x.shape)} {x.dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
        pixel_stride(name, tensor)
    hidden = 0 if w1 is None else w1.shape[0]
    precise, size = torch.promote_types(x.dtype, torch.float32), workspace_size(x.shape)
    if workspace.dtype != torch.float32 or workspace.ndim != 1 or workspace.numel() < size:
        raise ValueError(f"workspace: expected {size} float32, got {tuple(workspace.shape)} {workspace.dtype}")
    small = dict(
        w1=(w1, (hidden, x.shape[3])),
        w2=(w2, (hidden, x.shape[3])),
        spatial_weight=(spatial_weight, (7, 7, 2)),
        spatial_bias=(spatial_bias, (1,)),
    )
    for name, (tensor, shape) in small.items():
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != precise):
            raise ValueError(f"{name}: expected {shape} {precise}, got {tuple(tensor.shape)} {tensor.dtype}")
    others = dict(residual=residual, y=y, workspace=workspace) | {name: tensor for name, (tensor, _) in small.items()}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, x on {x.device}")
        if tensor is not None and name not in ("residual", "y") and not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")


def can_run(x, *args) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if x.dtype not in TYPES:
        raise CannotRunError(f"x: {x.dtype} is none of float32, float16, bfloat16")


def _run_reference(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace) -> None:
    y.copy_(reference(x, w1, w2, spatial_weight, spatial_bias, residual))


def _strides(x, residual, y) -> list[int]:
    """Pixel strides; that of x for a missing residual."""
    channels = x.shape[3]
    tensors = ("x", x), ("residual", x if residual is None else residual), ("y", y)
    return [channels if tensor.is_contiguous() else pixel_stride(name, tensor) for name, tensor in tensors]


MAX_HIDDEN = {"triton": 64, "cuda": 1024}


def _run_triton(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, configuration=None) -> None:
    if x.numel() == 0:
        return
    batch, height, width, channels = x.shape
    pixels, hidden = height * width, 0 if w1 is None else w1.shape[0]
    x_stride, residual_stride, y_stride = _strides(x, residual, y)
    options = dict(configuration or kernels.CONFIGURATIONS[0])
    block_p, small = options.pop("BLOCK_P"), options.pop("sample")
    block_r = triton.next_power_of_2(max(hidden, 1))
    flags = dict(SPATIAL=spatial_weight is not None, RESIDUAL=residual is not None)
    tensors = [x if tensor is None else tensor for tensor in (spatial_weight, spatial_bias, residual)]
    tail = (height, width, x_stride, residual_stride, y_stride, channels)
    if pixels <= ONE_LAUNCH_PIXELS:
        gates = (x, x) if w1 is None else (w1, w2)
        block_p = triton.next_power_of_2(pixels)
        triton_import.launch(kernels.sample_kernel, (batch,))(
            x, *gates, *tensors, y, *tail, HIDDEN=hidden, **flags, BLOCK_P=block_p, BLOCK_R=block_r, **small
        )
        return
    sizes = _room_sizes(x)
    partials, gate, maps = workspace[: sum(sizes)].split(sizes)
    per_tile, blocks = tile_pixels(pixels), triton.cdiv(pixels, block_p)
    tiles, gated = triton.cdiv(pixels, per_tile), w1 is not None
    if gated:
        triton_import.launch(kernels.pool_kernel, (tiles, triton.cdiv(channels, options["BLOCK_C"]), batch))(
            x, partials, pixels, per_tile, x_stride, channels, BLOCK_P=block_p, **options
        )
        triton_import.launch(kernels.gate_kernel, (batch,))(
            partials, w1, w2, gate, pixels, tiles, channels, HIDDEN=hidden, BLOCK_T=TILES, BLOCK_R=block_r, **options
        )
    if flags["SPATIAL"]:
        triton_import.launch(kernels.maps_kernel, (blocks, batch))(
            x, gate, maps, pixels, x_stride, channels, GATED=gated, BLOCK_P=block_p, **options
        )
    triton_import.launch(kernels.apply_kernel, (blocks, batch))(
        x, gate, maps, *tensors, y, *tail, GATED=gated, **flags, BLOCK_P=block_p, **options
    )


def _can_run_gpu(backend: str):
    def can_run_gpu(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace) -> None:
        can_run(x)
        if w1 is not None and w1.shape[0] > MAX_HIDDEN[backend]:
            raise CannotRunError(f"{w1.shape[0]} hidden channels are more than {MAX_HIDDEN[backend]}")
        if x.shape[1] * x.shape[2] * max(_strides(x, residual, y)) >= 2**31 - 2**20:
            raise CannotRunError("more than 2^31 - 2^20 values an image")
        if x.shape[0] > 65535 or x.shape[3] > 4096:
            raise CannotRunError(f"a batch of {x.shape[0]} with {x.shape[3]} channels is beyond 65535 with 4096")

    return can_run_gpu


THREADS, SAMPLE_THREADS = 256, 512
"""Threads of a CUDA block, and of one that serves a whole sample."""


def _values_at_a_time(tensors, strides, channels: int) -> int:
    """Values in 16 bytes where rows of all tensors can be moved so, else 1."""
    size = tensors[0].element_size()
    count = 16 // size
    fits = channels % count == 0 and all(stride % count == 0 for stride in strides)
    return count if fits and all(tensor.data_ptr() % 16 == 0 for tensor in tensors if tensor is not None) else 1


def _run_cuda(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace) -> None:
    if x.numel() == 0:
        return
    batch, height, width, channels = x.shape
    pixels, hidden = height * width, 0 if w1 is None else w1.shape[0]
    strides = _strides(x, residual, y)
    count = _values_at_a_time((x, residual, y), strides, channels)
    name = str(x.dtype).removeprefix("torch.")
    spatial, rows = (spatial_weight, spatial_bias), [np.int64(stride) for stride in strides]

    def launch(kernel, grid, threads, arguments, floats=0):
        cuda_launch.launch(
            "channel_attention", f"channel_attention_{kernel}", grid, (threads, 1, 1), arguments, shared=4 * floats
        )

    def columns(threads: int) -> int:
        return min(threads, 1 << (-(-channels // count) - 1).bit_length())

    if pixels <= ONE_LAUNCH_PIXELS:
        sizes = (*map(np.int32, (height, width, channels, hidden)), *rows)
        floats = 2 * count * SAMPLE_THREADS + 3 * channels + hidden + 2 * pixels
        arguments = (x, w1, w2, *spatial, residual, y, *sizes, np.int32(columns(SAMPLE_THREADS)), np.int32(count))
        launch(f"sample_{name}", (batch, 1, 1), SAMPLE_THREADS, arguments, floats)
        return
    sizes = _room_sizes(x)
    partials, gate, maps = workspace[: sum(sizes)].split(sizes)
    per_tile = tile_pixels(pixels)
    tiles, blocks = -(-pixels // per_tile), -(-pixels // (THREADS // 32))
    if w1 is None:
        gate = None
    else:
        wide = columns(THREADS)
        arguments = (
            x,
            partials,
            *map(np.int32, (pixels, per_tile, channels)),
            rows[0],
            np.int32(wide),
            np.int32(count),
        )
        grid = (tiles, -(-channels // (wide * count)), batch)
        launch(f"pool_{name}", grid, THREADS, arguments, 2 * count * THREADS)
        sizes = map(np.int32, (pixels, tiles, channels, hidden))
        launch("gate", (batch, 1, 1), THREADS, (partials, w1, w2, gate, *sizes), 2 * channels + hidden)
    if spatial_weight is not None:
        arguments = (x, gate, maps, np.int32(pixels), np.int32(channels), rows[0], np.int32(count))
        launch(f"maps_{name}", (blocks, batch, 1), THREADS, arguments)
    sizes = (*map(np.int32, (height, width, channels)), *rows, np.int32(count))
    launch(f"apply_{name}", (blocks, batch, 1), THREADS, (x, gate, maps, *spatial, residual, y, *sizes))


STREAM_BYTES = 24 * 2**20
"""Outputs larger than this bypass the caches; smaller ones are likely read from them by the next op."""


def _run_cpu(x, w1, w2, spatial_weight, spatial_bias, residual, y, workspace, level="") -> None:
    batch, _, _, channels = shape = tuple(x.shape)
    if 0 in shape:
        return
    tensors = (residual, y, w1, w2, spatial_weight, spatial_bias)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    pooled = workspace.data_ptr()
    native.module.channel_attention(
        shape, TYPES[x.dtype], x.data_ptr(), *addresses[:2], _strides(x, residual, y), 0 if w1 is None else w1.shape[0],
        *addresses[2:], pooled, pooled + 4 * 2 * batch * channels, torch.get_num_threads(), y.nbytes > STREAM_BYTES,
        level,
    )  # fmt: skip


OP = Op("channel_attention")
OP.register(
    "triton", _run_triton, triton_import.available, _can_run_gpu("triton"), configurations=kernels.CONFIGURATIONS
)
OP.register("cuda", _run_cuda, cuda_launch.available, _can_run_gpu("cuda"))
OP.register("cpu", _run_cpu, registry.cpu_available("channel_attention"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
