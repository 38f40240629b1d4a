"""score: logits of the segmentation net become anomaly maps, image scores and labels, with nothing left to the host.

    anomaly_map = mean over the maps of sigmoid(logits)
    pred_score  = mean of the k largest pixels of the map, at most 1
    pred_label  = pred_score > threshold

Shapes: logits (M, N, H, W) or (M, N, H, W, 1), possibly one channel of wider pixels (kernels/slices.py): M maps of each
image, one for each draw of noise or scale; anomaly_map (N, H, W), pred_score and pred_label (N,), contiguous;
threshold (1,), see `threshold_tensor`; workspace (N, 2 groups) as `new_workspace` makes it, or None.
Types: logits float32, float16 or bfloat16 (the reference also float64); anomaly_map, pred_score float32 (float64);
threshold float32; pred_label bool; workspace int32. Arithmetic is float32.

The k-th largest pixel is exact. The bits of the map's floats, all in [0, 1], are integers in the same order; their
digits are found from the highest by counting (radix select). Only few pixels are counted: the map leaves the largest
key of each group of 128 pixels in the workspace, the k-th largest of those is at most that of the pixels, and so only
groups that reach it matter. The pixels above the k-th largest are added in a fixed order, and it for the rest, so that
two runs and any batch agree bit for bit. A map that holds a NaN has the score NaN and the label False.
Backends: reference (any device), triton (GPU; CPU through the interpreter), cuda (csrc/cuda/score.cu), cpu
(csrc/cpu/score.cpp).
"""

from __future__ import annotations

import numpy as np
import torch

from dfengine import native
from dfengine.kernels import cuda_launch, registry, triton_import
from dfengine.kernels.registry import CannotRunError, Op
from dfengine.kernels.slices import TYPES, pixel_stride
from dfengine.kernels.triton_import import tl, triton

GROUP = 128
"""Pixels of a group; SCORE_GROUP of csrc/common/score.h."""


def threshold_tensor(threshold: float | None, device: torch.device | str = "cpu") -> torch.Tensor:
    """(1,) float32 that decides about every float32 score as the float64 `threshold` does; None is never exceeded."""
    exact = np.float64(np.inf if threshold is None else threshold)
    below = np.float32(exact)
    if below > exact:
        below = np.nextafter(below, np.float32(-np.inf))
    return torch.tensor([below], dtype=torch.float32, device=device)


