"""Makers of odd and damaged files for `test_bad_input`: each takes an empty folder and returns what it made there."""

from __future__ import annotations

import os
import shlex
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image

from dfengine.checkpoint import Checkpoint, save_checkpoint
from tests.helpers import tiny_model

SIDE = 16  # images of this side are loaded at this size: no resampling, so the value is exact


def saved(mode: str, colour: Any, name: str, prepare: Callable[[Image.Image], None] | None = None, **options):
    """A file of one colour, written by Pillow."""
    def make(folder: Path) -> Path:
        image = Image.new(mode, (SIDE, SIDE), colour)
        if prepare:
            prepare(image)
        image.save(folder / name, **options)
        return folder / name
    return make


def tiff(pixels: np.ndarray, **options):
    def make(folder: Path) -> Path:
        tifffile.imwrite(folder / "image.tif", pixels, **options)
        return folder / "image.tif"
    return make


def png16(*channels: int):
    """A 16-bit PNG of one colour, written by OpenCV: gray, BGR or BGRA."""
    def make(folder: Path) -> Path:
        pixels = np.full((SIDE, SIDE, len(channels)), channels, np.uint16)
        assert cv2.imwrite(str(folder / "deep.png"), pixels)
        return folder / "deep.png"
    return make


def content(data: bytes, name: str = "image.png"):
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name
    return make


def cut(make: Callable[[Path], Path], share: float = 0.6):
    """The file with its end missing."""
    def make_cut(folder: Path) -> Path:
        path = make(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path
    return make_cut


def noise(name: str, **options):
    """A file whose pixels fill some kilobytes, so that a cut goes through them."""
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, **options)
        return folder / name
    return make


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def rotated(folder: Path) -> Path:
    """A JPEG whose white left half is at the top when it is shown: EXIF orientation 6."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[SIDE // 2 :, :] = 255  # the stored bottom is the shown left
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "r.jpg", exif=exif, quality=95)
    return folder / "r.jpg"


def animation(name: str):
    def make(folder: Path) -> Path:
        frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("white", "black", "red")]
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], **(
            {"lossless": True} if name.endswith("webp") else {}))
        return folder / name
    return make


def loop(folder: Path) -> Path:
    (folder / "a.png").symlink_to(folder / "b.png")
    (folder / "b.png").symlink_to(folder / "a.png")
    return folder / "a.png"


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def subfolder(name: str):
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name
    return make


def nan_pixel(folder: Path) -> np.ndarray:
    pixels = np.full((SIDE, SIDE), 0.5, np.float32)
    pixels[7, 9] = np.nan
    return pixels


def transparent_red(image: Image.Image) -> None:
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.info["transparency"] = 0


def pixels(*shape: int, value: Any = 0.5, dtype: Any = np.float32):
    return lambda folder: np.full(shape, value, dtype)


def mask_of(size: tuple[int, int], name: str = "000_mask.png"):
    def make(folder: Path) -> Path:
        Image.new("L", size, 1).save(folder / name)
        return folder / name
    return make


def tree(*files: str):
    """A folder of small images (or, for names that end in .txt, of text)."""
    def make(folder: Path) -> Path:
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if file.endswith(".txt"):
                (folder / file).write_text("no image")
            else:
                Image.new("L", (SIDE, SIDE), 9).save(folder / file)
        return folder
    return make


def several(*makers: Callable[[Path], Any]):
    """What all of `makers` make, in one folder."""
    def make(folder: Path) -> Path:
        for maker in makers:
            maker(folder)
        return folder
    return make


def saved_checkpoint(path: Path) -> Path:
    model = tiny_model()
    save_checkpoint(path, Checkpoint(model.config, model.state_dict()))
    return path


def damaged(change: Callable[[bytes], bytes]):
    """A checkpoint whose bytes were changed."""
    def make(folder: Path) -> Path:
        path = saved_checkpoint(folder / "damaged.safetensors")
        before = path.read_bytes()
        path.write_bytes(change(before))
        assert path.read_bytes() != before
        return path
    return make


class _Evil:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def evil_pickle(folder: Path) -> Path:
    """A torch file that makes the file "ran" beside its folder when it is unpickled without care."""
    torch.save({"unet_model_state_dict": _Evil(f"touch {shlex.quote(str(folder.parent / 'ran'))}")}, folder / "evil.pt")
    return folder / "evil.pt"


def odd_mask(folder: Path) -> None:
    """A mask of another aspect than its image, test/bad/0.png."""
    (folder / "ground_truth/bad").mkdir(parents=True)
    Image.new("L", (8, 16), 255).save(folder / "ground_truth/bad/0_mask.png")
