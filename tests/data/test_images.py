from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from dfengine.data import images
from dfengine.data.images import (
    load_uint8,
    load_unit,
    read_image,
    read_mask,
    resize_unit,
    to_unit,
)
from dfengine.errors import ImageError


def noise(*shape: int, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def png(pixels: np.ndarray, colour_type: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A 16-bit PNG written by hand, with further chunks before the pixels."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunk(*e) for e in extra)
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# Depth

@pytest.mark.parametrize("compression", [None, "lzw", "deflate", "packbits"])
@pytest.mark.parametrize("layout", ["gray", "rgb", "planar", "big-endian"])
def test_16_bit_tiff_keeps_every_bit(layout, compression, tmp_path):
    pixels = noise(19, 23, dtype=np.uint16) if layout == "gray" else noise(19, 23, 3, dtype=np.uint16)
    options = {"photometric": "minisblack"} if layout == "gray" else {"photometric": "rgb"}
    written = pixels
    if layout == "planar":
        options["planarconfig"] = "separate"
        written = np.moveaxis(pixels, 2, 0)
    if layout == "big-endian":
        options["byteorder"] = ">"
    tifffile.imwrite(tmp_path / "a.tif", written, compression=compression, **options)
    read = read_image(tmp_path / "a.tif")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=2))


@pytest.mark.parametrize("colour_type, channels", [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bit_png_keeps_every_bit(colour_type, channels, tmp_path):
    pixels = noise(19, 23, channels, dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png(pixels, colour_type))
    expected = pixels.astype(np.float64)
    if channels in (2, 4):
        expected = np.floor(expected[..., :-1] * expected[..., -1:] / 65535 + 0.5)
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint16 and read.flags.c_contiguous
    np.testing.assert_array_equal(read, np.broadcast_to(expected, (19, 23, 3)))


def test_16_bit_png_with_a_transparent_colour_a_gamma_and_an_orientation(tmp_path):
    pixels = noise(9, 13, 3, dtype=np.uint16)
    pixels[2, 5] = (1, 2, 3)
    exif = Image.Exif()
    exif[0x0112] = 8
    (tmp_path / "a.png").write_bytes(png(pixels, 2, (b"gAMA", struct.pack(">I", 100000)),
                                         (b"tRNS", struct.pack(">HHH", 1, 2, 3)),
                                         (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    pixels[2, 5] = 0
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(pixels))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_tiff(dtype, tmp_path):
    pixels = np.random.default_rng(0).random((9, 11)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    read = read_image(tmp_path / "a.tif")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read[..., 1], pixels.astype(np.float32))


def test_12_bit_tiff_reaches_white(tmp_path):
    pixels = noise(16, 16, dtype=np.uint16) >> 4
    pixels[0, 0], pixels[0, 1] = 0, 4095
    packed = np.packbits(((pixels[..., None] >> np.arange(11, -1, -1)) & 1).astype(np.uint8).reshape(16, -1), axis=1)
    header = [(256, 4, 16), (257, 4, 16), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1),
              (278, 4, 16), (279, 4, packed.nbytes)]
    directory = struct.pack("<H", len(header)) + b"".join(
        struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in header) + bytes(4)
    data = b"II*\0" + struct.pack("<I", 8 + packed.nbytes) + packed.tobytes() + directory
    (tmp_path / "a.tif").write_bytes(data)
    read = read_image(tmp_path / "a.tif")[..., 0]
    assert (read.dtype, read[0, 0], read[0, 1]) == (np.uint16, 0, 65535)
    np.testing.assert_array_equal(np.rint(read / 65535 * 4095), pixels)


@pytest.mark.parametrize("mode, suffix", [
    (mode, suffix) for suffix, modes in {
        "png": "RGB L LA RGBA P 1", "tif": "RGB L LA RGBA P 1 CMYK", "bmp": "RGB L RGBA P 1",
        "webp": "RGB L LA RGBA P 1", "gif": "L P", "jpg": "RGB L CMYK 1",
    }.items() for mode in modes.split()])
def test_8_bit_files_read_as_pillow_shows_them_over_black(mode, suffix, tmp_path):
    image = Image.fromarray(noise(17, 21, 4), "RGBA")
    image = image if mode == "RGBA" else image.convert("RGB").convert(mode)
    if mode == "LA":
        image.putalpha(Image.fromarray(noise(17, 21, seed=1)))
    path = tmp_path / f"a.{suffix}"
    image.save(path, **({"lossless": True} if suffix == "webp" else {}))
    with Image.open(path) as opened:
        rgba = np.asarray(opened.convert("RGBA")).astype(np.float64)
    read = read_image(path)
    assert read.dtype == np.uint8 and read.flags.c_contiguous and read.flags.writeable
    np.testing.assert_array_equal(read, np.floor(rgba[..., :3] * rgba[..., 3:] / 255 + 0.5))


# Orientation

@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "deep.tif"])
def test_exif_orientation(orientation, name, tmp_path):
    pixels = np.repeat(np.repeat(noise(3, 4, 3), 8, axis=0), 8, axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored, reference = io.BytesIO(), Image.fromarray(pixels)
    reference.save(stored, "JPEG", exif=exif, quality=100, subsampling=0)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(stored)))
    if name == "deep.tif":
        tifffile.imwrite(tmp_path / name, pixels.astype(np.uint16) * 257, photometric="rgb",
                         extratags=[(274, 3, 1, orientation, True)])
        read = read_image(tmp_path / name) // 257
    else:
        Image.fromarray(pixels).save(tmp_path / name, exif=exif, **(
            {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}))
        read = read_image(tmp_path / name)
    assert read.shape == shown.shape
    assert np.abs(read.astype(int) - shown).max() <= 4  # JPEG


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_refuse_the_image(tmp_path):
    Image.new("L", (9, 9), 5).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f" + b"\xff" * 20)
    assert read_image(tmp_path / "a.jpg").shape == (9, 9, 3)