def workspace_shape(batch: int, height: int, width: int) -> tuple[int, int]:
    """Of what a call needs besides its outputs."""
    return batch, 2 * -(-height * width // GROUP)


def new_workspace(batch: int, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """What a call needs besides its outputs; its contents mean nothing before or after."""
    return torch.empty(workspace_shape(batch, height, width), dtype=torch.int32, device=device)


def reference(logits: torch.Tensor, threshold: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(anomaly_map, pred_score, pred_label) of the module's formula in torch, in float64 for float64, else float32."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    anomaly_map = _pixels(logits)[..., 0].to(compute).sigmoid().mean(dim=0)
    pred_score = anomaly_map.flatten(1).topk(k, dim=1).values.mean(dim=1).clamp(max=1)
    return anomaly_map, pred_score, pred_score > threshold


def score(
    logits: torch.Tensor, threshold: float | torch.Tensor | None, k: int, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return new tensors (anomaly_map, pred_score, pred_label), written by the chosen backend.

    threshold: a tensor as above, or a number or None as for `threshold_tensor`. Raises ValueError for arguments no
    backend accepts, CannotRunError when the forced backend does not serve them.
    """
    if not isinstance(threshold, torch.Tensor):
        threshold = threshold_tensor(threshold, logits.device)
    _check(logits, threshold, k)
    return _score(logits, threshold, k, backend or "")


def score_into(
    logits, threshold, k, anomaly_map, pred_score, pred_label, workspace=None, backend: str | None = None
) -> None:
    """As `score` for a tensor `threshold`, into given outputs, every element of which is written."""
    _check(logits, threshold, k)
    _check_outputs(logits, anomaly_map, pred_score, pred_label, workspace)
    OP(logits, threshold, k, anomaly_map, pred_score, pred_label, workspace, backend=backend)


@registry.custom_op("score", fake=lambda logits, *_: _new_outputs(logits))
def _score(
    logits: torch.Tensor, threshold: torch.Tensor, k: int, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = _new_outputs(logits)
    OP(logits, threshold, k, *outputs, backend=backend)
    return outputs


def _new_outputs(logits) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    compute, shape = torch.promote_types(logits.dtype, torch.float32), logits.shape[1:4]
    return (
        logits.new_empty(shape, dtype=compute),
        logits.new_empty(shape[:1], dtype=compute),
        logits.new_empty(shape[:1], dtype=torch.bool),
    )


def _pixels(logits: torch.Tensor) -> torch.Tensor:
    """(M, N, H, W, 1)."""
    return logits if logits.ndim == 5 else logits[..., None]


def _check(logits, threshold, k) -> None:
    """Raise ValueError for arguments that are wrong whatever the backend."""
    if logits.ndim not in (4, 5) or (logits.ndim == 5 and logits.shape[4] != 1):
        raise ValueError(f"logits: expected (M, N, H, W) or (M, N, H, W, 1), got {tuple(logits.shape)}")
    maps, _, height, width = logits.shape[:4]
    if maps < 1 or not 1 <= k <= height * width < 2**31:
        raise ValueError(
            f"k = {k} of {height * width} pixels in {maps} maps: expected 1 to {height * width}, and a map"
        )
    pixel_stride("logits", _pixels(logits))
    if tuple(threshold.shape) != (1,) or threshold.dtype != torch.float32 or threshold.device != logits.device:
        got = f"{tuple(threshold.shape)} {threshold.dtype} on {threshold.device}"
        raise ValueError(f"threshold: expected (1,) torch.float32 on {logits.device}, got {got}")


def _check_outputs(logits, anomaly_map, pred_score, pred_label, workspace) -> None:
    _, batch, height, width = logits.shape[:4]
    precise = torch.promote_types(logits.dtype, torch.float32)
    wanted = dict(
        anomaly_map=(anomaly_map, (batch, height, width), precise),
        pred_score=(pred_score, (batch,), precise),
        pred_label=(pred_label, (batch,), torch.bool),
        workspace=(workspace, workspace_shape(batch, height, width), torch.int32),
    )
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None and name == "workspace":
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != logits.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: expected {shape} {dtype} on {logits.device}, got {got}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: not contiguous")


def can_run(logits, *args) -> None:
    """Raise CannotRunError with the reason where the compiled backends do not serve these (checked) arguments."""
    if logits.dtype not in TYPES:
        raise CannotRunError(f"logits: {logits.dtype} is none of float32, float16, bfloat16")


def _run_reference(logits, threshold, k, anomaly_map, pred_score, pred_label, workspace=None) -> None:
    results = reference(logits, threshold, k)
    for output, result in zip((anomaly_map, pred_score, pred_label), results, strict=True):
        output.copy_(result)


def _layout(logits, workspace) -> tuple[list[int], int, torch.Tensor]:
    """([M, N, H * W, groups], pixel stride, the workspace, made where it is None)."""
    maps, batch, height, width = logits.shape[:4]
    if workspace is None:
        workspace = new_workspace(batch, height, width, logits.device)
    return [maps, batch, height * width, workspace.shape[1] // 2], pixel_stride("logits", _pixels(logits)), workspace


@triton.jit(do_not_specialize=["batch"])
def score_map_kernel(
    logits, anomaly_map, workspace, batch, pixels, groups, stride,
    MAPS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Program (i, n): GROUPS groups of image n, their map and their largest keys."""
    n = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    pixel = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = pixel < pixels
    total = tl.zeros((GROUPS, GROUP), tl.float32)
    for m in tl.static_range(MAPS):
        at = ((m * batch + n) * pixels + pixel) * stride
        total += 1.0 / (1.0 + tl.exp(-tl.load(logits + at, mask=inside, other=0).to(tl.float32)))
    if MAPS > 1:
        total = total / MAPS
    tl.store(anomaly_map + n * pixels + pixel, total, mask=inside)
    key = tl.where(inside, total.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    tl.store(workspace + n * 2 * groups + group, tl.max(key, axis=1), mask=group < groups)


@triton.jit
def _count_digits(key, prefix, SHIFT: tl.constexpr):
    """How many of the keys that start with `prefix` have each digit at SHIFT; negative keys do not count."""
    live = key >= 0
    if SHIFT < 24:
        live = live & (((key ^ prefix) >> (SHIFT + 8)) == 0)
    counts = tl.histogram(tl.where(live, (key >> SHIFT) & 255, 0), 256)
    return counts - tl.where(tl.arange(0, 256) == 0, tl.sum(tl.where(live, 0, 1)), 0)


@triton.jit
def _digit(counts, left):
    """(digit of the `left`-th largest, how many of the keys with that digit are wanted)."""
    reached = tl.sum(counts) - tl.cumsum(counts) + counts
    digit = tl.sum((reached >= left).to(tl.int32)) - 1
    return digit, left - tl.sum(tl.where(tl.arange(0, 256) > digit, counts, 0))


@triton.jit
def _pixel_keys(map_of_n, chosen, start, found, pixels, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Keys of the pixels of GROUPS chosen groups from `start` on, -1 where there is none."""
    slot = start + tl.arange(0, GROUPS)
    group = tl.load(chosen + slot, mask=slot < found, other=0)
    pixel = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (slot < found)[:, None] & (pixel < pixels)
    value = tl.load(map_of_n + pixel, mask=inside, other=0)
    return tl.reshape(tl.where(inside, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1), (GROUPS * GROUP,))


@triton.jit(do_not_specialize=["k", "pixels", "groups"])
def score_select_kernel(
    anomaly_map, workspace, threshold, pred_score, pred_label, k, pixels, groups,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program n: score and label of image n; KEYS group keys or the pixels of GROUPS groups at a time."""
    n = tl.program_id(0).to(tl.int64)
    largest = workspace + n * 2 * groups
    chosen = largest + groups
    map_of_n = anomaly_map + n * pixels

    bound = groups * 0
    left = k
    for i in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, groups, KEYS):
            at = start + tl.arange(0, KEYS)
            counts += _count_digits(tl.load(largest + at, mask=at < groups, other=-1), bound, 24 - 8 * i)
        digit, left = _digit(counts, left)
        bound = bound | (digit << (24 - 8 * i))
    bound = tl.where(k <= groups, bound, 0)

    found = groups * 0
    most = groups * 0
    for start in range(0, groups, KEYS):
        at = start + tl.arange(0, KEYS)
        key = tl.load(largest + at, mask=at < groups, other=-1)
        take = (key >= bound).to(tl.int32)
        tl.store(chosen + found + tl.cumsum(take) - 1, at, mask=take != 0)
        found += tl.sum(take)
        most = tl.maximum(most, tl.max(key))
    tl.debug_barrier()

    kth = groups * 0
    left = k
    for i in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        for start in range(0, found, GROUPS):
            key = _pixel_keys(map_of_n, chosen, start, found, pixels, GROUP, GROUPS)
            counts += _count_digits(key, kth, 24 - 8 * i)
        digit, left = _digit(counts, left)
        kth = kth | (digit << (24 - 8 * i))

    sums = tl.zeros((GROUPS * GROUP,), tl.float32)
    for start in range(0, found, GROUPS):
        key = _pixel_keys(map_of_n, chosen, start, found, pixels, GROUP, GROUPS)
        sums += tl.where(key > kth, key.to(tl.float32, bitcast=True), 0.0)
    total = tl.sum(sums) + left.to(tl.float32) * kth.to(tl.float32, bitcast=True)
    score = tl.minimum(total / (1.0 * k), 1.0)  # 1 comes as a constant, which has no `to`
    score = tl.where(most > 0x7F800000, float("nan"), score)
    tl.store(pred_score + n, score)
    tl.store(pred_label + n, (score > tl.load(threshold)).to(tl.uint8))


CONFIGURATIONS = tuple(
    dict(GROUPS=groups, KEYS=keys, num_warps=warps) for groups, keys, warps in ((8, 512, 4), (4, 512, 4), (16, 1024, 8))
)
"""Launch configurations, each tested; the first is used until they have been timed on a device."""


def _run_triton(logits, threshold, k, anomaly_map, pred_score, pred_label, workspace=None, configuration=None) -> None:
    if logits.numel() == 0:
        return
    (maps, batch, pixels, groups), stride, workspace = _layout(logits, workspace)
    options = dict(configuration or CONFIGURATIONS[0])
    keys = options.pop("KEYS")
    triton_import.launch(score_map_kernel, (triton.cdiv(groups, options["GROUPS"]), batch))(
        logits, anomaly_map, workspace, batch, pixels, groups, stride, MAPS=maps, GROUP=GROUP, **options
    )
    triton_import.launch(score_select_kernel, (batch,))(
        anomaly_map, workspace, threshold, pred_score, pred_label.view(torch.uint8), k, pixels, groups,
        GROUP=GROUP, KEYS=keys, **options,
    )  # fmt: skip


def _can_run_triton(logits, *args) -> None:
    can_run(logits, *args)
    if logits.shape[1] >= 2**16 or logits.shape[2] * logits.shape[3] >= 2**31 - 2**16:
        raise CannotRunError("2^16 images or more, or more than 2^31 - 2^16 pixels an image")


SELECT_THREADS = 512
"""Of the block that scores an image."""


def _run_cuda(logits, threshold, k, anomaly_map, pred_score, pred_label, workspace=None) -> None:
    if logits.numel() == 0:
        return
    sizes, stride, workspace = _layout(logits, workspace)
    _, batch, pixels, groups = sizes
    vectors = stride == 1 and pixels % 4 == 0 and logits.data_ptr() % 16 == anomaly_map.data_ptr() % 16 == 0
    kernel = f"score_map_{str(logits.dtype).removeprefix('torch.')}"
    cuda_launch.launch(
        "score", kernel, (-(-batch * groups // 8), 1, 1), (256, 1, 1),
        (logits, anomaly_map, workspace, *map(np.int64, (*sizes, stride)), np.int32(vectors)),
    )  # fmt: skip
    cuda_launch.launch(
        "score", "score_select", (batch, 1, 1), (SELECT_THREADS, 1, 1),
        (
            anomaly_map, workspace, threshold, pred_score, pred_label, np.int32(k), np.int64(pixels), np.int64(groups),
        ),
    )  # fmt: skip


def _run_cpu(logits, threshold, k, anomaly_map, pred_score, pred_label, workspace=None, level="") -> None:
    (*shape, _), stride, workspace = _layout(logits, workspace)
    native.module.score(
        logits.data_ptr(), TYPES[logits.dtype], shape, stride, threshold.data_ptr(), k, anomaly_map.data_ptr(),
        pred_score.data_ptr(), pred_label.data_ptr(), workspace.data_ptr(), threads=torch.get_num_threads(),
        level=level,
    )  # fmt: skip


OP = Op("score")
OP.register("triton", _run_triton, triton_import.available, _can_run_triton, configurations=CONFIGURATIONS)
OP.register("cuda", _run_cuda, cuda_launch.available, can_run)
OP.register("cpu", _run_cpu, registry.cpu_available("score"), can_run)
OP.register("reference", _run_reference, registry.always, registry.always)
