"""The everyday API: `dfengine.load(checkpoint).detect(images)`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from dfengine.checkpoint import Checkpoint, load_checkpoint
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.detection import Detection, Refused, resize_map
from dfengine.devices import resolve_device
from dfengine.engine.modules import PRECISIONS, ModuleRunner
from dfengine.engine.runner import TACTICS, ProgramRunner, make_runner
from dfengine.errors import DfengineError, ImageError, UsageError
from dfengine.models import Model

_AUTO_TOLERANCE = 0.01  # of map probability, float16 against float32


def load(
    path: str | Path, device: str = "auto", precision: str = "auto", seed: int = 0, tactics: str = "default"
) -> Detector:
    """The detector in the checkpoint `path`, ready to run.

    device: "auto" (a CUDA GPU where there is one, else the CPU), "cpu", "cuda" or "cuda:N".
    precision of the networks and their input (maps and scores are always float32): "float32"; "bfloat16"; on a GPU
        also "float16" and "tf32"; "auto" is float32 on a CPU, and on a GPU float16 where a trial image gives the map of
        float32 within 0.01, else float32.
    seed: of the diffusion noise, 0 to 2**64 - 1; the same seed gives the same scores.
    tactics: which kernels run: "default" takes what is known to be quick on this device; "tuned" measures what is not,
        once for each batch size (seconds to minutes), and remembers it; "exhaustive" measures everything anew. On a GPU
        the fused kernels run only once that was done, here or by `dfengine tune`; before, the PyTorch modules.

    Raises `CheckpointError` for a checkpoint that cannot be used, `UsageError` for a device or precision that this
    machine does not have.
    """
    return Detector(load_checkpoint(path), device, precision, seed, tactics)


class Detector:
    """A model on a device. `load` makes one from a file; the arguments are explained there.

    config: the model's `ModelConfig`. calibration: a `Calibration` or None; it may be replaced at any time and holds
    for later calls. device, precision: as chosen. seed. A detector may be shared by threads: they take turns.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        precision: str = "auto",
        seed: int = 0,
        tactics: str = "default",
        tuning_seconds: float | None = None,
    ):
        if tactics not in TACTICS:
            raise UsageError(f"tactics must be one of {', '.join(TACTICS)}, not {tactics!r}")
        if type(seed) is not int or not 0 <= seed < 2**64:
            raise UsageError(f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}")
        self.config = checkpoint.config
        self.calibration = checkpoint.calibration
        self.training = checkpoint.training
        self.seed = seed
        self.device = resolve_device(device)
        _check_precision(precision, self.device)
        model = checkpoint.build()
        self.precision = _choose_precision(model, self.device, seed) if precision == "auto" else precision
        self._runner = make_runner(model, self.device, self.precision, seed, tactics, tuning_seconds)
        self._lock = threading.Lock()

    @property
    def threshold(self) -> float | None:
        """The raw score above which an image is an alarm; None without a calibration."""
        return None if self.calibration is None else self.calibration.threshold

    def __reduce__(self):
        raise TypeError("a Detector cannot be copied or pickled: load it in each process (dfengine.load)")

    def __repr__(self) -> str:
        calibrated = "not calibrated" if self.threshold is None else f"threshold {self.threshold:.4f}"
        size = self.config.image_size
        return f"Detector({self.config.preset}, {size}x{size}, {self.device}, {self.precision}, {calibrated})"

    @contextmanager
    def program_runner(self) -> Iterator[ProgramRunner | None]:
        """For `with`: what runs the batches, for this thread alone and in the detector's arithmetic; None where that
        is torch modules and not a program."""
        runner = self._runner if isinstance(self._runner, ProgramRunner) else None
        with self._lock, _float32_arithmetic(self.device, self.precision):
            yield runner

    def detect(self, batch: Any, batch_size: int = 16, original_size: bool = False) -> Detection:
        """Score images; `dfengine.data.inputs` says what `batch` can be. All results are held in memory.

        batch_size: how many images run at once; it changes no score. original_size: give `anomaly_map` and
        `pred_mask` at the size of each input instead of model size.

        An image that cannot be read does not stop the others: it is in `Detection.errors` and in none of the arrays.
        Raises `ImageError` when no image at all could be scored, `UsageError` or `DataError` when `batch` holds none.
        """
        parts = list(self.detect_iter(batch, batch_size, original_size))
        if not parts:
            raise UsageError("batch: is empty")
        detection = Detection.concatenate(parts)
        if not len(detection):
            first, *others = detection.errors
            raise ImageError(first.name, first.reason + (f" (and {len(others)} more refused)" if others else ""))
        return detection

    def detect_iter(self, batch: Any, batch_size: int = 16, original_size: bool = False) -> Iterator[Detection]:
        """`detect` for more images than memory holds: one `Detection` per `batch_size` inputs, in order.

        Files are read when their turn comes, and an iterator of images is drawn from as it goes. A `Detection` may
        hold only `errors`, whose indices count from the start of `batch`. Nothing is raised for refused images.
        """
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(f"batch_size must be a positive whole number, not {batch_size!r}")
        images = _draw(batch) if isinstance(batch, Iterator) else collect_inputs(batch)
        return self._iterate(images, batch_size, original_size)

    def _iterate(self, images: Iterable[InputImage], batch_size: int, original_size: bool) -> Iterator[Detection]:
        images, start = iter(images), 0
        while chunk := list(itertools.islice(images, batch_size)):
            yield self._detect_batch(chunk, start, original_size)
            start += len(chunk)

    def _detect_batch(self, images: list[InputImage], start: int, original_size: bool) -> Detection:
        size = self.config.image_size
        inputs: list[tuple[int, InputImage]] = []
        units, errors = [], []
        for index, image in enumerate(images, start):
            try:
                units.append(image.load_tensor(size, self.device))
                inputs.append((index, image))
            except ImageError as error:
                errors.append(Refused(index, image.name, error.reason))
        unit = torch.stack(units) if units else torch.empty((0, size, size, 3))
        maps, reconstruction, scores = self._run(unit)

        finite = np.isfinite(scores) & np.isfinite(maps).all(axis=(1, 2))
        for index, image in itertools.compress(inputs, ~finite):
            errors.append(Refused(index, image.name, f"the model's result is not finite in {self.precision}"))
        kept = [image for _, image in itertools.compress(inputs, finite)]
        maps = maps[finite]
        if original_size:
            maps = [resize_map(m, image.original_size) for m, image in zip(maps, kept, strict=True)]
        return Detection(
            names=tuple(image.name for image in kept),
            pred_score=scores[finite],
            anomaly_map=maps,
            reconstruction=reconstruction[finite],
            image=(unit * 255).round().to(torch.uint8).cpu().numpy()[finite],
            calibration=self.calibration,
            seed=self.seed,
            errors=tuple(sorted(errors)),
        )

    def _run(self, unit: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Maps (B, S, S), reconstructions (B, S, S, 3) and scores (B,), float32, of unit images (B, S, S, 3)."""
        count, size = len(unit), self.config.image_size
        if count == 0:
            empty = np.empty((0, size, size), np.float32)
            return empty, np.empty((0, size, size, 3), np.float32), np.empty(0, np.float32)
        try:
            with self._lock, _float32_arithmetic(self.device, self.precision):
                output = self._runner.run(unit)
                maps, reconstruction, scores = (tensor.float().cpu().numpy().copy() for tensor in output)
        except torch.OutOfMemoryError:
            raise DfengineError(f"{self.device}: out of memory with batch_size {count}; use a smaller one") from None
        # A mean of probabilities; on a GPU it can round to just above 1.
        return maps, reconstruction, np.minimum(scores, np.float32(1))


def _check_precision(precision: str, device: torch.device) -> None:
    """Raises `UsageError` where `device` cannot compute in `precision`."""
    if precision not in (*PRECISIONS, "auto"):
        raise UsageError(f"precision must be one of auto, {', '.join(PRECISIONS)}, not {precision!r}")
    if device.type == "cpu" and precision in ("float16", "tf32"):
        raise UsageError(f"precision {precision} needs a GPU; on a CPU use float32 or bfloat16")
    if device.type == "cuda" and precision in ("bfloat16", "tf32"):
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise UsageError(f"precision {precision} needs a GPU of compute capability 8.0 or later")


def _choose_precision(model: Model, device: torch.device, seed: int) -> str:
    """ "float16" on a GPU where it gives the map of float32 for a trial image within `_AUTO_TOLERANCE`, else "float32".

    The trial image is smooth colour noise: like a photo, it has most of its energy in low frequencies.
    """
    if device.type != "cuda":
        return "float32"
    size = model.config.image_size
    coarse = np.random.default_rng(0).random((8, 8, 3), dtype=np.float32)
    unit = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)[None]
    maps = {}
    for precision in ("float32", "float16"):
        with _float32_arithmetic(device, precision):
            maps[precision] = ModuleRunner(model, device, precision, seed).run(unit).anomaly_map
    # Written so that a result that is not finite fails.
    agrees = bool((maps["float32"] - maps["float16"]).abs().max() <= _AUTO_TOLERANCE)
    return "float16" if agrees else "float32"


@contextmanager
def _float32_arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """On a GPU, makes float32 products exact unless `precision` is "tf32": torch's default for convolutions is TF32."""
    if device.type != "cuda":
        yield
        return
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def _draw(items: Iterator) -> Iterator[InputImage]:
    """The images of an iterator, item by item; names count items as `collect_inputs` does for a list."""
    for i, item in enumerate(items):
        for image in collect_inputs([item]):
            if image.path is None and image.name.startswith("batch[0]"):
                image.name = f"batch[{i}]" + image.name.removeprefix("batch[0]")
            yield image