# Damage

FILES = {
    "a.png": {}, "a.jpg": {}, "progressive.jpg": {"progressive": True}, "a.gif": {}, "a.bmp": {}, "a.webp": {},
    "lossless.webp": {"lossless": True}, "a.tif": {}, "lzw.tif": {"compression": "tiff_lzw"},
    "jpeg.tif": {"compression": "jpeg"}, "deep.png": {}, "deep.tif": {},
}


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_whole(name, tmp_path, capfd):
    """Cut before its last pixel a file is refused; cut inside what follows (an end mark) it may read, but in full."""
    pixels = cv2.resize(noise(5, 7, 3), (48, 40), interpolation=cv2.INTER_CUBIC)
    path = tmp_path / name
    if name == "deep.png":
        path.write_bytes(png(pixels.astype(np.uint16) * 257, 2))
    elif name == "deep.tif":
        tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric="rgb", compression="deflate")
    else:
        Image.fromarray(pixels).save(path, **FILES[name])
    data, whole = path.read_bytes(), read_image(path)
    ends = sorted({*range(0, len(data), len(data) // 60 + 1), *range(len(data) - 20, len(data))})
    refused = 0
    for end in ends:
        path.write_bytes(data[:end])
        try:
            np.testing.assert_array_equal(read_image(path), whole)
        except ImageError as error:
            refused += 1
            assert error.name == str(path) and "\n" not in error.reason
    assert refused >= len(ends) - 20
    if name != "jpeg.tif":  # there libjpeg speaks up for itself
        assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.gif"])
def test_a_program_that_lets_pillow_fill_up_truncated_files(name, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(noise(40, 40, 3)).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with Image.open(tmp_path / name) as lenient:
        lenient.load()  # the gray half that must not come back
    with pytest.raises(ImageError, match="the file is truncated"):
        read_image(tmp_path / name)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")), st.data())
def test_damaged_bytes_never_raise_anything_but_image_errors(tmp_path_factory, kind, data):
    stored = io.BytesIO()
    Image.fromarray(noise(12, 12, 3)).save(stored, kind)
    content = bytearray(stored.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        read = read_image(path)
    except ImageError:
        return
    assert read.ndim == 3 and read.shape[2] == 3 and min(read.shape[:2]) >= images.MIN_SIDE


def test_a_folder_is_no_image(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ImageError, match="x.png: is a folder, not an image"):
        read_image(tmp_path / "x.png")


def test_names_are_shown_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError) as refusal:
        read_image("./Schwelle 7 ä.png")
    assert str(refusal.value) == "./Schwelle 7 ä.png: no such file"


def test_lab_colours_are_refused(tmp_path):
    Image.new("LAB", (9, 9)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="colours of type LAB"):
        read_image(tmp_path / "a.tif")


# Values

def test_to_unit():
    np.testing.assert_array_equal(to_unit(np.array([0, 51, 255], np.uint8)), np.float32([0, 0.2, 1]))
    np.testing.assert_array_equal(to_unit(np.array([0, 13107, 65535], np.uint16)), np.float32([0, 0.2, 1]))
    np.testing.assert_array_equal(to_unit(np.array([True, False])), np.float32([1, 0]))
    assert to_unit(np.array([0.25])).dtype == np.float32
    for bad in (np.nan, np.inf, -0.01, 1.01):
        with pytest.raises(ImageError, match="^sleeper 9: "):
            to_unit(np.array([0.5, bad]), name="sleeper 9")
    with pytest.raises(ImageError, match="int32"):
        to_unit(np.array([1], np.int32))


# Whole

def test_load(tmp_path):
    pixels = noise(24, 40, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    unit = load_unit(tmp_path / "a.png", 16)
    np.testing.assert_array_equal(unit, resize_unit(pixels, 16))
    eight = load_uint8(tmp_path / "a.png", 16)
    assert eight.dtype == np.uint8
    assert np.abs(eight / 255 - unit).max() <= 0.5 / 255 + 1e-6


# Masks

def test_any_value_but_zero_is_anomalous(tmp_path):
    values = np.zeros((16, 24), np.uint8)
    values[3, 4], values[5, 6] = 1, 255
    Image.fromarray(values).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", (16, 24))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, values > 0)


@pytest.mark.parametrize("shape", [(32, 48), (8, 12), (16, 24), (160, 239)])
def test_masks_of_the_same_aspect_are_resized_by_nearest(shape, tmp_path):
    values = np.zeros((16, 24), np.uint8)
    values[8:, :12] = 9
    Image.fromarray(values).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", shape)
    expected = np.zeros(shape, bool)
    expected[shape[0] // 2 :, : (shape[1] + 1) // 2 if shape[1] % 2 == 0 else shape[1] // 2] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("shape", [(24, 16), (16, 16), (100, 200)])
def test_masks_of_another_aspect_are_refused(shape, tmp_path):
    Image.new("L", (24, 16)).save(tmp_path / "m.png")
    with pytest.raises(ImageError, match=f"m.png: the mask is 24x16, its image {shape[1]}x{shape[0]}"):
        read_mask(tmp_path / "m.png", shape)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "deep.tif"])
def test_the_first_of_several_frames_is_read_and_that_is_said_once(name, tmp_path, caplog):
    frames = [np.full((16, 16), value, np.uint8) for value in (200, 10, 90)]
    path, single = tmp_path / name, tmp_path / f"one-{name}"
    for target, kept in ((path, frames), (single, frames[:1])):
        if name == "deep.tif":
            tifffile.imwrite(target, np.stack(kept).astype(np.uint16) * 257, photometric="minisblack")
        else:
            first, *rest = map(Image.fromarray, kept)
            lossless = {"lossless": True} if name == "a.webp" else {}
            first.save(target, save_all=True, append_images=rest, **lossless)
    first, again, alone = read_image(path), read_image(path), read_image(single)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, alone)
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: holds several frames or pages; the first is read"
