"""Reading images without losing depth, and the one way they are resized (DESIGN section 3, "Bad input").

An *array image* is (H, W, 3) RGB, dtype uint8, uint16 or float32 in [0, 1]. A *unit image* is float32 in [0, 1].

Conventions:
- 8-bit files stay uint8, deeper integers become uint16, float files (TIFF) must be finite and in [0, 1].
- Gray is repeated to three channels; 1-bit reads as 0 and 255; of several frames or pages the first is read.
- White is 255 or 65535: nothing is stretched, and of 12 bits kept in 16 as they are, which would be dark, there is a
  warning.
- Alpha is composited over black: what was transparent is black, so colours hidden under it are never shown.
- The orientation in EXIF is applied, so the array is what an image viewer shows.
- Decoding finds any missing byte: a truncated file is refused, never filled up.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np

from dfengine.data.decode import (
    FORMATS,
    MAX_PIXELS,
    MIN_SIDE,
    STRIP_VALUES,
    check_dtype,
    check_range,
    decode_file,
)
from dfengine.errors import DataError, ImageError
from dfengine.files import OUTPUT_MARKER, os_reason
from dfengine.wording import counted

__all__ = [
    "FORMATS", "IMAGE_SUFFIXES", "MAX_PIXELS", "MIN_SIDE", "list_images", "load_uint8", "load_unit", "natural_key",
    "read_image", "read_mask", "resize_unit", "resize_weights", "to_unit", "walk",
]

log = logging.getLogger("dfengine")

IMAGE_SUFFIXES = frozenset((".png", ".apng", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".bmp", ".webp", ".gif"))
# Images too, but refused when read. They are listed, so that the report names them instead of passing over them.
UNREADABLE_SUFFIXES = frozenset((".heic", ".heif", ".avif", ".jp2", ".ppm", ".pgm", ".psd", ".dng", ".raw", ".cr2"))


def read_image(path: str | os.PathLike) -> np.ndarray:
    """The array image in a file, at its native depth and size, with a warning where 16 bits hold 12 or fewer.

    Raises ImageError(name as given, reason).
    """
    return decode_file(path)


def read_mask(path: str | os.PathLike, shape: tuple[int, int] | None = None) -> np.ndarray:
    """A ground-truth mask, bool (H, W): any non-zero value is anomalous.

    With `shape`, a mask of another size but the same aspect (to one pixel) is resized by nearest neighbour; any
    other size is refused. JPEG is refused: its compression leaves non-zero pixels everywhere. Raises ImageError.
    """
    name = os.fspath(path)
    mask = decode_file(name, mask=True).any(axis=2)
    if shape is None or mask.shape == tuple(shape):
        return mask
    (h, w), (height, width) = mask.shape, shape
    # The aspect agrees when the mask, scaled by one side, fits the other to a pixel of the coarser grid.
    if abs(h * width - w * height) > max(h, w, height, width):
        raise ImageError(name, f"the mask is {w}x{h}, its image {width}x{height}")
    rows = (2 * np.arange(height) + 1) * h // (2 * height)
    columns = (2 * np.arange(width) + 1) * w // (2 * width)
    return mask[rows[:, None], columns]


def to_unit(array: np.ndarray, name: str = "image") -> np.ndarray:
    """An array of any shape as float32 in [0, 1]: uint8 / 255, uint16 / 65535, bool as 0 and 1, floats as they are.

    Raises ImageError when floats are not finite or outside [0, 1] (1e-6 is allowed for rounding, and clipped),
    and for any other dtype.
    """
    if array.dtype == np.uint8:
        return np.divide(array, np.float32(255), dtype=np.float32)
    if array.dtype == np.uint16:
        return np.divide(array, np.float32(65535), dtype=np.float32)
    if array.dtype == bool:
        return array.astype(np.float32)
    check_dtype(array.dtype, name)
    if array.size:
        check_range(float(array.min()), float(array.max()), name)
    return np.clip(array, 0, 1).astype(np.float32)


def resize_unit(array: np.ndarray, size: int, name: str = "image") -> np.ndarray:
    """An array image stretched to a square unit image, float32 (size, size, 3).

    Each axis on its own: averaged by area when it shrinks, linear (pixel centres aligned, edges repeated) when it
    grows; both in float32 from the native depth. `resize_weights` is the same as matrices. A side that has the
    size already is not touched. The result does not depend on the number of threads. Beyond the input it needs
    the smaller of the two half-resized images and a strip, never a float copy of the whole.
    Raises ImageError as `to_unit` does.
    """
    height, width = array.shape[:2]
    if height == width == size:
        return np.ascontiguousarray(to_unit(array, name))
    rows_first = height > width  # the axis that leaves less in between
    half = np.empty((size, width, 3) if rows_first else (height, size, 3), np.float32)
    length, across = (width, height) if rows_first else (height, width)
    step = max(1, STRIP_VALUES // (3 * across))
    for start in range(0, length, step):
        strip = slice(start, min(start + step, length))
        if rows_first:
            half[:, strip] = _resize_axis(to_unit(array[:, strip], name), 0, size)
        else:
            half[strip] = _resize_axis(to_unit(array[strip], name), 1, size)
    return np.clip(_resize_axis(half, 1 if rows_first else 0, size), 0, 1)


def resize_weights(length: int, size: int) -> np.ndarray:
    """The resampling of one axis in `resize_unit` as a matrix, float64 (size, length); its rows sum to 1."""
    weights = np.zeros((size, length))
    if length > size:
        edges = np.arange(size + 1) * (length / size)
        for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
            first, last = int(low), min(int(np.ceil(high)), length)
            pixels = np.arange(first, last)
            weights[i, first:last] = np.minimum(pixels + 1, high) - np.maximum(pixels, low)
        return weights * (size / length)
    centres = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    low = np.floor(centres).astype(int)
    np.add.at(weights, (np.arange(size), low), 1 - (centres - low))
    np.add.at(weights, (np.arange(size), np.minimum(low + 1, length - 1)), centres - low)
    return weights


def load_unit(path: str | os.PathLike, size: int) -> np.ndarray:
    """`read_image` and `resize_unit`: float32 (size, size, 3) in [0, 1]."""
    return resize_unit(read_image(path), size, os.fspath(path))


def load_uint8(path: str | os.PathLike, size: int) -> np.ndarray:
    """`load_unit` rounded to uint8 (size, size, 3)."""
    return np.rint(load_unit(path, size) * 255).astype(np.uint8)


def list_images(
    folder: str | os.PathLike,
    recursive: bool = True,
    others: bool = False,
    unreadable: dict[Path, str] | None = None,
) -> list[Path]:
    """The image files of a folder (by suffix), in natural order: frame2 before frame10.

    Hidden names and subfolders that dfengine wrote are passed over, and so are those of ground-truth masks, with a
    warning; linked folders are followed once. Whether a file is readable shows when it is read.
    others: warn of files that are passed over too, for a suffix may be mistyped; not of what systems leave in folders.
    unreadable: takes the folders below that cannot be read, with the reason; the others are listed.
    Raises DataError when the folder is missing, unreadable, one that dfengine wrote, or holds no image, and, without
    `unreadable`, when a folder below it cannot be read.
    """
    folder = Path(folder)
    try:
        if not folder.is_dir():
            raise DataError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    except OSError as error:
        raise DataError(f"{folder}: {os_reason(error)}") from error
    if _is_output(folder):
        what = "results or pictures of a training run"
        raise DataError(f"{folder}: holds what dfengine wrote ({what}), no images to read; give another folder")

    def refuse(error: OSError) -> None:
        place = Path(error.filename or folder)
        if unreadable is None or place == folder:
            raise DataError(f"{place}: {os_reason(error)}") from error
        unreadable[place] = os_reason(error)

    images, masks, odd = [], [], []
    for parent, folders, files in walk(folder, refuse):
        folders[:] = sorted(f for f in folders if recursive and _is_input(Path(parent, f)))
        masks += [Path(parent, f) for f in folders if _holds_masks(Path(parent, f))]
        folders[:] = [f for f in folders if Path(parent, f) not in masks]
        for name in files:
            listed = not name.startswith(".") and _has_suffix(name)
            (images if listed else odd).append(Path(parent, name))
    odd = sorted((path for path in odd if not _is_litter(path.name)), key=natural_key)
    if not images and not unreadable:
        held = f"; it holds {_some(path.name for path in odd)}" if odd else ""
        raise DataError(f"{folder}: no image in this folder ({FORMATS}){held}")
    if masks:
        log.warning("%s: holds ground-truth masks, which are left out", _some(map(str, masks)))
    if others and odd:
        _say_left_out(folder, counted(len(odd), "file"), _some(str(path.relative_to(folder)) for path in odd))
    return sorted(images, key=natural_key)


def walk(
    folder: Path, onerror: Callable[[OSError], None] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` from the top, into linked folders too, and into each folder once."""
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=onerror, followlinks=True):
        identity = os.path.realpath(parent)
        if identity in seen:
            folders[:] = []
            continue
        seen.add(identity)
        yield parent, folders, files


