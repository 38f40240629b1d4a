"""The folder that results are written into: whose it is, and what an earlier run left there."""

from __future__ import annotations

from pathlib import Path

from dfengine.data.images import IMAGE_SUFFIXES
from dfengine.errors import UsageError
from dfengine.files import OUTPUT_MARKER

RESULTS = (
    "results.csv", "results.jsonl", "report.html", "heatmaps/[0-9]*_*.png", "metrics.json", "per_defect.csv", "roc.png",
    "pr.png", "robustness.csv", "demo.json",
)  # fmt: skip
"""What is written into such a folder, and removed from it when it is written into again: results of an earlier run must
not pass for those of this one."""


def earlier_results(folder: Path) -> list[Path]:
    """The files that an earlier run left in `folder`; none where there is no such folder.

    Raises `UsageError` for a folder without the marker of dfengine that holds images, which the marker would hide from
    later runs, or files of somebody else under the names of results.
    """
    found = [path for pattern in RESULTS for path in folder.glob(pattern)]
    if (folder / OUTPUT_MARKER).exists():
        return found
    if found:
        theirs = found[0].relative_to(folder)
        raise UsageError(f"{folder}: holds {theirs}, not written by dfengine; choose another folder")
    refuse_images(folder, "the results")
    return found


def refuse_images(folder: Path, what: str) -> None:
    """Raises `UsageError` where there are images in `folder`, into which `what` is to be written."""
    if any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*")):
        raise UsageError(f"{folder}: holds images; choose another folder for {what}")
