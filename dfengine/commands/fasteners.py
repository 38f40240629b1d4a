"""`dfengine fasteners`: render a data set of procedural fasteners."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from dfengine.console import OutputConsole
from dfengine.data.fasteners import write_fasteners
from dfengine.errors import UsageError
from dfengine.files import make_folder
from dfengine.results import refuse_images
from dfengine.wording import counted


def run_fasteners(out: Path, train: int, test_good: int, per_defect: int, size: int, seed: int, variety: float) -> None:
    """Writes the data set with a progress bar. Raises `DfengineError` where `out` cannot be written."""
    if not train + test_good + per_defect:
        raise UsageError("--train, --test-good and --per-defect are all 0: there is nothing to render")
    for split in ("train", "test"):
        if (out / split).exists():
            raise UsageError(f"{out}: holds a data set already ({split}/); choose another folder, or remove it first")
    refuse_images(out, "a data set")
    make_folder(out)
    console = OutputConsole()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("rendering fasteners", total=None)
        write_fasteners(
            out, train, test_good, per_defect, seed, size, variety,
            lambda done, total: progress.update(task, completed=done, total=total),
        )  # fmt: skip
    console.print(
        f"{counted(train, 'normal training image')}, {test_good} normal and "
        f"{counted(3 * per_defect, 'defective test image')} with masks in {out} (seed {seed})",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip
