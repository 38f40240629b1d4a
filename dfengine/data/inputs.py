"""The argument of `Detector.detect`: anything that holds images becomes a list of `InputImage`.

    path of a file                      one image, read when it is loaded
    path of a folder                    all its images, subfolders included; one that cannot be read is refused by name
    PIL image                           its current frame, EXIF orientation applied
    NumPy array                         (H, W) | (H, W, C) | (B, H, W, C), channels last
    torch tensor                        (H, W) | (C, H, W) | (B, C, H, W), channels first, any device
    __cuda_array_interface__ | DLPack   as NumPy: channels last; taken over without a copy, on their device
    InputImage                          as `collect_inputs` gives it
    list or tuple                       of any of these, mixed in kind and size
    any other iterable                  likewise: an iterator, a deque, a DataLoader, what has an `__iter__`; but no
                                        dict or set, no bytes, range or `array.array`, and no open file

C is 1 (gray), 3 (RGB) or 4 (RGBA, composited over black). Pixels are uint8, uint16, bool (0 and 1) or float in
[0, 1]; where uint16 holds 12 bits or fewer there is a warning. What is not listed is refused rather than guessed: a
NumPy array (3, H, W), for one.

A problem of the batch itself (nothing in it, a rank that means nothing) raises at once, and so does an item of a list
whose type means nothing. Another problem of one item, and every problem of pixels (not finite, out of range, unreadable
file), stays with its `InputImage` and is raised by its `load`, so that one bad image is reported and the others are
scored.
"""

from __future__ import annotations

import os
from array import array as PlainArray
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dfengine.data.decode import (
    check_dtype,
    check_range,
    check_size,
    over_black,
    pil_to_array,
    say_if_few,
    say_if_few_bits,
)
from dfengine.data.images import list_images, natural_key, read_image, resize_unit, resize_weights
from dfengine.errors import ArgumentTypeError, DataError, ImageError, UsageError

_ITEM = "a path, a PIL image, a NumPy array or a torch tensor"
_BATCH = f"{_ITEM}, or a list or another iterable of these"
_ARRAYS = ("__cuda_array_interface__", "__dlpack__", "__array__", "__array_interface__")
_DTYPES = (torch.uint8, torch.uint16, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class InputImage:
    """One image of a batch. `name` is the path as given, or its place: "batch[3]", or "batch[3][0]" in a nested batch.

    It holds one of these: `array`, (H, W, C) with C of 1, 3 or 4, a NumPy array, or a torch tensor where the pixels
    are on a device; `path` or `image`, which `load` reads, each time anew, so that a long list needs no memory;
    `error`, the reason why it is refused already.
    """

    name: str
    array: np.ndarray | torch.Tensor | None = None
    path: str | Path | None = None
    image: Image.Image | None = None
    error: ImageError | None = None
    _size: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def original_size(self) -> tuple[int, int]:
        """(H, W) before resizing, EXIF orientation applied. Reads the image if `load` has not. Raises ImageError."""
        if self._size is None:
            self._read()
        return self._size

    def load(self, size: int) -> np.ndarray:
        """The unit image, float32 (size, size, 3) in [0, 1], in host memory. Raises ImageError."""
        array = self._read()
        if isinstance(array, torch.Tensor):
            return _resize_tensor(array, size, self.name).cpu().numpy()
        return resize_unit(array, size, self.name)

    def load_tensor(self, size: int, device: str | torch.device | None = "cpu") -> torch.Tensor:
        """`load` as a tensor on `device`, None for where the pixels are. Pixels that are there already never leave it.
        """
        array = self._read()
        if isinstance(array, torch.Tensor):
            unit = _resize_tensor(array, size, self.name)
        else:
            unit = torch.from_numpy(resize_unit(array, size, self.name))
        return unit if device is None else unit.to(device)

    @property
    def one_thread(self) -> bool:
        """Whether no other image may be loaded at the same time: several may share a PIL image, which has a state."""
        return self.image is not None

    def _read(self) -> np.ndarray | torch.Tensor:
        """The pixels: an array image, or a device tensor (H, W, C)."""
        if self.error is not None:
            raise self.error
        if self.path is not None:
            array = read_image(self.path)
        elif self.image is not None:
            array = pil_to_array(self.image, self.name)
        elif isinstance(self.array, torch.Tensor):
            array = self.array
        else:
            array = _to_array_image(self.array, self.name)
        self._size = tuple(array.shape[:2])
        return array


def is_stream(batch: Any) -> bool:
    """Whether `batch` is one of "any other iterable" of the module's docstring, whose items are asked for in turn."""
    return isinstance(batch, Iterable) and not (
        isinstance(batch, (list, tuple, str, Mapping, set, frozenset, os.PathLike))
        or isinstance(batch, (bytes, bytearray, memoryview, PlainArray, range))
        or isinstance(batch, (InputImage, Image.Image, torch.Tensor, np.ndarray))
        or any(hasattr(batch, name) for name in _ARRAYS)
        or _is_file(batch)
    )


def _is_file(item: Any) -> bool:
    """Whether it is an open file, or is read as one: a BytesIO, a file inside an archive, an answer of a server."""
    return not isinstance(item, os.PathLike) and hasattr(item, "read") and hasattr(item, "readline")


def collect_inputs(batch: Any) -> list[InputImage]:
    """The images of a batch, in order; the module's docstring says what a batch can be.

    Raises UsageError for an empty batch, ArgumentTypeError for an unknown type, DataError for a folder without images,
    ImageError for an array that means nothing (dtype, rank, channels, size).
    """
    if is_stream(batch):
        batch = list(batch)
    if isinstance(batch, (list, tuple)):
        images = [image for i, item in enumerate(batch) for image in collect_item(item, i)]
    else:
        images = _expand(batch, "batch")
    if not images:
        raise UsageError(f"batch: is empty; expected {_BATCH}")
    return images


def collect_item(item: Any, index: int) -> list[InputImage]:
    """The images of one item of a list or iterable, that at `index`. Raises ArgumentTypeError for an unknown type."""
    try:
        return _expand(item, f"batch[{index}]")
    except ImageError as error:
        return [InputImage(error.name, error=error)]
    except DataError as error:
        folder = os.fsdecode(item)
        reason = str(error).removeprefix(f"{Path(folder)}: ")
        return [InputImage(folder, error=ImageError(folder, reason))]


def _expand(item: Any, name: str) -> list[InputImage]:
    """The images of one item, which is called `name` where it has no name of its own."""
    if isinstance(item, InputImage):
        return [item]
    if isinstance(item, (str, os.PathLike)):
        given = os.fsdecode(item)
        if not given:
            raise ImageError(name, "an empty text is no path")
        if os.path.isdir(given):
            unreadable = {}
            images = [InputImage(str(path), path=path) for path in list_images(given, True, True, unreadable)]
            refused = (InputImage(str(path), error=ImageError(str(path), why)) for path, why in unreadable.items())
            return sorted([*images, *refused], key=lambda image: natural_key(image.name))
        # Not through Path, which would tidy the name: "./a.png" is shown as it was given.
        return [InputImage(given, path=given)]
    if isinstance(item, Image.Image):
        return [InputImage(os.fsdecode(getattr(item, "filename", "") or _place(name)), image=item)]
    if isinstance(item, torch.Tensor):
        return _split(_tensor(item, name, channels_first=True), name)
    if isinstance(item, np.ndarray):
        return _split(_numpy(item, name), name)
    if hasattr(item, "__cuda_array_interface__"):
        return _split(_tensor(_adopt(lambda: torch.as_tensor(item), name), name), name)
    if hasattr(item, "__dlpack__"):
        return _split(_tensor(_adopt(lambda: torch.from_dlpack(item), name), name), name)
    number = isinstance(item, np.generic)  # of NumPy, which counts as an array otherwise
    if not number and (hasattr(item, "__array__") or hasattr(item, "__array_interface__")):
        return _split(_numpy(_adopt(lambda: np.asarray(item), name), name), name)
    kind = type(item).__name__
    if _is_file(item):
        raise ArgumentTypeError(f"{name}: is an open file ({kind}); give its path, or the image as an array")
    hint = ""
    if isinstance(item, (list, tuple)) and len(item) > 1 and _is_image(item[0]) and not _is_image(item[1]):
        hint = "; give the images alone, as in `(images for images, labels in loader)`"
    elif isinstance(item, Mapping) and (keys := [key for key, value in item.items() if _is_image(value)]):
        hint = f"; give the images alone, as in `(item[{keys[0]!r}] for item in loader)`"
    raise ArgumentTypeError(f"{name}: is of type {kind}; expected {_BATCH if name == 'batch' else _ITEM}{hint}")


def _is_image(item: Any) -> bool:
    """Whether it is an image, or a batch of them, by its type and rank; labels are not."""
    return isinstance(item, Image.Image) or (isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim >= 2)


def _place(name: str) -> str:
    return "batch[0]" if name == "batch" else name


def _adopt(take, name: str):
    """A foreign array taken over by torch or NumPy; whatever that raises becomes an ImageError."""
    try:
        return take()
    except Exception as error:
        text = " ".join(str(error).split())[:150] or type(error).__name__
        raise ImageError(name, f"the array cannot be taken over ({text})") from error


def _numpy(array: np.ndarray, name: str) -> np.ndarray:
    """A checked array, (H, W, C) or (B, H, W, C)."""
    check_dtype(array.dtype, name)
    return _check_shape(array[..., None] if array.ndim == 2 else array, name, array.shape)


def _tensor(tensor: torch.Tensor, name: str, channels_first: bool = False) -> np.ndarray | torch.Tensor:
    """A checked tensor as (H, W, C) or (B, H, W, C): a NumPy array that shares its memory on the CPU, else a view."""
    tensor = tensor.detach()
    if tensor.dtype not in _DTYPES or tensor.layout != torch.strided:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ImageError(name, f"pixels of type {kind}; expected a dense uint8, uint16 or float tensor in [0, 1]")
    if tensor.device.type == "meta":
        raise ImageError(name, "a tensor on the device meta, which has no pixels")
    last = tensor[..., None] if tensor.ndim == 2 else tensor
    if channels_first and tensor.ndim in (3, 4):
        last = tensor.movedim(-3, -1)
    _check_shape(last, name, tensor.shape, channels_first)
    if last.device.type != "cpu":
        return last
    # NumPy has no bfloat16; resolve_neg because a lazily negated tensor has no memory to share.
    whole = last.float() if last.dtype == torch.bfloat16 else last.resolve_neg()
    return _adopt(whole.numpy, name)  # a subclass may have no memory of its own


def _check_shape(array, name: str, given, channels_first: bool = False):
    """`array` if it is (H, W, C) or (B, H, W, C) with 1, 3 or 4 channels and a size in bounds; else ImageError."""
    expected = "(H, W), (C, H, W) or (B, C, H, W)" if channels_first else "(H, W), (H, W, C) or (B, H, W, C)"
    shape = tuple(given)
    if array.ndim not in (3, 4):
        raise ImageError(name, f"an array of shape {shape}; expected {expected}")
    if array.shape[-1] not in (1, 3, 4):
        hint = ""
        if array.ndim == 3 and array.shape[0 if not channels_first else 1] in (1, 3, 4):
            hint = f"; it looks like channels {'last' if channels_first else 'first'}"
        raise ImageError(name, f"an array of shape {shape} has {array.shape[-1]} channels; "
                               f"expected {expected} with C = 1, 3 or 4{hint}")
    if array.ndim == 4 and array.shape[0] == 0:
        raise ImageError(name, "an array of no images")
    check_size(array.shape[-3], array.shape[-2], name)
    return array


def _split(array, name: str) -> list[InputImage]:
    if array.ndim == 3:
        return [InputImage(_place(name), array=array)]
    return [InputImage(f"{name}[{i}]", array=image) for i, image in enumerate(array)]


def _to_array_image(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W, C) of any accepted dtype -> array image, with a warning where 16 bits hold 12 or fewer. Floats keep their
    width; `resize_unit` checks the RGB ones."""
    say_if_few_bits(array, name)
    if array.dtype == bool:
        array = array.astype(np.uint8) * np.uint8(255)
    if array.shape[2] == 4:
        if np.issubdtype(array.dtype, np.floating):
            # Before compositing: an alpha or a colour out of range must not hide in the product.
            check_range(float(array.min()), float(array.max()), name)
        array = over_black(array)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def _resize_tensor(image: torch.Tensor, size: int, name: str) -> torch.Tensor:
    """`resize_unit` for a tensor (H, W, C) on a device: float32 (size, size, 3), equal to rounding."""
    if image.dtype.is_floating_point:
        low, high = torch.aminmax(image)
        check_range(float(low), float(high), name)
        unit = image.to(torch.float32).clamp(0, 1)
    else:
        white = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}[image.dtype]
        values = image.to(torch.float32)
        if image.dtype == torch.uint16:
            say_if_few(int(values[..., :3].max()), name)
        unit = values / white
    if unit.shape[2] == 4:
        unit = unit[..., :3] * unit[..., 3:]
    unit = unit.expand(-1, -1, 3) if unit.shape[2] == 1 else unit
    height, width = unit.shape[:2]
    # The axis that leaves less in between goes first, as in resize_unit.
    for axis in ((0, 1) if height > width else (1, 0)):
        if unit.shape[axis] != size:
            weights = torch.from_numpy(resize_weights(unit.shape[axis], size)).to(unit)
            unit = torch.tensordot(weights, unit, dims=([1], [axis])).movedim(0, axis)
    return unit.clamp(0, 1).contiguous()
