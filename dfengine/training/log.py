"""What a run shows while it goes: a progress bar or plain lines, log.csv, loss.png, panels and TensorBoard scalars."""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dfengine.errors import DfengineError
from dfengine.files import OUTPUT_MARKER, atomic_path, atomic_write
from dfengine.wording import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "step stage progress seconds images noise_loss mask_loss grad_norm rate segmentation_rate "
    "val_noise_loss val_image_auroc val_pixel_auroc val_pixel_ap val_score"
).split()
LOSSES = {
    "noise_loss": "denoising, training photos",
    "val_noise_loss": "denoising, held-out photos",
    "mask_loss": "marking defects, training photos",
}
METRICS = {
    "val_image_auroc": "photos told apart (AUROC)",
    "val_pixel_auroc": "pixels told apart (AUROC)",
    "val_pixel_ap": "pixels, average precision",
}
LINE_SECONDS = 15.0  # between progress lines where there is no terminal


class RunLog:
    """The log of one run in `folder`. A failing disk costs a warning here, never the run.

    `resume_step`: None starts afresh; else rows after that step, written by a run that then died, are dropped.
    """

    def __init__(self, folder: Path, console: Console | None, resume_step: int | None = None):
        self.folder = folder
        self.console = console or Console(stderr=True)
        self.rows: list[dict[str, float]] = []
        if resume_step is not None:
            self.rows = [row for row in read_log(folder / "log.csv") if row["step"] <= resume_step]
        self._next_line = 0.0
        self._bar: Progress | None = None
        self._writer = None
        self._resume_step = resume_step
        self._warned: set[str] = set()
        self._written: int | None = None  # rows

    def __enter__(self) -> RunLog:
        from torch.utils.tensorboard import SummaryWriter

        purge = None if self._resume_step is None else self._resume_step + 1
        self._guard(lambda: self._open(SummaryWriter, purge))
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>5.1f}%")
            self._bar = Progress(*columns, TextColumn("{task.fields[losses]}"), console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=1.0, losses="")
        return self

    def _open(self, writer, purge: int | None) -> None:
        atomic_write(self.folder / OUTPUT_MARKER, "")  # first: without it the next run would not know the folder
        self._writer = writer(str(self.folder / "tensorboard"), purge_step=purge)

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()
        if self._writer:
            self._guard(self._writer.close)
        self._guard(self.write)

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """`say`, with the beginning that the warnings of all commands have."""
        self.say(f"dfengine: warning: {text}")

    def begin(self, progress: float, seconds_left: float | None, steps_left: int | None) -> None:
        """Shows how much is left before the first step: time, or steps where their pace is not known yet."""
        left = f"{counted(steps_left, 'step')} left" if seconds_left is None else f"{_duration(seconds_left)} left"
        if self._bar:
            self._bar.update(self._task, completed=progress, losses=left)
        else:
            self.say(f"{100 * progress:5.1f}% training: {left}")

    def row(self, row: dict[str, float], seconds_left: float) -> None:
        """Records the losses of the last steps (keys among `COLUMNS`) and shows them."""
        self.rows.append(row)
        self._scalars(row)
        losses = f"noise {row['noise_loss']:.4f}"
        if row["stage"] == 2:
            losses += f", mask {row['mask_loss']:.4f}"
        left = f"{_duration(seconds_left)} left"
        name = "joint" if row["stage"] == 2 else "denoiser"
        if self._bar:
            self._bar.update(self._task, completed=row["progress"], description=name, losses=f"{losses}, {left}")
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            self.say(f"{100 * row['progress']:5.1f}% {name} step {row['step']}: {losses}, {left}")

    def validation(self, row: dict[str, float], panel: np.ndarray) -> None:
        """Records a validation (keys `val_*`, and step, stage, progress, seconds) and its panel; rewrites the plots."""
        self.rows.append(row)
        self._scalars(row)
        values = ", ".join(f"{k[4:].replace('_', ' ')} {v:.4f}" for k, v in row.items() if k.startswith("val_"))
        self.say(f"validation at step {row['step']}: {values}")
        self._guard(lambda: save_png(self.folder / "panels" / f"step-{row['step']:07d}.png", panel))
        if self._writer:
            self._guard(lambda: self._writer.add_image("panel", panel, row["step"], dataformats="HWC"))
        self._guard(self.write)

    def write(self) -> None:
        """Writes log.csv and loss.png where they lack rows."""
        if self._written == len(self.rows):
            return
        text = io.StringIO()
        table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        atomic_write(self.folder / "log.csv", text.getvalue())
        if self.rows:
            plot_losses(self.folder / "loss.png", self.rows)
        self._written = len(self.rows)

    def _scalars(self, row: dict[str, float]) -> None:
        if self._writer:
            for key in COLUMNS[5:]:
                if key in row:
                    group = "validation" if key.startswith("val_") else "training"
                    self._guard(lambda k=key, g=group: self._writer.add_scalar(f"{g}/{k}", row[k], row["step"]))

    def _guard(self, write) -> None:
        try:
            write()
        except (OSError, DfengineError) as error:
            reason = str(error)
            if reason not in self._warned:
                self._warned.add(reason)
                self.warn(f"the training log cannot be written: {reason}")


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a log.csv, empty cells left out; no rows where there is no readable log."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if k in COLUMNS and v} for row in csv.DictReader(file)]
    except (OSError, ValueError):
        return []
    whole = ("step", "stage", "images")
    return [{k: int(v) if k in whole else v for k, v in row.items()} for row in rows if "step" in row]


def plot_losses(path: Path, rows: list[dict[str, float]]) -> None:
    """Losses and validation metrics over steps, as a PNG."""
    figure = loss_figure(rows)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def loss_figure(rows: list[dict[str, float]]) -> Figure:
    """`plot_losses` as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, metrics = figure.subplots(2, 1, sharex=True)
    for key, label in LOSSES.items():
        steps, values = _series(rows, key)
        losses.plot(steps, values, label=label, marker="o" if key.startswith("val") else None, linewidth=1)
    losses.set_yscale("log")
    losses.set_ylabel("loss (lower is better)")
    for key, label in METRICS.items():
        metrics.plot(*_series(rows, key), label=label, marker="o", linewidth=1)
    metrics.set_xlabel("training step")
    metrics.set_ylabel("held-out photos with\nsynthetic defects (1 is best)")
    for axes in (losses, metrics):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return figure


def save_png(path: Path, image: np.ndarray) -> None:
    """Writes a uint8 (H, W, 3) image atomically."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if key in row and row[key] > 0]
    return [p[0] for p in points], [p[1] for p in points]


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
