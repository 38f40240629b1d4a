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
from dfengine.engine.modules import PRECISIONS, ModuleRunner
from dfengine.engine.runner import ProgramRunner, make_runner
from dfengine.errors import UsageError
from dfengine.kernels import forced_backend
from dfengine.kernels.conv2d_cpu import default_product

TOLERANCE = {"float32": 1e-4, "tf32": 0.01, "float16": 0.01, "bfloat16": 0.05}
"""How far a map may be from that of float32 at any pixel. A score, a mean of pixels, then differs by no more."""

TRIAL_SEED = 0
"""The seed of the maps in a `Trial`: the one that detection takes by default."""


def check_precision(precision: str, device: torch.device) -> None:
    """Raises `UsageError` where `device` cannot compute in `precision`."""
    if precision not in (*PRECISIONS, "auto"):
        raise UsageError(f"precision must be one of auto, {', '.join(PRECISIONS)}, not {precision!r}")
    if device.type == "cpu" and precision in ("float16", "tf32"):
        raise UsageError(f"precision {precision} needs a GPU; on a CPU use float32 or bfloat16")
    if device.type == "cuda" and precision in ("bfloat16", "tf32"):
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UsageError(f"precision {precision} needs a GPU of compute capability 8.0 or later")


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

    "auto" is the half precision of the device where it gives the maps of float32 for the checkpoint's trial images
    within `TOLERANCE`, else float32; a checkpoint without them is tried on one image of smooth noise. It is float32
    without a trial where `dfengine verify --record` refused the half precision, and in the iterative mode, whose trial
    would be hundreds of evaluations.
    """

    def served(used: str) -> ModuleRunner | ProgramRunner:
        return make_runner(checkpoint.build(), device, used, seed, tactics, tuning_seconds)

    half = half_precision(device) if precision == "auto" else None
    if half is None or checkpoint.config.mode == "iterative" or checkpoint.refuses(half, device.type):
        return served("float32" if precision == "auto" else precision)
    trial, exact = checkpoint.trial, None
    if trial is None or seed != TRIAL_SEED:
        exact = make_runner(checkpoint.build(), device, "float32", seed)
        images = _smooth_noise(checkpoint.config.image_size) if trial is None else trial.images
        trial = Trial(images, trial_maps(exact, images))
    runner = served(half)
    difference = (trial_maps(runner, trial.images) - trial.anomaly_map.float()).abs().max()
    if difference <= TOLERANCE[half]:  # not where it is NaN
        return runner
    return exact if exact is not None and tactics == "default" else served("float32")


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
