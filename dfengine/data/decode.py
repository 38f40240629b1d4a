"""Decoding image files to array images without losing depth, or refusing them with the reason.

Pillow decodes what has 8 bits a channel, OpenCV 16-bit PNG, tifffile deep and float TIFF: each where the others lose
bits. The conventions are those of `dfengine.data.images`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import cv2
import numpy as np
import tifffile
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from dfengine.errors import DfengineError, ImageError
from dfengine.files import os_reason

MIN_SIDE = 8
MAX_PIXELS = 100_000_000
MOST_DIM = 3
FORMATS = "PNG, JPEG, TIFF, BMP, WebP, GIF"

# Decoders by the first bytes, called directly: Image.open would warn about or refuse large images by its own
# limit, and would try formats nobody asked for.
_DECODERS = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    (re.compile(rb"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImagePlugin.TiffImageFile),
    (re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    (re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
)
_ORIENTATION = 0x0112
STRIP_VALUES = 1 << 22  # values widened at a time, so that no large image is ever copied whole: 16 MB of float32

# A refusal carries its reason, and damaged metadata does not matter: neither needs a line of the decoder's own.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin")


def decode_file(path: str | os.PathLike, mask: bool = False) -> np.ndarray:
    """The array image in a file, at its native depth and size, with a warning where 16 bits hold 12 or fewer.

    mask: refuses JPEG, and does not warn. Raises ImageError(name as given, reason).
    """
    name = os.fspath(path)
    with _open(name) as file, _refusing(name):
        decoder = _decoder(file, name)
        if mask and decoder is JpegImagePlugin.JpegImageFile:
            raise ImageError(name, "a JPEG mask has no exact zeros; save it as PNG")
        values = _decode(file, decoder, name)
        if not mask:
            say_if_few_bits(values, name)
        return _to_rgb(values, name)


def pil_to_array(image: Image.Image, name: str) -> np.ndarray:
    """The array image in a PIL image (its current frame), by the conventions above, with a warning where 16 bits hold
    12 or fewer. Raises ImageError."""
    with _refusing(name):
        check_size(image.height, image.width, name)
        _load_whole(image)
        values = _upright(_pil_values(image, name), _exif_orientation(image))
        say_if_few_bits(values, name)
        return _to_rgb(values, name)


def check_dtype(dtype: np.dtype, name: str) -> None:
    """Raises ImageError unless pixels of this dtype have a known white: uint8, uint16, bool or floating."""
    if dtype not in (np.uint8, np.uint16, bool) and not np.issubdtype(dtype, np.floating):
        raise ImageError(name, f"pixels of type {dtype}; expected uint8, uint16 or float in [0, 1]")


def check_range(low: float, high: float, name: str) -> None:
    """Raises ImageError unless float pixels with this minimum and maximum (NaN if any is) are in [0, 1]."""
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError(name, "pixels that are not finite (NaN or infinity)")
    if low < -1e-6 or high > 1 + 1e-6:
        raise ImageError(name, f"float pixels from {low:.6g} to {high:.6g}; expected [0, 1]")


def check_size(height: int, width: int, name: str) -> None:
    """Raises ImageError for less than MIN_SIDE pixels on a side or more than MAX_PIXELS in all."""
    if min(height, width) < MIN_SIDE:
        raise ImageError(name, f"too small: {width}x{height} pixels, at least {MIN_SIDE}x{MIN_SIDE} needed")
    if height * width > MAX_PIXELS:
        raise ImageError(name, f"too large: {width}x{height} pixels, at most {MAX_PIXELS // 10**6} megapixels")


# Files

@contextlib.contextmanager
def _open(name: str) -> Iterator[BinaryIO]:
    """The file, open for reading; only regular files, since reading a pipe or a device may never end."""
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(name, "not a regular file")
        file = open(name, "rb")
    except ValueError as error:
        raise ImageError(name, "not a file name") from error
    except OSError as error:
        raise ImageError(name, "is a folder, not an image" if error.errno == errno.EISDIR else os_reason(error)) \
            from error
    with file:
        if status.st_size == 0:
            raise ImageError(name, "the file is empty")
        yield file


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises on bad bytes, of any type, into an ImageError."""
    try:
        yield
    except DfengineError:
        raise
    except MemoryError as error:
        raise ImageError(name, "not enough memory to read it") from error
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno is not None:
            reason = os_reason(error)
        elif re.search(r"truncated|not enough|end of (file|data)|unexpected eof|incomplete|buffer is too", text, re.I):
            reason = "the file is truncated"
        else:
            reason = f"the file is damaged ({text[:100] or type(error).__name__})"
        raise ImageError(name, reason) from error


