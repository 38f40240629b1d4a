from __future__ import annotations

import io
import tempfile
from array import array as PlainArray
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from dfengine.data import inputs as inputs_module
from dfengine.data.images import resize_unit
from dfengine.data.inputs import InputImage, collect_inputs
from dfengine.errors import DataError, ImageError, UsageError


def noise(*shape: int, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def pixels_of(dtype: type, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels of a type, and the same in [0, 1] as float64."""
    values = noise(*shape, dtype=np.uint16)
    if dtype is bool:
        array = values > 9999
    elif np.issubdtype(dtype, np.floating):
        array = (values / 65535).astype(dtype)
    else:
        array = values if dtype is np.uint16 else (values >> 8).astype(dtype)
    white = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return array, array.astype(np.float64) / white


@pytest.fixture
def folder(tmp_path):
    for i in (2, 10, 1):
        Image.fromarray(noise(12 + i, 20, 3)).save(tmp_path / f"{i}.png")
    return tmp_path


# Paths

def test_a_path_is_read_only_when_it_is_loaded(folder):
    (image,) = collect_inputs(str(folder / "2.png"))
    assert isinstance(image, InputImage) and image.name == str(folder / "2.png")
    np.testing.assert_array_equal(image.load(16), resize_unit(noise(14, 20, 3), 16))
    assert image.original_size == (14, 20)
    (folder / "2.png").unlink()
    with pytest.raises(ImageError, match="2.png: no such file"):
        image.load(16)


def test_original_size_without_loading(folder):
    assert collect_inputs(folder / "10.png")[0].original_size == (22, 20)
    with pytest.raises(ImageError, match="gone.png: no such file"):
        _ = collect_inputs("gone.png")[0].original_size


def test_a_folder_is_all_its_images_in_natural_order(folder):
    assert [Path(image.name).name for image in collect_inputs(folder)] == ["1.png", "2.png", "10.png"]


def test_names_are_as_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [image.name for image in collect_inputs(["./2.png", "x/../1.png"])] == ["./2.png", "x/../1.png"]


def test_a_folder_without_images(tmp_path):
    with pytest.raises(DataError, match="no image in this folder"):
        collect_inputs(tmp_path)
    good, bad = collect_inputs([np.zeros((8, 8)), tmp_path])
    assert good.load(8).shape == (8, 8, 3)
    with pytest.raises(ImageError) as refusal:
        bad.load(8)
    assert refusal.value.name == str(tmp_path)
    assert refusal.value.reason.startswith("no image in this folder")


# Arrays

@pytest.mark.parametrize("shape, count", [((9, 11), 1), ((9, 11, 1), 1), ((9, 11, 3), 1), ((9, 11, 4), 1),
                                          ((5, 9, 11, 1), 5), ((5, 9, 11, 3), 5), ((1, 9, 11, 4), 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64, bool])
def test_arrays(shape, count, dtype):
    array, unit = pixels_of(dtype, *shape)
    unit = (unit[..., None] if unit.ndim == 2 else unit).reshape(count, 9, 11, -1)
    unit = unit[..., :3] * unit[..., 3:] if unit.shape[-1] == 4 else unit
    images = collect_inputs(array)
    assert [image.name for image in images] == \
        (["batch[0]"] if len(shape) < 4 else [f"batch[{i}]" for i in range(count)])
    for image, expected in zip(images, unit, strict=True):
        expected = np.broadcast_to(expected, (9, 11, 3)).astype(np.float32)
        assert image.original_size == (9, 11)
        np.testing.assert_allclose(image.load(16), resize_unit(np.ascontiguousarray(expected), 16), atol=0.6 / 255)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(8, 20), st.integers(8, 20), st.sampled_from((1, 3)))))
def test_depths_of_the_same_picture_read_alike(array):
    results = [collect_inputs(a)[0].load(12) for a in (
        array, array.astype(np.uint16) * 257, array / 255, torch.from_numpy(array).permute(2, 0, 1),
        array[::-1][::-1], Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array))]
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], atol=2e-6)


def test_the_batch_is_not_changed_and_not_aliased():
    array = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    kept = array.copy()
    loaded = collect_inputs(array)[1].load(16)
    loaded[:] = 0
    np.testing.assert_array_equal(array, kept)


# Tensors

@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.bfloat16, torch.float16, torch.float32,
                                   torch.float64, torch.bool])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensors_are_channels_first(dtype, channels):
    values = torch.from_numpy(noise(2, channels, 10, 14)) > 99
    white = {torch.uint8: 255, torch.uint16: 65535}.get(dtype, 1)
    tensor = (values.to(torch.int32) * white).to(dtype)
    images = collect_inputs(tensor)
    assert [image.name for image in images] == ["batch[0]", "batch[1]"]
    for image, value in zip(images, values.float().permute(0, 2, 3, 1).numpy(), strict=True):
        expected = value[..., :3] * value[..., 3:] if channels == 4 else np.repeat(value, 3 // channels, axis=2)
        assert image.original_size == (10, 14)
        np.testing.assert_allclose(image.load(12), resize_unit(np.ascontiguousarray(expected), 12), atol=1e-6)
    np.testing.assert_array_equal(collect_inputs(tensor[1])[0].load(12), images[1].load(12))


def test_tensors_with_gradients_strides_and_lazy_negation():
    tensor = torch.rand(3, 32, 64, requires_grad=True)[:, ::2, ::3]
    expected = resize_unit(np.ascontiguousarray(tensor.detach().numpy().transpose(1, 2, 0)), 12)
    np.testing.assert_array_equal(collect_inputs(tensor)[0].load(12), expected)
    negated = torch._neg_view(-tensor.detach())
    np.testing.assert_array_equal(collect_inputs(negated)[0].load(12), expected)


def test_a_gray_tensor_of_rank_2():
    assert collect_inputs(torch.full((9, 9), 0.5))[0].load(9).mean() == 0.5


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, bool])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("height, width", [(72, 40), (9, 30), (24, 24)])
def test_resizing_on_a_device_equals_resizing_on_the_host(height, width, channels, dtype):
    """`_resize_tensor` is what runs for tensors on a GPU; here on the CPU."""
    array, _ = pixels_of(dtype, height, width, channels)
    on_device = inputs_module._resize_tensor(torch.from_numpy(array), 24, "x")
    assert on_device.dtype == torch.float32 and on_device.shape == (24, 24, 3)
    on_host = InputImage("x", array=array).load(24)
    # The host rounds a composited integer colour to its own depth.
    tolerance = 0.51 / 255 if channels == 4 and dtype == np.uint8 else 1e-5
    np.testing.assert_allclose(on_device.numpy(), on_host, atol=tolerance)


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.1, 1.1])
def test_device_tensors_are_checked(value):
    tensor = torch.full((9, 9, 3), 0.5)
    tensor[4, 5, 1] = value
    with pytest.raises(ImageError, match="^batch.2.: "):
        inputs_module._resize_tensor(tensor, 9, "batch[2]")


def test_load_tensor():
    array = noise(20, 30, 3)
    (image,) = collect_inputs(array)
    np.testing.assert_array_equal(image.load_tensor(16).numpy(), image.load(16))
    held = InputImage("x", array=torch.from_numpy(array))
    np.testing.assert_allclose(held.load_tensor(16, "cpu").numpy(), image.load(16), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_stay_on_the_gpu():
    class Foreign:
        def __init__(self, tensor):
            self.__cuda_array_interface__ = tensor.__cuda_array_interface__

    tensor = torch.from_numpy(noise(2, 40, 30, 3)).cuda()
    images = collect_inputs(Foreign(tensor))
    assert images[0].array.data_ptr() == tensor.data_ptr()
    expected = collect_inputs(tensor.cpu().numpy())
    for image, host in zip(images + collect_inputs(tensor.permute(0, 3, 1, 2)), expected * 2, strict=True):
        assert image.load_tensor(16, "cuda").is_cuda
        np.testing.assert_allclose(image.load(16), host.load(16), atol=1e-6)


# Other holders of pixels

class DLPack:
    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class ArrayLike:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_dlpack_is_channels_last_and_shares_memory():
    tensor = torch.rand(9, 12, 3)
    (image,) = collect_inputs(DLPack(tensor))
    tensor.fill_(0.25)
    np.testing.assert_array_equal(image.load(9), np.full((9, 9, 3), 0.25, np.float32))


def test_array_likes():
    np.testing.assert_array_equal(collect_inputs(ArrayLike(noise(9, 9)))[0].load(9),
                                  collect_inputs(noise(9, 9))[0].load(9))


def test_a_foreign_array_that_cannot_be_taken_over():
    class Broken:
        def __dlpack__(self, **options):
            raise BufferError("read-only")

        def __dlpack_device__(self):
            return (1, 0)

    with pytest.raises(ImageError, match=r"batch: the array cannot be taken over \(read-only\)"):
        collect_inputs(Broken())


def test_pil_images_are_named_after_their_file_and_read_upright(folder):
    opened = Image.open(folder / "2.png")
    drawn = Image.new("RGB", (20, 10), "white")
    drawn.getexif()[0x0112] = 6
    first, second = collect_inputs([opened, drawn])
    assert (first.name, second.name) == (str(folder / "2.png"), "batch[1]")
    np.testing.assert_array_equal(first.load(16), collect_inputs(folder / "2.png")[0].load(16))
    assert second.original_size == (20, 10)


def test_a_truncated_pil_image_keeps_to_itself(folder):
    data = (folder / "10.png").read_bytes()
    (folder / "10.png").write_bytes(data[: len(data) // 2])
    with Image.open(folder / "10.png") as half, Image.open(folder / "1.png") as whole:
        bad, good = collect_inputs([half, whole])
        with pytest.raises(ImageError, match="10.png: the file is truncated"):
            bad.load(16)
        assert good.load(16).shape == (16, 16, 3)


# Lists

class Camera:
    def __init__(self, frames):
        self.frames = frames

    def __iter__(self):
        return iter(self.frames)


def test_mixed_lists_iterators_and_batches_in_lists(folder):
    items = [folder / "1.png", folder, np.zeros((2, 9, 30, 3)), torch.ones(3, 40, 8), Image.new("L", (8, 8))]
    expected = [str(folder / "1.png"), *(str(folder / f"{i}.png") for i in (1, 2, 10)),
                "batch[2][0]", "batch[2][1]", "batch[3]", "batch[4]"]
    for batch in (items, tuple(items), iter(items), deque(items), dict(enumerate(items)).values(), Camera(items)):
        images = collect_inputs(batch)
        assert [image.name for image in images] == expected
        assert all(image.load(8).shape == (8, 8, 3) for image in images)


def test_a_bad_item_carries_its_reason():
    images = collect_inputs([np.zeros((8, 8)), np.zeros((3, 8, 8)), "gone.png", np.full((8, 8), 7.0), np.zeros((8, 8))])
    reasons = {}
    for image in images:
        try:
            image.load(8)
        except ImageError as error:
            assert error.name == image.name
            reasons[image.name] = error.reason
    assert list(reasons) == ["batch[1]", "gone.png", "batch[3]"]
    assert "channels first" in reasons["batch[1]"]
    assert reasons["batch[3]"] == "float pixels from 7 to 7; expected [0, 1]"


@pytest.mark.parametrize("batch, message", [
    ([], "batch: is empty"), (iter(()), "batch: is empty"), (None, "batch: is of type NoneType"),
    ({"a": 1}, "is of type dict"), (b"\x89PNG", "is of type bytes"),
    ([[np.zeros((8, 8))]], r"batch\[0\]: is of type list"), ({"a.png"}, "is of type set"),
    (bytearray(b"PNG"), "is of type bytearray"), (Camera, "is of type type"), ([Camera([])], "is of type Camera"),
    (range(3), "batch: is of type range"), (PlainArray("f", (0, 1)), "batch: is of type array"),
    ([np.float32(3)], r"batch\[0\]: is of type float32"), (np.uint8(3), "batch: is of type uint8"),
    (3, "is of type int; expected .* a NumPy array or a torch tensor, or a list or another iterable of these$"),
    ([["a.png"]], "is of type list; expected a path, a PIL image, a NumPy array or a torch tensor$"),
    ([[np.zeros((8, 8)), 1]], r"is of type list; .* tensor; give the images alone, as in `\(images for"),
    ([[np.zeros((8, 8)), np.zeros((8, 8))]], "a NumPy array or a torch tensor$"),
    ([{"label": 1, "image": torch.zeros(2, 3, 8, 8)}], r"is of type dict; .* in `\(item\['image'\] for item in loader"),
    ([(torch.zeros(2, 3, 8, 8), torch.zeros(2))], r"batch\[0\]: is of type tuple; .* tensor; give the images alone"),
])
def test_what_holds_no_images(batch, message):
    with pytest.raises(UsageError, match=message):
        collect_inputs(batch)


def test_what_an_iterable_raises_is_raised():
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        collect_inputs(Camera(3))


def test_open_files_are_refused_and_not_read(folder):
    with open(folder / "1.png", "rb") as binary, open(folder / "1.png") as text, \
            tempfile.NamedTemporaryFile() as wrapped:
        for file in (binary, text, wrapped, io.BytesIO(b"one\ntwo\n")):
            for batch, name in ((file, "batch"), ([np.zeros((8, 8)), file], r"batch\[1\]")):
                refusal = rf"^{name}: is an open file \({type(file).__name__}\); give its path, or the image as"
                with pytest.raises(UsageError, match=refusal):
                    collect_inputs(batch)
            assert file.tell() == 0