@functools.lru_cache(64)
def _say_left_out(folder: Path, count: str, names: str) -> None:
    """Once: a folder may be looked at several times."""
    log.warning("%s: %s left out, no image by name: %s", folder, count, names)


def _has_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | UNREADABLE_SUFFIXES


def _is_litter(name: str) -> bool:
    """Whether a file is what operating systems leave in folders: hidden ones, but for a hidden image, are."""
    if name.startswith("."):
        return name.startswith("._") or not _has_suffix(name)
    return name.lower() in ("thumbs.db", "ehthumbs.db", "desktop.ini")


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _is_input(folder: Path) -> bool:
    return not folder.name.startswith(".") and not _is_output(folder)


def _is_output(folder: Path) -> bool:
    """Whether dfengine wrote a folder: it has the marker, or holds the heatmaps or panels of one that has it."""
    real = Path(os.path.realpath(folder))  # links are followed, and "." has no name
    marked = [real, real.parent] if real.name in ("heatmaps", "panels") else [real]
    return any(os.path.exists(place / OUTPUT_MARKER) for place in marked)


def _holds_masks(folder: Path) -> bool:
    """Whether a folder is where MVTec AD, VisA or DAGM 2007 keep their masks: beside or below images."""
    if folder.name == "Masks":
        return os.path.isdir(folder.parent / "Images")  # False where it may not look
    return folder.name == "ground_truth" or (folder.name == "Label" and os.path.isfile(folder / "Labels.txt"))


def natural_key(path: str | os.PathLike) -> tuple:
    """Sorts numbers inside names by value; the name itself breaks ties such as 1 and 01."""
    text = os.fspath(path)
    parts = (tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", part.lower()) if p)
             for part in Path(text).parts)
    return tuple(parts), text


def _resize_axis(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    """One axis of a float32 (H, W, 3) array resized."""
    length = values.shape[axis]
    if length == size:
        return values
    shape = (size, values.shape[0]) if axis == 1 else (values.shape[1], size)
    method = cv2.INTER_AREA if length > size else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(values), shape, interpolation=method)
