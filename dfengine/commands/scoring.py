"""What `detect`, `evaluate`, `calibrate` and `demo` share: scoring with progress, and writing results that may fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dfengine import __version__
from dfengine.console import OutputConsole
from dfengine.data.inputs import InputImage
from dfengine.detection import Detection, heatmap_name, write_rows
from dfengine.detector import Detector, load
from dfengine.errors import DfengineError, UsageError
from dfengine.evaluation.calibration import Calibration
from dfengine.files import BUSY, OUTPUT_MARKER, locked, make_folder, remove
from dfengine.report.report import ReportItem
from dfengine.results import begin_results, earlier_results, list_result
from dfengine.stderr import print_error
from dfengine.wording import counted

UNCALIBRATED = "the checkpoint is not calibrated: a threshold of 0.5 is used; set one with `dfengine calibrate`"

WRONG_WAY_ROUND = (
    "defective images score lower than sound ones; are the labels, or the detector, the wrong way round?"
)
"""Of an image AUROC below 0.5."""


def say(text: str) -> None:
    """One line on standard output, as it is."""
    OutputConsole(soft_wrap=True, highlight=False, markup=False).print(text)


def warn(text: str) -> None:
    """One line on standard error: what was done, but may not be what is wanted."""
    print_error(f"warning: {text}")


def open_detector(checkpoint: Path, device: str, precision: str, seed: int, threshold: float | None = None) -> Detector:
    """A detector that has a threshold: the given one, else the checkpoint's, else 0.5 with a warning."""
    detector = load(checkpoint, device, precision, seed)
    if threshold is not None:
        detector.calibration = Calibration.by_hand(threshold)
    elif detector.calibration is None:
        warn(UNCALIBRATED)
        detector.calibration = Calibration.by_hand(0.5)
    # A precision that "auto" chose passed its trial: the threshold holds within the tolerance.
    chosen = detector.precision if precision != "auto" else detector.calibration.precision
    for name, used in (("seed", detector.seed), ("precision", chosen)):
        set_with = getattr(detector.calibration, name)
        if set_with is not None and set_with != used:
            warn(f"the threshold was set with {name} {set_with}, but {name} {used} is used: it may not hold")
    if detector.calibration.n_normals and not detector.calibration.estimated:
        warn(f"{detector.calibration.message} Calibrate with more normal images (`dfengine calibrate`)")
    return detector


@dataclass
class Scoring:
    """Scores inputs batch by batch with a progress bar; keeps the refusals (name, reason) and the time.

    `refused` is for the exit status and the report, so callers add what else could not be read (the mask of an image
    that was scored, say); `inputs_refused` counts the inputs among it, and is what the summary says.
    """

    detector: Detector
    batch_size: int
    original_size: bool = False
    scored: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    inputs_refused: int = 0
    seconds: float = 0.0
    stopped: bool = False

    def batches(self, images: Sequence[InputImage]) -> Iterator[Detection]:
        """The `Detection` of each batch; each refused image is reported on standard error as it is met.

        An error that ends the scoring early (out of memory, say) is reported too, and what was scored is kept.
        """
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        start = time.perf_counter()
        console = OutputConsole(stderr=True)
        # A bar that is not shown would leave an empty line.
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("scoring", total=len(images))
            for detection in self._detections(images):
                for error in detection.errors:
                    print_error(f"{error.name}: {error.reason}")
                self.refused += [(error.name, error.reason) for error in detection.errors]
                self.inputs_refused += len(detection.errors)
                self.scored += len(detection)
                progress.advance(task, len(detection) + len(detection.errors))
                yield detection
        self.seconds = time.perf_counter() - start

    def _detections(self, images: Sequence[InputImage]) -> Iterator[Detection]:
        try:
            yield from self.detector.stream(images, self.batch_size, self.original_size)
        except DfengineError as error:
            self.stopped = True
            print_error(str(error))

    @property
    def status(self) -> int:
        """0 = all scored, 3 = some refused, 1 = nothing could be scored."""
        if not self.scored:
            return 1
        return 3 if self.refused or self.stopped else 0

    def summary(self) -> str:
        """One line: how many images, refusals, and how fast."""
        pace = f", {self.scored / self.seconds:.1f} images/s" if self.scored and self.seconds else ""
        refused = f", {self.inputs_refused} refused" if self.inputs_refused else ""
        return f"{counted(self.scored, 'image')} scored{refused}{pace}"

    def meta(self, checkpoint: Path, sources: str) -> dict[str, object]:
        """What the report says about the run."""
        detector = self.detector
        return {
            "checkpoint": checkpoint,
            "model": f"{detector.config.preset}, {detector.config.image_size} pixels",
            "images": sources,
            "device": f"{detector.device}, {detector.precision}",
            "seed": detector.seed,
            "dfengine": __version__,
            "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }


def report_items(detection: Detection, truth: Callable[[str], tuple[str | None, Any]]) -> Iterator[ReportItem]:
    """Cards of the report; `truth(name)` gives the kind ("good", a defect, None) and the true mask at map size."""
    for image in detection:
        kind, mask = truth(image.name)
        yield ReportItem(
            name=image.name,
            score=image.pred_score,
            calibrated=image.pred_score_calibrated,
            label=image.pred_label,
            truth=kind,
            image=image.image,
            reconstruction=(image.reconstruction.clip(0, 1) * 255).round().astype("uint8"),
            anomaly_map=image.anomaly_map,
            mask=mask,
        )


class Outputs:
    """Writes results one by one: a file that cannot be written is reported once, and the rest of the run goes on.

    For `with`: no other run writes into the folder meanwhile. Raises `DfengineError` where one does.
    """

    def __init__(self, out: Path, images: Sequence[InputImage], names: Sequence[str]):
        """names: of the files that the run will write into `out`, heatmaps aside."""
        self.out = out
        self._names = names
        self.failed = 0
        self._images = images
        self._held = ExitStack()

    def __enter__(self) -> Outputs:
        out, images = self.out, self._images
        target = Path(os.path.realpath(out))  # unlike Path.resolve, it takes links that lead in a circle
        paths = (Path(os.path.realpath(image.path)) for image in images if image.path is not None)
        if any(target in path.parents for path in paths):
            raise UsageError(f"{out}: holds images to score; choose another folder for the results")
        earlier_results(out)
        make_folder(out)
        self._held.enter_context(locked(out / OUTPUT_MARKER, f"{out}: {BUSY}"))
        leftovers = earlier_results(out)
        if leftovers:
            say(f"replacing the results of an earlier run in {out}")
        for leftover in leftovers:
            self.attempt(lambda leftover=leftover: remove(leftover))
        stayed = [path.relative_to(out).as_posix() for path in leftovers if os.path.lexists(path)]
        self.attempt(lambda: begin_results(out, [*self._names, *stayed]))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def attempt(self, write: Callable[[], Any]) -> Any:
        """The result of `write()`; None where it raised `DfengineError`, which is reported (the first three times)."""
        try:
            return write()
        except DfengineError as error:
            self.failed += 1
            if self.failed <= 3:
                print_error(str(error))
            return None

    def heatmaps(self, detection: Detection, first: int) -> list[Path | None]:
        """Writes each image's overlay; the files' paths relative to the output folder, None where that failed."""
        files = []
        names = (f"heatmaps/{heatmap_name(first + i, name)}" for i, name in enumerate(detection.names))
        self.attempt(lambda: list_result(self.out, *names))
        for i in range(len(detection)):
            written = self.attempt(lambda i=i: detection[i : i + 1].save_heatmaps(self.out / "heatmaps", first + i))
            files.append(written[0].relative_to(self.out) if written else None)
        return files

    def rows(self, rows: Iterable[dict]) -> None:
        """Writes results.csv and results.jsonl."""
        self.attempt(lambda: write_rows(self.out, list(rows)))

    def status(self, scoring: Scoring) -> int:
        """The command's exit status: that of the scoring, or 3 where some output could not be written."""
        if self.failed:
            print_error(f"{counted(self.failed, 'output file')} could not be written")
        return scoring.status or (3 if self.failed else 0)
