"""The folder that results are written into: whose it is, and what an earlier run left there.

Its marker lists what dfengine wrote into it, a name a line: what is not listed is somebody else's, and stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from dfengine.data.images import IMAGE_SUFFIXES, walk
from dfengine.errors import DfengineError, UsageError
from dfengine.files import OUTPUT_MARKER, atomic_write, os_reason

RESULTS = (
    "results.csv", "results.jsonl", "report.html", "heatmaps/[0-9]*_*.png", "metrics.json", "per_defect.csv", "roc.png",
    "pr.png", "robustness.csv", "demo.json",
)  # fmt: skip
"""What is written into such a folder, and removed from it when it is written into again: results of an earlier run must
not pass for those of this one."""


def earlier_results(folder: Path) -> list[Path]:
    """The files that an earlier run left in `folder`; none where there is no such folder.

    Raises `UsageError` for files of somebody else under the names of results and of the folder of heatmaps, and for a
    folder without the marker of dfengine that holds images, which the marker would hide from later runs.
    """
    heatmaps = folder / "heatmaps"
    if os.path.lexists(heatmaps) and not heatmaps.is_dir():
        raise UsageError(f"{folder}: holds heatmaps, not a folder written by dfengine; choose another folder")
    found = [path for pattern in RESULTS for path in folder.glob(pattern)]
    listed = listed_results(folder)
    theirs = {path.relative_to(folder).as_posix() for path in found}.difference(listed or ())
    if theirs and listed != []:  # an empty one, of an earlier version, vouches for all
        raise UsageError(f"{folder}: holds {min(theirs)}, not written by dfengine; choose another folder")
    if listed is None:
        refuse_images(folder, "the results")
    return found


def listed_results(folder: Path) -> list[str] | None:
    """What the marker of `folder` lists; None where there is none."""
    marker = folder / OUTPUT_MARKER
    return marker.read_text(encoding="utf-8", errors="replace").splitlines() if marker.is_file() else None


def list_result(folder: Path, *names: str) -> None:
    """Note in the marker what is about to be written, by its path in `folder`. Raises `DfengineError` where that
    fails."""
    try:
        with open(folder / OUTPUT_MARKER, "a", encoding="utf-8") as marker:
            marker.writelines(f"{name}\n" for name in names)
    except OSError as error:
        raise DfengineError(f"{folder}: cannot be written: {os_reason(error)}") from error


def begin_results(folder: Path, names: Iterable[str]) -> None:
    """Make the marker of a folder from which the results of earlier runs are gone; `names` are to be written there."""
    atomic_write(folder / OUTPUT_MARKER, "".join(f"{name}\n" for name in names))


def refuse_images(folder: Path, what: str) -> None:
    """Raises `UsageError` where there are images in `folder`, or behind links in it, into which `what` is to be
    written."""
    if any(Path(name).suffix.lower() in IMAGE_SUFFIXES for _, _, files in walk(folder) for name in files):
        raise UsageError(f"{folder}: holds images; choose another folder for {what}")
