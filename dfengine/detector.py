"""The everyday API: `dfengine.load(checkpoint).detect(images)`."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dfengine.arguments import whole_number
from dfengine.checkpoint import Checkpoint, load_checkpoint
from dfengine.data.inputs import InputImage, collect_inputs, collect_item, is_stream
from dfengine.data.prefetch import Prefetch
from dfengine.detection import Detection, Refused, resize_map
from dfengine.devices import processors, resolve_device
from dfengine.engine.arithmetic import float32_arithmetic
from dfengine.engine.modules import Output
from dfengine.engine.runner import TACTICS, ProgramRunner
from dfengine.engine.transfer import CudaTransfer, HostTransfer, transfer_of
from dfengine.errors import ArgumentTypeError, DfengineError, ImageError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.precision import check_precision, chosen_runner
from dfengine.verified import verdict

log = logging.getLogger("dfengine")

MOST_WORKERS = 8
"""The most threads that `Detector.stream` decodes on unless asked for more."""

_Prepared = tuple[InputImage, torch.Tensor | ImageError]


def load(
    path: str | Path, device: str = "auto", precision: str = "auto", seed: int = 0, tactics: str = "default"
) -> Detector:
    """The detector in the checkpoint `path`, ready to run.

    device: "auto" (a CUDA GPU where there is one, else the CPU), "cpu", "cuda" or "cuda:N".
    precision of the networks and their input (maps and scores are always float32): "float32"; "bfloat16"; on a GPU
        also "float16", "tf32" and, from compute capability 8.9, "fp8"; on a processor with AVX512_VNNI or AMX-INT8
        "int8". "fp8" and "int8" are those of the large products, and need the ranges that `dfengine verify CKPT --data
        DIR --precision int8 --record` (or fp8) keeps in the checkpoint. "auto" is the one of eight bits where that
        passed, else the half precision that the device is fast in (float16 on a GPU, bfloat16 on a processor with AMX
        or AVX512_BF16), if the trial images in the checkpoint get the maps of float32 within 0.01 (bfloat16, int8 and
        fp8: 0.05); else float32. One that `verify --record` noted as refused runs where it is named, with a warning.
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
        if not isinstance(checkpoint, Checkpoint):
            kind = type(checkpoint).__name__
            raise ArgumentTypeError(f"a Detector is made of a Checkpoint, not of a {kind}; dfengine.load takes a path")
        seed = whole_number("seed", seed, 0, 2**64 - 1)
        self.config = checkpoint.config
        self.calibration = checkpoint.calibration
        self.training = checkpoint.training
        self.seed = seed
        self.device = resolve_device(device)
        check_precision(precision, self.device)
        if checkpoint.refuses(precision, self.device.type):
            record = checkpoint.verified[precision]
            reasons = "; ".join(map(str, record["refused"]))
            log.warning('precision %s %s: %s; it runs as asked, "auto" avoids it', precision, verdict(record), reasons)
        self._runner = chosen_runner(checkpoint, self.device, precision, seed, tactics, tuning_seconds)
        self.precision = self._runner.precision
        self._lock = threading.Lock()
        self._ran: torch.cuda.Event | None = None  # when the last batch, perhaps on another stream, is done

    @property
    def calibration(self) -> Calibration | None:
        """What the labels follow from. Setting another raises `ArgumentTypeError` where it is none."""
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        if not isinstance(value, Calibration | None):
            kind = type(value).__name__
            raise ArgumentTypeError(f"calibration must be a Calibration or None, not a {kind}; a number is a threshold")
        self._calibration = value

    @property
    def threshold(self) -> float | None:
        """The raw score above which an image is an alarm; None without a calibration.

        Setting a number from 0 to 1 takes the place of the calibration. Raises `UsageError` for another.
        """
        return None if self.calibration is None else self.calibration.threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self.calibration = None if value is None else Calibration.by_hand(value)

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
        with self._lock, float32_arithmetic(self.device, self.precision):
            yield runner

    def warmup(self, batch_sizes: Iterable[int] | int = (1, 16)) -> None:
        """Run a blank batch of each size, the largest first, so that no later call of `detect` or `stream` with such a
        batch has to build its program or, on a GPU, compile kernels, capture a graph or ask for memory.

        On a GPU sizes are filled up to 1, 2, 4, 8, 16, 32 or 64, so that `(1, 2, 4, 8, 16)` covers all up to 16.
        batch_sizes: whole numbers, or one. Raises `UsageError` or `ArgumentTypeError` for others, and for more than
        eight programs.
        """
        several = isinstance(batch_sizes, Iterable) and not isinstance(batch_sizes, (str, bytes))
        sizes = [whole_number("a batch size", size, 1) for size in (batch_sizes if several else [batch_sizes])]
        with self.program_runner() as runner:
            if runner is not None:
                runner.warm_up(sizes)
        transfer = transfer_of(self.device)
        blank = torch.zeros((self.config.image_size, self.config.image_size, self.config.channels))
        for size in sorted(set(sizes), reverse=True):
            self._run([blank] * size, transfer)()

    def detect(self, batch: Any, batch_size: int = 16, original_size: bool = False) -> Detection:
        """Score images; `dfengine.data.inputs` says what `batch` can be. All results are held in memory.

        batch_size: how many images run at once; it changes no score (to 1e-5 in float32; in half precision by rounding
            where other kernels were tuned for another size). original_size: give `anomaly_map` and
        `pred_mask` at the size of each input instead of model size.

        An image that cannot be read does not stop the others: it is in `Detection.errors` and in none of the arrays,
        and of an iterator the first is warned of. Raises `ImageError` when no image at all could be scored,
        `UsageError` or `DataError` when `batch` holds none.
        """
        parts = list(self.stream(batch, batch_size, original_size))
        if not parts:
            raise UsageError("batch: is empty")
        detection = Detection.concatenate(parts)
        if not len(detection):
            first, *others = detection.errors
            raise ImageError(first.name, first.reason + (f" (and {len(others)} more refused)" if others else ""))
        return detection

    def stream(
        self,
        source: Any,
        batch_size: int = 16,
        original_size: bool = False,
        workers: int | None = None,
        prefetch: int = 2,
    ) -> Iterator[Detection]:
        """`detect` for more images than memory holds, or for an endless iterable of them (`source` can be what `batch`
        can be): one `Detection` per `batch_size` inputs, in order.

        Images are read and resized by `workers` threads (by default as many as there are processors, at most 8) while
        earlier ones are scored; on a GPU, copies go on beside the work. At most `prefetch` batches are ready ahead. An
        iterator is drawn from by these threads, by one at a time, and may reuse the memory of an image once it is asked
        for the next. workers=0 does everything in the calling thread when its turn comes.

        A `Detection` may hold only `errors`, whose indices count from the start of `source`; nothing is raised for
        refused images, nor for an item of an iterator that is none (a camera's None for a lost frame, say); of an
        iterator the first that is refused is warned of. What the iterator raises is raised here, after the images
        before it. Leaving the loop early ends the threads. Raises `UsageError` or `DataError` as `detect` does.
        """
        batch_size = whole_number("batch_size", batch_size, 1)
        prefetch = whole_number("prefetch", prefetch, 1)
        workers = None if workers is None else whole_number("workers", workers)
        if isinstance(source, Detection):
            raise ArgumentTypeError("batch: is a Detection, what was found in images; give the images")
        endless = is_stream(source)
        images = _draw(iter(source)) if endless else collect_inputs(source)
        if workers is None:
            workers = min(MOST_WORKERS, processors())
        if not endless and len(images) == 1:
            workers = 0  # nothing to go on beside
        return self._stream(images, endless, batch_size, original_size, workers, prefetch)

    def _stream(
        self,
        images: Iterable[InputImage],
        drawn: bool,
        batch_size: int,
        original_size: bool,
        workers: int,
        prefetch: int,
    ) -> Iterator[Detection]:
        """drawn: whether the images are those of an iterator, where the memory of one may be that of the next, and a
        first refusal is warned of: an endless one may give nothing else."""
        transfer = transfer_of(self.device)
        pixels_stay = self.device.type == "cuda"  # a batch is copied there as a whole

        def prepare(image: InputImage) -> _Prepared:
            try:
                return image, image.load_tensor(self.config.image_size, None if pixels_stay else self.device)
            except ImageError as error:
                return image, error

        def alone(image: InputImage) -> bool:
            return image.one_thread or (drawn and image.path is None)

        ready = Prefetch(images, prepare, workers, prefetch * batch_size, alone, transfer.within)
        under_way: deque[Callable[[], Detection]] = deque()
        start, warn = 0, drawn
        try:
            while True:
                if under_way and (len(under_way) == transfer.depth or not ready.ready(batch_size)):
                    detection = under_way.popleft()()
                    if warn and detection.errors:
                        _, name, reason = detection.errors[0]
                        log.warning("%s: %s; what is refused is in `errors`, this is said once", name, reason)
                        warn = False
                    yield detection
                elif batch := ready.take(batch_size):
                    under_way.append(self._launch(batch, start, original_size, transfer))
                    start += len(batch)
                else:
                    return
        finally:
            ready.close()

    def _launch(
        self, batch: list[_Prepared], start: int, original_size: bool, transfer: HostTransfer | CudaTransfer
    ) -> Callable[[], Detection]:
        """Starts to score the images, numbered from `start`; the function waits for the results and gives them."""
        numbered = list(enumerate(batch, start))
        errors = [Refused(i, image.name, u.reason) for i, (image, u) in numbered if isinstance(u, ImageError)]
        inputs = [(i, image) for i, (image, u) in numbered if not isinstance(u, ImageError)]
        units = [u for _, u in batch if not isinstance(u, ImageError)]
        results = self._run(units, transfer)

        def finish() -> Detection:
            maps, reconstruction, scores, pixels = results()
            finite = np.isfinite(scores) & np.isfinite(maps).all(axis=(1, 2))
            reason = f"the model's result is not finite in {self.precision}"
            refused = [Refused(i, image.name, reason) for i, image in itertools.compress(inputs, ~finite)]
            kept = [image for _, image in itertools.compress(inputs, finite)]
            maps = maps[finite]  # this copies, so that no result is memory of the runner or of a transfer
            if original_size:
                maps = [resize_map(m, image.original_size) for m, image in zip(maps, kept, strict=True)]
            return Detection(
                names=tuple(image.name for image in kept),
                pred_score=np.minimum(scores[finite], np.float32(1)),  # a mean of probabilities; it can round above 1
                anomaly_map=maps,
                reconstruction=reconstruction[finite],
                image=pixels[finite],
                calibration=self.calibration,
                seed=self.seed,
                errors=tuple(sorted(errors + refused)),
                start=start,
            )

        return finish

    def _run(
        self, units: list[torch.Tensor], transfer: HostTransfer | CudaTransfer
    ) -> Callable[[], tuple[np.ndarray, ...]]:
        """A function that gives, of unit images (S, S, 3), maps (B, S, S), reconstructions (B, S, S, 3), scores (B,),
        float32, and the images uint8 (B, S, S, 3)."""
        if not units:
            size = self.config.image_size
            shapes = ((size, size), (size, size, 3), (), (size, size, 3))
            types = (np.float32, np.float32, np.float32, np.uint8)
            return lambda: tuple(np.empty((0, *shape), dtype) for shape, dtype in zip(shapes, types, strict=True))
        try:
            with transfer.within():
                unit = transfer.upload(units)
                with self._lock, float32_arithmetic(self.device, self.precision):
                    output = self._in_turn(unit)
                return transfer.download([*(t.float() for t in output), (unit * 255).round().to(torch.uint8)])
        except torch.OutOfMemoryError:
            reason = f"out of memory with batch_size {len(units)}; use a smaller one"
            raise DfengineError(f"{self.device}: {reason}") from None

    def _in_turn(self, unit: torch.Tensor) -> Output:
        """The runner's output; on a GPU the work waits for that of other threads, whose memory it uses."""
        if self.device.type != "cuda":
            return self._runner.run(unit)
        stream = torch.cuda.current_stream(self.device)
        if self._ran is not None:
            stream.wait_event(self._ran)
        output = self._runner.run(unit)
        self._ran = stream.record_event()
        return output


def _draw(items: Iterator) -> Iterator[InputImage]:
    """The images of an iterator, item by item; one whose type means nothing is refused as a bad image is."""
    for i, item in enumerate(items):
        try:
            images = collect_item(item, i)
        except ArgumentTypeError as error:
            name, _, reason = str(error).partition(": ")
            images = [InputImage(name, error=ImageError(name, reason))]
        yield from images
