"""The warning of 16-bit images that hold 12 bits or fewer."""

from __future__ import annotations

import logging
import threading

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from dfengine.data import decode
from dfengine.data.images import read_image, read_mask
from dfengine.data.inputs import _resize_tensor, collect_inputs


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch):
    monkeypatch.setattr(decode, "_dim", set())


def picture(largest: int, *channels: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, largest, (16, 20, *channels), np.uint16, endpoint=True)
    values[0, 0] = largest
    return values


def write(path, pixels: np.ndarray):
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack")
    else:
        cv2.imwrite(str(path), pixels)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize(("largest", "bits", "factor"), [(4095, 12, 16), (2048, 12, 16), (1023, 10, 64), (7, 8, 256)])
def test_a_file_of_few_bits_is_named_once(name, channels, largest, bits, factor, tmp_path, caplog):
    path = write(tmp_path / name, picture(largest, *channels))
    assert read_image(path).max() == largest  # as it is
    read_image(path)
    assert caplog.messages == [
        f"{path}: a 16-bit image that uses only values up to {largest} of 65535; unless it is dark, it holds {bits} "
        f"bits: multiply its values by {factor}"
    ]


@pytest.mark.parametrize("largest", [0, 4096, 65535])
def test_other_images_are_not_named(largest, tmp_path, caplog):
    read_image(write(tmp_path / "a.png", picture(largest)))
    collect_inputs(picture(largest, 3))[0].load(16)
    read_image(write(tmp_path / "b.png", np.full((16, 16), 9, np.uint8)))
    read_mask(write(tmp_path / "m.png", picture(1)))
    assert not caplog.messages


@pytest.mark.parametrize("kind", [
    np.asarray, lambda a: np.dstack([a, a, a, np.full_like(a, 65535)]), torch.from_numpy, Image.fromarray,
])
def test_an_array_is_named_by_its_place(kind, caplog):
    (image,) = collect_inputs(kind(picture(255)))
    image.load(16)
    image.load(8)
    (message,) = caplog.messages
    assert message.startswith("batch[0]: a 16-bit image that uses only values up to 255 of 65535;")


def test_pixels_on_a_device_are_looked_at_without_their_alpha(caplog):
    pixels = np.dstack([picture(4095, 3), np.full((16, 20), 65535, np.uint16)])
    _resize_tensor(torch.from_numpy(pixels), 16, "batch[0]")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(("colours", "alpha", "named"), [(65535, 2000, False), (4095, 65535, True), (4095, 9, True)])
def test_colours_are_looked_at_before_alpha_dims_them(colours, alpha, named, tmp_path, caplog):
    pixels = np.dstack([picture(colours, 3), np.full((16, 20), alpha, np.uint16)])
    stored = tmp_path / "a.png"
    cv2.imwrite(str(stored), pixels)
    tiff = tmp_path / "a.tif"
    tifffile.imwrite(tiff, pixels, photometric="rgb", extrasamples=["unassalpha"])
    for path in (stored, tiff):
        read_image(path)
    collect_inputs([pixels])[0].load(16)
    _resize_tensor(torch.from_numpy(pixels), 16, "on a device")
    messages = [f": a 16-bit image that uses only values up to {colours} of 65535;"] * (decode.MOST_DIM if named else 0)
    assert [message[message.index(": ") :][: len(messages[0])] for message in caplog.messages] == messages
    decode._dim.clear()
    caplog.clear()
    _resize_tensor(torch.from_numpy(pixels), 16, "on a device")
    assert len(caplog.messages) == named


def test_of_many_the_first_are_named(caplog):
    for image in collect_inputs([picture(4095)] * 5):
        image.load(16)
    assert [message.split(":")[0] for message in caplog.messages] == ["batch[0]", "batch[1]", "batch[2]"]
    assert [message.endswith("no other such image will be named") for message in caplog.messages] == [0, 0, 1]


def test_threads_name_the_last_image_last(monkeypatch):
    monkeypatch.setattr(decode, "MOST_DIM", 2)
    written, first, other = [], threading.Event(), threading.Event()

    def slow(record: logging.LogRecord) -> None:  # a filter: handlers have a lock of their own
        if not first.is_set():
            first.set()
            other.wait(0.3)  # while the other thread writes, if it may
        written.append(record.getMessage())
        other.set()

    log = logging.getLogger("dfengine")
    monkeypatch.setattr(log, "filters", [*log.filters, lambda record: slow(record) or True])
    threads = [threading.Thread(target=decode.say_if_few, args=(4095, name)) for name in ("f0", "f1")]
    threads[0].start()
    assert first.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert [message.split(":")[0] for message in written] == ["f0", "f1"]
    assert [message.endswith("no other such image will be named") for message in written] == [False, True]
