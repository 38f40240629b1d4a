"""Odd and bad input, one row each: accepted, and the value it must read as, or refused, and the reason.

A row makes its input in an empty folder (`given`), hands it to what reads it (`through`) and names the outcome. A row
with a `command` runs that command line instead; "{given}" and "{out}" stand for the input and for a folder to write to.
"""

from __future__ import annotations

import errno
import os
import shlex
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfengine.cli import main
from dfengine.data.folders import open_dataset
from dfengine.data.images import list_images, read_mask
from dfengine.data.inputs import collect_inputs
from dfengine.errors import DfengineError, ImageError
from dfengine.files import atomic_write
from tests.odd_files import (
    SIDE,
    animation,
    content,
    cut,
    damaged,
    evil_pickle,
    loop,
    mask_of,
    nan_pixel,
    noise,
    odd_mask,
    pipe,
    pixels,
    png16,
    png_header,
    rotated,
    saved,
    saved_checkpoint,
    several,
    subfolder,
    tiff,
    transparent_red,
    tree,
)


def corner(batch: Any) -> tuple[float, float, float]:
    """The top left pixel of the last image of a batch as `detect` would read it, in units of 1/65535."""
    return tuple(float(v) * 65535 for v in collect_inputs(batch)[-1].load(SIDE)[0, 0])


@dataclass(frozen=True)
class Row:
    """`reads` (accepted) or `refused` (a part of the one-line reason); or a `command`, its `exit_status`, and a part of
    what it `prints`."""

    id: str
    given: Callable[[Path], Any]
    reads: Any = None
    refused: str | None = None
    through: Callable[[Any], Any] = corner
    command: str | None = None
    exit_status: int | None = None
    prints: str | None = None


def counts(root: Path) -> tuple[str, int, int, int]:
    data = open_dataset(root)
    return data.layout, len(data.train), len(data.test), len(data.missing_masks)


def gray(value: float) -> tuple[float, float, float]:
    return (value, value, value)


HALF = SIDE, SIDE, 3

DETECT = "detect {checkpoint} {given} --out {out}"
EVALUATE = "evaluate {checkpoint} {given} --out {out}"
CALIBRATE = "calibrate {checkpoint} {given} --out {out}.safetensors"
TRAIN = "train {given} --out {out}.safetensors --workers 0"
INFO = "info {given}"