def _decoder(file: BinaryIO, name: str) -> type[Image.Image]:
    head = file.read(16)
    file.seek(0)
    for magic, decoder in _DECODERS:
        if magic.match(head):
            return decoder
    raise ImageError(name, f"not an image that can be read ({FORMATS})")


def _decode(file: BinaryIO, decoder: type[Image.Image], name: str) -> np.ndarray:
    """The upright pixels of a file, as `_to_rgb` takes them."""
    if decoder is TiffImagePlugin.TiffImageFile:
        values = _deep_tiff(file, name)
        if values is not None:
            return values
    if decoder is WebPImagePlugin.WebPImageFile and _riff_length(file) > os.fstat(file.fileno()).st_size:
        raise ImageError(name, "the file is truncated")
    image = decoder(file)
    check_size(image.height, image.width, name)
    _load_whole(image)
    if decoder is PngImagePlugin.PngImageFile and _png_depth(file) == 16:
        # Pillow keeps 8 bits of 16-bit colour. It has checked that the file is whole; OpenCV gives the values.
        values = _png16(file, name)
    else:
        values = _pil_values(image, name)
    values = _upright(values, _exif_orientation(image))
    with contextlib.suppress(Exception):  # damage in what is not read is no reason to refuse what is
        if getattr(image, "is_animated", False):
            _say_first_of_several(name)
    return values


@functools.lru_cache(4096)
def _say_first_of_several(name: str) -> None:
    """Once a process: a file may be read several times."""
    logging.getLogger("dfengine").warning("%s: holds several frames or pages; the first is read", name)


_dim: set[str] = set()
_dim_lock = threading.Lock()


def say_if_few_bits(values: np.ndarray, name: str) -> None:
    """Warns of a 16-bit image whose largest value is that of 12 bits or less: from a camera of 12 bits, perhaps, or of
    8, but a dark picture looks the same. A process names the first `MOST_DIM`: a camera gives all its pictures alike.

    values: (H, W) or (H, W, C) as the image holds them, of which colours alone are looked at, before alpha (the last
    of 2 or 4 channels) dims them; nothing is said of other types than uint16.
    """
    if values.dtype == np.uint16:
        with_alpha = values.ndim == 3 and values.shape[2] in (2, 4)
        say_if_few(int((values[..., :-1] if with_alpha else values).max()), name)


def say_if_few(largest: int, name: str) -> None:
    """`say_if_few_bits` of an image in uint16 by the largest value of its colours."""
    if not 0 < largest < 1 << 12:
        return
    with _dim_lock:
        if name in _dim or len(_dim) == MOST_DIM:
            return
        _dim.add(name)
        last = "; no other such image will be named" if len(_dim) == MOST_DIM else ""
        bits = max(8, largest.bit_length())
        # Still under the lock: another thread's may be the last, and must not come before.
        logging.getLogger("dfengine").warning(
            "%s: a 16-bit image that uses only values up to %d of 65535; unless it is dark, it holds %d bits: multiply "
            "its values by %d%s", name, largest, bits, 1 << (16 - bits), last,
        )


# Decoders. Each returns (H, W) or (H, W, C) with C of 1 to 4: gray, gray + alpha, RGB, RGB + alpha.

_loading = threading.Lock()
_loads = 0  # images being loaded now, by all threads
_lenient = False  # what the caller's program had set before the first of them


def _load_whole(image: Image.Image) -> None:
    """image.load(), raising on a truncated file even in a program that has told Pillow to fill up what is missing."""
    global _loads, _lenient
    with _loading:
        if _loads == 0:
            _lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _loads += 1
    try:
        image.load()
    finally:
        with _loading:
            _loads -= 1
            if _loads == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _lenient


def _pil_values(image: Image.Image, name: str) -> np.ndarray:
    mode = image.mode
    if mode == "F":
        return np.asarray(image)
    if mode == "I" or mode.startswith("I;16"):
        return _to_uint16(np.asarray(image), name)
    if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return np.asarray(image.convert("RGBA"))
    if mode in ("RGBa", "La"):  # premultiplied: composited over black already
        return np.asarray(image)[..., :-1]
    if mode in ("L", "RGB"):
        return np.asarray(image)
    if mode == "1":
        return np.asarray(image.convert("L"))
    if mode in ("RGBX", "P", "CMYK", "YCbCr", "HSV"):
        return np.asarray(image.convert("RGB"))
    raise ImageError(name, f"colours of type {mode}; save it as RGB or gray")


