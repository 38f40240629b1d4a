"""In which precision a detector runs: what a device can, and what "auto" chooses by trial."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from dfengine import native
from dfengine.checkpoint import TRIAL_IMAGES, Checkpoint, Trial
from dfengine.devices import cpu_has_bfloat16
from dfengine.engine.arithmetic import float32_arithmetic
from dfengine.engine.lower import NotLoweredError
from dfengine.engine.modules import PRECISIONS, ModuleRunner
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.engine.tactics import Tactics
from dfengine.errors import UsageError
from dfengine.kernels import OPS, CannotRunError, forced_backend
from dfengine.kernels.conv2d_cpu import byte_products, default_product
from dfengine.kernels.quantization import FORMATS
from dfengine.kernels.registry import ENVIRONMENT

TOLERANCE = {"float32": 1e-4, "tf32": 0.01, "float16": 0.01, "bfloat16": 0.05, "int8": 0.05, "fp8": 0.05}
"""How far a map may be from that of float32 at any pixel. A score, a mean of pixels, then differs by no more."""

TRIAL_SEED = 0
"""The seed of the maps in a `Trial`: the one that detection takes by default."""


def check_precision(precision: str, device: torch.device) -> None:
    """Raises `UsageError` where `device` cannot compute in `precision`."""
    if precision not in (*PRECISIONS, "auto"):
        raise UsageError(f"precision must be one of auto, {', '.join(PRECISIONS)}, not {precision!r}")
    if device.type == "cpu":
        if precision in ("float16", "tf32", "fp8"):
            raise UsageError(f"precision {precision} needs a GPU; on a CPU use float32, bfloat16 or int8")
        if precision == "int8" and eight_bits(device) is None:
            forced = forced_backend(None)
            if forced not in (None, "cpu"):
                raise UsageError(f"{ENVIRONMENT}={forced}: multiplies no int8; use another precision")
            if not native.available():
                raise UsageError(f"precision int8 needs the compiled kernels: {native.reason}")
            raise UsageError("precision int8 needs a processor with AVX512_VNNI or AMX-INT8")
    if device.type == "cuda":
        if precision == "int8":
            raise UsageError("precision int8 is one of CPUs; on a GPU use float16 or fp8")
        least = {"bfloat16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}.get(precision, (0, 0))
        if torch.cuda.get_device_capability(device) < least:
            raise UsageError(f"precision {precision} needs a GPU of compute capability {least[0]}.{least[1]} or later")


def half_precision(device: torch.device) -> str | None:
    """The half precision that `device` multiplies faster than float32: "float16" on a GPU; on a CPU "bfloat16" where it
    has AMX or AVX512_BF16 (and the kernels, where they are compiled, use them), else None."""
    if device.type == "cuda":
        return "float16"
    if forced_backend(None) not in (None, "cpu") or not cpu_has_bfloat16():
        return None
    if native.available() and default_product(torch.bfloat16) == "float32":
        return None
    return "bfloat16"


def eight_bits(device: torch.device) -> str | None:
    """The precision of eight bits that `device` multiplies: "fp8" on a GPU of compute capability 8.9 or later with
    Triton; "int8" on a CPU with AVX512_VNNI or AMX-INT8 and the compiled kernels; else None."""
    if device.type == "cuda":
        served = forced_backend(None) in (None, "triton") and OPS["conv2d"].status("cuda")["triton"] == ""
        return "fp8" if served and torch.cuda.get_device_capability(device) >= (8, 9) else None
    served = forced_backend(None) in (None, "cpu") and native.available() and byte_products()
    return "int8" if served else None


def chosen_runner(
    checkpoint: Checkpoint,
    device: torch.device,
    precision: str,
    seed: int,
    tactics: str = "default",
    tuning_seconds: float | None = None,
) -> ModuleRunner | ProgramRunner:
    """The runner that serves `checkpoint`; its `precision` is what "auto" became.

    tactics, tuning_seconds: of the runner that serves; what it is tried against takes the default ones.

    "auto" is the first of `candidates` that gives the maps of float32 for the checkpoint's trial images within
    `TOLERANCE`, else float32; a checkpoint without them is tried on one image of smooth noise. It is float32 without a
    trial in the iterative mode, whose trial would be hundreds of evaluations.
    Raises UsageError for a precision of eight bits whose ranges the checkpoint does not keep.
    """

    def served(used: str) -> ModuleRunner | ProgramRunner:
        return make_runner(checkpoint.build(), device, used, seed, tactics, tuning_seconds, checkpoint.ranges(used))

    if precision != "auto":
        if precision in FORMATS and not checkpoint.ranges(precision):
            command = f"dfengine verify CKPT --data DIR --precision {precision} --record"
            raise UsageError(f"precision {precision}: no ranges are kept in this checkpoint; run {command} first")
        return served(precision)
    tried = candidates(checkpoint, device, tactics)
    if not tried:
        return served("float32")
    trial, exact = checkpoint.trial, None
    if trial is None or seed != TRIAL_SEED:
        exact = make_runner(checkpoint.build(), device, "float32", seed)
        images = _smooth_noise(checkpoint.config.image_size) if trial is None else trial.images
        trial = Trial(images, trial_maps(exact, images))
    for candidate in tried:
        try:
            runner = served(candidate)
        except (NotLoweredError, CannotRunError):
            if tactics != "default" or candidate not in FORMATS:
                raise
            continue
        difference = (trial_maps(runner, trial.images) - trial.anomaly_map.float()).abs().max()
        if difference <= TOLERANCE[candidate]:  # not where it is NaN
            return runner
    return exact if exact is not None and tactics == "default" else served("float32")


def candidates(checkpoint: Checkpoint, device: torch.device, tactics: str = "default") -> list[str]:
    """What "auto" tries: the precision of eight bits of the device where `dfengine verify --record` found that it
    serves (on a GPU once tactics were measured, or are), and then the half precision unless it was refused."""
    if checkpoint.config.mode == "iterative":
        return []
    eight, half = eight_bits(device), half_precision(device)
    quick = device.type == "cpu" or tactics != "default" or len(Tactics(device)) > 0
    verified = eight and checkpoint.passes(eight, device.type) and checkpoint.ranges(eight)
    passed = [eight] if verified and quick else []
    return passed + ([half] if half and not checkpoint.refuses(half, device.type) else [])


def trial_maps(runner: ModuleRunner | ProgramRunner, images: Tensor) -> Tensor:
    """Maps float32 (N, S, S), on the CPU, of uint8 images (N, S, S, C), one by one: a runner has that program."""
    unit = images.float() / 255
    with float32_arithmetic(runner.device, runner.precision):
        return torch.cat([runner.run(image[None]).anomaly_map.float().cpu() for image in unit])


def with_trial(checkpoint: Checkpoint, images: np.ndarray | Tensor, device: torch.device) -> Checkpoint:
    """`checkpoint` with the first `TRIAL_IMAGES` of uint8 `images` (N, S, S, C) as its trial, scored on `device`.

    Without a trial where the maps are not finite, and in the iterative mode, which has no use for one.
    """
    if checkpoint.config.mode == "iterative":
        return replace(checkpoint, trial=None)
    images = torch.as_tensor(images[:TRIAL_IMAGES])
    maps = trial_maps(make_runner(checkpoint.build(), device, "float32", TRIAL_SEED), images)
    return replace(checkpoint, trial=Trial(images, maps.half()) if torch.isfinite(maps).all() else None)


def _smooth_noise(size: int) -> Tensor:
    """An image uint8 (1, S, S, 3) with, like a photo, most of its energy in low frequencies."""
    coarse = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    unit = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(np.rint(255 * unit).astype(np.uint8)[None])