ROWS = [
    # Depths and modes: the value is in units of 1/65535, so 8-bit v reads as 257 v.
    Row("gray 8-bit png", saved("L", 77, "a.png"), gray(77 * 257)),
    Row("rgb png", saved("RGB", (1, 2, 3), "a.png"), (257, 514, 771)),
    Row("gray+alpha png", saved("LA", (200, 51), "a.png"), gray(40 * 257)),
    Row("rgba png over black", saved("RGBA", (255, 100, 0, 51), "a.png"), (51 * 257, 20 * 257, 0)),
    Row("hidden colour under alpha 0", saved("RGBA", (255, 255, 255, 0), "a.png"), gray(0)),
    Row("1-bit png", saved("1", 1, "a.png"), gray(65535)),
    Row("1-bit tiff", saved("1", 1, "a.tif", compression="group4"), gray(65535)),
    Row("palette png", saved("P", 1, "a.png", lambda i: i.putpalette([9, 9, 9, 10, 20, 30])), (2570, 5140, 7710)),
    Row("palette png, transparent", saved("P", 0, "a.png", transparent_red, transparency=0), gray(0)),
    Row("gray 16-bit png", png16(40001), gray(40001)),
    Row("rgb 16-bit png", png16(3, 300, 40001), (40001, 300, 3)),
    Row("rgba 16-bit png", png16(0, 301, 65535, 13107), (13107, 60, 0)),
    Row("gray 16-bit tiff", tiff(np.full((SIDE, SIDE), 40001, np.uint16)), gray(40001)),
    Row("big-endian 16-bit tiff", tiff(np.full((SIDE, SIDE), 40001, ">u2"), byteorder=">"), gray(40001)),
    Row("white-is-zero 16-bit tiff", tiff(np.full((SIDE, SIDE), 40001, np.uint16), photometric="miniswhite"),
        gray(25534)),
    Row("rgb 16-bit tiff, lzw", tiff(np.full(HALF, (1, 2, 65535), np.uint16), photometric="rgb", compression="lzw"),
        (1, 2, 65535)),
    Row("planar rgb 16-bit tiff", tiff(np.full((3, SIDE, SIDE), 513, np.uint16), photometric="rgb",
                                       planarconfig="separate"), gray(513)),
    Row("gray+alpha 16-bit tiff", tiff(np.full((SIDE, SIDE, 2), (50000, 13107), np.uint16), photometric="minisblack",
                                       extrasamples=["unassalpha"]), gray(10000)),
    Row("float32 tiff", tiff(np.full((SIDE, SIDE), 0.25, np.float32)), gray(65535 / 4)),
    Row("float32 rgb tiff", tiff(np.full(HALF, (0, 0.25, 1), np.float32), photometric="rgb"), (0, 65535 / 4, 65535)),
    Row("int32 tiff within 16 bits", tiff(np.full((SIDE, SIDE), 40001, np.int32)), gray(40001)),
    Row("cmyk jpeg", saved("CMYK", (0, 0, 0, 0), "a.jpg"), gray(65535)),
    Row("bmp", saved("RGB", (1, 2, 3), "a.bmp"), (257, 514, 771)),
    Row("webp", saved("RGB", (1, 2, 3), "a.webp", lossless=True), (257, 514, 771)),
    Row("exif-rotated jpeg", rotated, gray(65535)),
    Row("animated gif", animation("a.gif"), gray(65535)),
    Row("animated webp", animation("a.webp"), gray(65535)),
    Row("animated png", animation("a.png"), gray(65535)),
    Row("tiff of several pages", animation("a.tif"), gray(65535)),
    Row("suffix of another format", saved("L", 77, "a.jpg", format="PNG"), gray(77 * 257)),
    Row("8x8", lambda f: Image.new("L", (8, 8), 3), gray(771)),
    Row("100 megapixels", lambda f: saved_large(f / "large.png", 10_000, 10_000), gray(65535)),
    # Files that are refused.
    Row("empty file", content(b""), refused="image.png: the file is empty"),
    Row("text named .png", content(b"This is no image.\n"), refused="not an image"),
    Row("folder named .png", subfolder("folder.png"), refused="folder.png: no image in this folder",
        through=lambda path: corner([path])),
    Row("no such file", lambda f: f / "gone.png", refused="gone.png: no such file"),
    Row("broken link", lambda f: ((f / "l.png").symlink_to(f / "gone.png"), f / "l.png")[1], refused="no such file"),
    Row("links in a circle", loop, refused="symbolic links that lead in a circle"),
    Row("pipe", pipe, refused="not a regular file"),
    Row("name with a zero byte", lambda f: "a\0.png", refused="not a file name"),
    *(Row(f"truncated {name}", cut(noise(name)), refused="the file is truncated")
      for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.webp", "a.tif")),
    Row("truncated progressive jpeg", cut(noise("a.jpg", progressive=True)), refused="the file is truncated"),
    Row("truncated 16-bit tiff", cut(tiff(np.ones((40, 40), np.uint16))), refused="the file is truncated"),
    Row("only a header", content(png_header(SIDE, SIDE)), refused="the file is"),
    Row("7x16", lambda f: Image.new("L", (7, SIDE)), refused="too small: 7x16 pixels"),
    Row("a gigapixel", content(png_header(40_000, 25_000)), refused="too large: 40000x25000 pixels"),
    Row("just over 100 megapixels", content(png_header(10_000, 10_001)), refused="at most 100 megapixels"),
    Row("nan in tiff", lambda f: tiff(nan_pixel(f))(f), refused="not finite"),
    Row("float tiff of 0 to 255", tiff(np.full((SIDE, SIDE), 200, np.float32)), refused="200; expected [0, 1]"),
    Row("int32 tiff beyond 16 bits", tiff(np.full((SIDE, SIDE), 70000, np.int32)), refused="70000"),
    Row("pgm", content(b"P5 16 16 255\n" + bytes(256), "a.pgm"), refused="not an image that can be read (PNG, JPEG"),
    # Arrays and tensors.
    Row("array (H, W) uint8", pixels(SIDE, SIDE, value=77, dtype=np.uint8), gray(77 * 257)),
    Row("array (H, W, 1) uint16", pixels(SIDE, SIDE, 1, value=40001, dtype=np.uint16), gray(40001)),
    Row("array (H, W, 4) uint8", pixels(SIDE, SIDE, 4, value=51, dtype=np.uint8), gray(10 * 257)),
    Row("array (B, H, W, 3) float64", pixels(2, SIDE, SIDE, 3, dtype=np.float64), gray(32767.5)),
    Row("array of bool", pixels(SIDE, SIDE, value=True, dtype=bool), gray(65535)),
    Row("tensor (B, C, H, W)", lambda f: torch.full((2, 3, SIDE, SIDE), 0.5), gray(32767.5)),
    Row("tensor bfloat16", lambda f: torch.full((3, SIDE, SIDE), 0.5, dtype=torch.bfloat16), gray(32767.5)),
    Row("rounding above 1", pixels(SIDE, SIDE, value=1.0000001), gray(65535)),
    Row("nan array in a list", lambda f: [Image.new("L", (8, 8)), nan_pixel(f)], refused="batch[1]: pixels that are"),
    Row("infinite array", pixels(SIDE, SIDE, value=np.inf), refused="batch[0]: pixels that are not finite"),
    Row("floats of 0 to 255", pixels(SIDE, SIDE, value=255), refused="float pixels from 255 to 255; expected [0, 1]"),
    Row("negative floats", pixels(SIDE, SIDE, value=-0.5), refused="-0.5"),
    Row("alpha out of range", pixels(SIDE, SIDE, 4, value=-1.0), refused="float pixels from -1 to -1"),
    Row("wrong rank", pixels(SIDE), refused="shape (16,); expected (H, W), (H, W, C) or (B, H, W, C)"),
    Row("rank 5", pixels(1, 1, SIDE, SIDE, 3), refused="shape (1, 1, 16, 16, 3)"),
    Row("two channels", pixels(SIDE, SIDE, 2), refused="has 2 channels"),
    Row("array channels first", pixels(3, SIDE, SIDE), refused="it looks like channels first"),
    Row("tensor channels last", lambda f: torch.zeros(SIDE, SIDE, 3), refused="it looks like channels last"),
    Row("int64 array", pixels(SIDE, SIDE, dtype=np.int64, value=3), refused="pixels of type int64"),
    Row("int8 tensor", lambda f: torch.zeros(SIDE, SIDE, dtype=torch.int8), refused="pixels of type int8"),
    Row("array too small", pixels(3, 3), refused="too small"),
    Row("empty list", lambda f: [], refused="batch: is empty"),
    Row("array of no images", pixels(0, SIDE, SIDE, 3), refused="no images"),
    Row("a number", lambda f: 3, refused="is of type int"),
    Row("a number in a list", lambda f: [np.zeros((8, 8)), 3], refused="batch[1]: is of type int"),
    # Folders and masks.
    Row("empty folder", tree(), refused="no train/good", through=counts),
    Row("empty folder of images", tree("notes.txt"), refused="no image in this folder", through=list_images),
    Row("folder of bad files only", lambda f: content(b"text")(f).parent, refused="image.png: not an image"),
    Row("images alone", tree("a.png", "b.png"), ("folder", 2, 0, 0), through=counts),
    Row("labels without train", tree("good/a.png", "broken/b.png"), refused="expected train/good", through=counts),
    Row("a mask is missing", tree("train/good/0.png", "test/bad/0.png", "test/bad/1.png",
                                   "ground_truth/bad/0_mask.png"), ("mvtec", 1, 2, 1), through=counts),
    Row("no masks at all", tree("train/good/0.png", "test/bad/0.png"), ("folder", 1, 1, 0), through=counts),
    Row("mask of half the size", mask_of((8, 8)), 256, through=lambda path: int(read_mask(path, (16, 16)).sum())),
    Row("mask of another aspect", mask_of((8, 16)), refused="000_mask.png: the mask is 8x16, its image 16x16",
        through=lambda path: read_mask(path, (16, 16))),
    Row("jpeg mask", mask_of((8, 8), "m.jpg"), refused="JPEG mask", through=read_mask),
    # Output.
    Row("output below a file", content(b"x", "file"), refused="is a file, not a folder",
        through=lambda path: atomic_write(path / "results.csv", "")),
    Row("output on a folder", lambda f: f, refused="is a folder, not a file", through=lambda f: atomic_write(f, "")),
    # Commands: the exit status, and a part of what is printed.
    Row("detect: all scored", tree("a.png", "b.png"), prints="2 images scored", command=DETECT, exit_status=0),
    Row("detect: some refused", several(tree("a.png"), content(b"text", "b.png")), prints="b.png: not an image",
        command=DETECT, exit_status=3),
    Row("detect: only bad files", several(content(b"", "a.png"), content(b"text", "b.png")),
        prints="0 images scored, 2 refused",
        command=DETECT, exit_status=1),
    Row("detect: empty folder", lambda f: f, prints="no image", command=DETECT, exit_status=1),
    Row("detect: no such folder", lambda f: f / "gone", prints="gone: no such file", command=DETECT, exit_status=1),
    Row("detect: output is a file", several(tree("a.png"), content(b"", "out")),
        prints="out: cannot be written: is a file, not a folder",
        command="detect {checkpoint} {given} --out {given}/out", exit_status=2),
    Row("detect: no GPU here", tree("a.png"), prints="CUDA", command=DETECT + " --device cuda:99", exit_status=2),
    Row("detect: threshold out of range", tree("a.png"), prints="threshold", command=DETECT + " --threshold 7",
        exit_status=2),
    Row("detect: unknown option", tree("a.png"), prints="No such option", command=DETECT + " --frob", exit_status=2),
    Row("checkpoint: truncated", damaged(lambda raw: raw[:-9]),
        prints="damaged.safetensors: is damaged: cut short or overwritten", command=INFO, exit_status=1),
    Row("checkpoint: empty", damaged(lambda raw: b""), prints="the file is empty", command=INFO, exit_status=1),
    Row("checkpoint: another version", damaged(lambda raw: raw.replace(b'"version":"1"', b'"version":"9"')),
        prints="version '9' is not supported", command=INFO, exit_status=1),
    Row("checkpoint: wrong tensor shape",
        damaged(lambda raw: raw.replace(b'"shape":[8,3,3,3]', b'"shape":[3,8,3,3]', 1)),
        prints="damaged.safetensors: is damaged: its content is not what was written", command=INFO, exit_status=1),
    Row("checkpoint: a pickle that would run code", evil_pickle, prints="PyTorch pickle", command=INFO, exit_status=1),
    Row("convert: a pickle that would run code", evil_pickle, prints="posix.system",
        command="convert {given} {out}.safetensors", exit_status=1),
    Row("checkpoint: an image", saved("L", 7, "a.png"), prints="a.png: not a safetensors checkpoint", command=INFO,
        exit_status=1),
    Row("evaluate: no masks", tree("test/good/0.png", "test/bad/0.png", "test/bad/1.png", "train/good/0.png"),
        prints="no ground-truth masks", command=EVALUATE, exit_status=0),
    Row("evaluate: one mask missing", tree("test/good/0.png", "test/bad/0.png", "test/bad/1.png", "train/good/0.png",
        "ground_truth/bad/0_mask.png"), prints="1 anomalous image without a mask", command=EVALUATE, exit_status=0),
    Row("evaluate: mask of another aspect", several(tree("test/good/0.png", "test/bad/0.png", "train/good/0.png"),
        odd_mask), prints="0_mask.png: the mask is 8x16, its image 16x16", command=EVALUATE, exit_status=3),
    Row("evaluate: no test images", tree("train/good/0.png"), prints="no test images", command=EVALUATE, exit_status=1),
    Row("evaluate: group without a group", tree("test/good/0.png", "test/bad/0.png", "train/good/0.png"),
        prints="needs a group", command=EVALUATE + " --group-by x", exit_status=2),
    Row("calibrate: rate of 0", tree("a.png"), prints="between 0 and 1", command=CALIBRATE + " --false-alarm-rate 0",
        exit_status=2),
    Row("calibrate: two ways at once", tree("a.png"), prints="only one of",
        command=CALIBRATE + " --false-alarm-rate 0.1 --alarms-per-km 3", exit_status=2),
    Row("calibrate: only bad files", several(content(b"text", "a.png")), prints="no normal image could be scored",
        command=CALIBRATE, exit_status=1),
    Row("calibrate: a pipe among the images", several(tree("a.png", "b.png"), content(b"", "c.png"), pipe),
        prints="pipe.png: not a regular file", command=CALIBRATE + " --false-alarm-rate 0.5", exit_status=3),
    Row("calibrate: images of a defect", tree("test/good/0.png", "test/bad/0.png"),
        prints="test/bad: holds images of the defect 'bad'",
        command="calibrate {checkpoint} {given}/test/bad --out {out}.safetensors", exit_status=1),
    Row("calibrate: masks", tree("test/good/0.png", "ground_truth/bad/0_mask.png"), prints="holds masks of",
        command="calibrate {checkpoint} {given}/ground_truth/bad --out {out}.safetensors", exit_status=1),
    Row("calibrate: the checkpoint is a pipe", pipe, prints="pipe.png: is not a regular file",
        command="calibrate {given} --threshold 0.5", exit_status=1),
    Row("detect: a data set with masks", tree("train/good/0.png", "test/bad/0.png", "ground_truth/bad/0_mask.png"),
        prints="ground_truth: holds ground-truth masks, which are left out", command=DETECT, exit_status=0),
    Row("detect: a suffix mistyped", tree("a.png", "b.jpgg.txt"),
        prints="given: 1 file left out, no image by name: b.jpgg.txt", command=DETECT, exit_status=0),
    Row("calibrate: a suffix mistyped", tree("train/good/a.png", "train/good/b.txt", "test/good/0.png", "test/x/0.png"),
        prints="train/good: 1 file left out, no image by name: b.txt", command=CALIBRATE, exit_status=0),
    Row("train: images of a defect", tree("train/good/0.png", "test/bad/0.png", "test/bad/1.png"),
        prints="holds images of the defect 'bad'",
        command="train {given}/test/bad --out {out}.safetensors --steps 1", exit_status=1),
    Row("train: empty folder", lambda f: f, prints="no image", command=TRAIN + " --steps 1", exit_status=1),
    Row("train: one image", tree("a.png"), prints="at least 2 normal images", command=TRAIN + " --steps 1",
        exit_status=1),
    Row("train: one image, to choose a model by", tree("a.png"), prints="at least 2 normal images",
        command=TRAIN + " --minutes 1", exit_status=1),
    Row("train: two budgets", tree("a.png"), prints="exactly one of", command=TRAIN + " --steps 1 --minutes 1",
        exit_status=2),
    Row("train: unknown preset", tree("a.png"), prints="unknown preset 'nope'", command=TRAIN + " --preset nope",
        exit_status=2),
    Row("train: odd size", tree("a.png"), prints="image size", command=TRAIN + " --image-size 100", exit_status=2),
    Row("train: nothing to resume", tree("a.png", "b.png"), prints="resume", command=TRAIN + " --steps 1 --resume",
        exit_status=1),
    Row("fasteners: nothing to render", lambda f: f, prints="all 0",
        command="fasteners {given} --train 0 --test-good 0 --per-defect 0", exit_status=2),
    Row("fasteners: output is a file", content(b"", "out"), prints="out: cannot be written: is a file, not a folder",
        command="fasteners {given} --train 1 --test-good 0 --per-defect 0", exit_status=2),
]


def saved_large(path: Path, width: int, height: int) -> Path:
    Image.new("1", (width, height), 1).save(path)
    return path


def test_ids_are_unique():
    assert len({row.id for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.command], ids=lambda row: row.id)
def test_row(row: Row, tmp_path, capfd):
    assert (row.reads is None) != (row.refused is None), "a row is accepted or refused"
    given = row.given(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if row.refused is not None:
            with pytest.raises(DfengineError) as refusal:
                row.through(given)
            assert row.refused in str(refusal.value)
            assert "\n" not in str(refusal.value)
        elif isinstance(row.reads[0] if isinstance(row.reads, tuple) else row.reads, str):
            assert row.through(given) == row.reads
        else:
            assert row.through(given) == pytest.approx(row.reads, abs=0.02)
    assert capfd.readouterr().err == "", "the reason is in the error, not on the terminal"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return saved_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


@pytest.mark.parametrize("row", [row for row in ROWS if row.command], ids=lambda row: row.id)
def test_command(row: Row, tmp_path, checkpoint, capsys):
    folder = tmp_path / "given"
    folder.mkdir()
    places = dict(given=row.given(folder), out=tmp_path / "out", checkpoint=checkpoint)
    assert main([word.format(**places) for word in shlex.split(row.command)]) == row.exit_status
    printed = " ".join("".join(capsys.readouterr()).split())
    assert row.prints in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "ran").exists(), "code from a file was executed"


@pytest.mark.parametrize(("code", "reason"), [(errno.EACCES, "permission denied"), (errno.EIO, "input/output error"),
                                              (errno.ENOENT, "no such file")])
def test_unreadable_file(code, reason, tmp_path, monkeypatch):
    """No permission, a dying disk, and a file that vanishes after its folder was listed."""
    path = saved("L", 1, "a.png")(tmp_path)

    def refuse(*arguments, **options):
        raise OSError(code, os.strerror(code))

    inputs = collect_inputs(tmp_path)
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DfengineError, match=f"{path}: {reason}"):
        inputs[0].load(SIDE)


def test_one_bad_image_of_a_list_leaves_the_others():
    inputs = collect_inputs([np.zeros((SIDE, SIDE)), "gone.png", np.zeros((3, 3)), np.ones((SIDE, SIDE))])
    assert [image.name for image in inputs] == ["batch[0]", "gone.png", "batch[2]", "batch[3]"]
    for image in inputs[1:3]:
        with pytest.raises(ImageError) as refusal:
            image.load(SIDE)
        assert refusal.value.name == image.name
    assert inputs[0].load(SIDE).max() == 0
    assert inputs[3].load(SIDE).min() == 1