def _riff_length(file: BinaryIO) -> int:
    length = int.from_bytes(file.read(8)[4:], "little") + 8
    file.seek(0)
    return length


def _png_depth(file: BinaryIO) -> int:
    file.seek(24)
    return file.read(1)[0]


def _png16(file: BinaryIO, name: str) -> np.ndarray:
    file.seek(0)
    data = file.read()
    if b"IEND\xaeB`\x82" not in data:  # the pixels may be whole, but OpenCV refuses
        raise ImageError(name, "the file is truncated")
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ImageError(name, "the file is damaged")
    if values.ndim == 3:
        values = values[..., [2, 1, 0, 3][: values.shape[2]]]
    return values


def _deep_tiff(file: BinaryIO, name: str) -> np.ndarray | None:
    """The upright pixels of the first page of a TIFF of more than 8 bits, as `_to_rgb` takes them; None for 8 bits and
    less, which Pillow reads."""
    with tifffile.TiffFile(file) as tiff:
        try:
            page = tiff.pages.first
        except IndexError as error:
            raise ImageError(name, "the file is truncated") from error
        check_size(page.imagelength, page.imagewidth, name)
        end = file.seek(0, os.SEEK_END)
        if any(count <= 0 or offset + count > end
               for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise ImageError(name, "the file is truncated")
        if page.bitspersample <= 8:
            file.seek(0)
            return None
        if page.photometric not in (0, 1, 2) or page.imagedepth != 1 or page.axes not in ("YX", "YXS", "SYX"):
            raise ImageError(name, "a TIFF with a pixel layout that cannot be read; save it as RGB or gray")
        values = page.asarray()
        if page.axes == "SYX":
            values = np.moveaxis(values, 0, 2)
        if np.issubdtype(values.dtype, np.integer):
            if page.bitspersample < 16:
                white = 2 ** page.bitspersample - 1
                values = (values.astype(np.uint32) * 65535 + white // 2) // white
            values = _to_uint16(values, name)
        else:
            values = values.astype(np.float32)
        if page.photometric == 0:  # zero is white
            values = np.array(1 if values.dtype == np.float32 else 65535, values.dtype) - values
        colours = 3 if page.photometric == 2 else 1
        if values.ndim == 3:
            # Of the extra samples only one that is called unassociated alpha still has to be composited.
            alpha = page.extrasamples[:1] == (2,)
            values = values[..., : colours + alpha]
        orientation = page.tags.valueof(274, 1)
        if len(tiff.pages) > 1:
            _say_first_of_several(name)
    return _upright(values, orientation)


def _to_uint16(values: np.ndarray, name: str) -> np.ndarray:
    """Integers of any width as uint16. Wider ones say nothing about their white, so they must fit in 16 bits."""
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(name, f"integer pixels from {low} to {high}; expected 0 to 65535")
    return values.astype(np.uint16)


# Pixels

def _exif_orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to refuse the pixels
        return 1


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values


def _to_rgb(values: np.ndarray, name: str) -> np.ndarray:
    """Gray or RGB, with or without alpha -> a contiguous, writable array image, checked when float."""
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] in (2, 4):
        values = over_black(values)
    if values.dtype == np.float32:
        check_range(float(values.min()), float(values.max()), name)
        values = np.clip(values, 0, 1)
    return np.repeat(values, 3, axis=2) if values.shape[2] == 1 else np.require(values, requirements=("C", "W"))


def over_black(values: np.ndarray) -> np.ndarray:
    """(H, W, C + alpha) -> (H, W, C): colour times alpha, rounded to nearest in integer types."""
    colour, alpha = values[..., :-1], values[..., -1:]
    if not np.issubdtype(values.dtype, np.integer):
        return colour * alpha
    white = np.iinfo(values.dtype).max
    if alpha.min() == white:
        return colour
    out = np.empty(colour.shape, values.dtype)
    step = max(1, STRIP_VALUES // max(1, colour[0].size))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        out[rows] = (colour[rows].astype(np.uint32) * alpha[rows] + white // 2) // white
    return out
