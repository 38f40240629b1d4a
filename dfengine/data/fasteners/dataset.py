"""Write a fastener data set in the MVTec layout."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dfengine.data.fasteners.render import render_fastener
from dfengine.data.fasteners.scene import DEFECTS, VARIETY
from dfengine.files import atomic_write


def write_fasteners(
    out: Path | str,
    train: int = 176,
    test_good: int = 100,
    per_defect: int = 40,
    seed: int = 0,
    size: int = 256,
    variety: float = VARIETY,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render and write train/good/NNN.png, test/<defect>/NNN.png and ground_truth/<defect>/NNN_mask.png under `out`.

    Masks are 8-bit gray, 0 or 255; test/good has none. `progress(done, total)` is called after each picture. The same
    arguments write the same bytes. Raises DfengineError naming the path if a file or folder cannot be written, and
    UsageError for a bad seed, size or variety.
    """
    out = Path(out)
    plan = [("train", "good", i) for i in range(train)] + [("test", "good", i) for i in range(test_good)]
    plan += [("test", defect, i) for defect in DEFECTS[1:] for i in range(per_defect)]
    for done, (split, defect, index) in enumerate(plan, start=1):
        image, mask = render_fastener(seed, index, defect, size, split, variety)
        _write_png(out / split / defect / f"{index:03d}.png", image)
        if defect != "good":
            _write_png(out / "ground_truth" / defect / f"{index:03d}_mask.png", mask.astype(np.uint8) * 255)
        if progress is not None:
            progress(done, len(plan))


def _write_png(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png", compress_level=4)
    atomic_write(path, buffer.getvalue())
