from __future__ import annotations

import tracemalloc
from fractions import Fraction

import cv2
import numpy as np
import pytest

from dfengine.data import images
from dfengine.data.images import resize_unit, resize_weights, to_unit


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("length, size", [(72, 64), (100, 7), (8, 64), (9, 9), (64, 65), (65, 64), (5000, 256)])
def test_resize_weights_against_exact_arithmetic(length, size):
    """Shrinking: the exact overlap of pixel i's interval with each input pixel. Growing: the hat function."""
    weights = resize_weights(length, size)
    for i in {0, 1, size // 2, size - 1}:
        low, high = Fraction(i * length, size), Fraction((i + 1) * length, size)
        for k in {0, 1, int(low), int(low) + 1, length // 2, length - 2, length - 1} & set(range(length)):
            if length > size:
                expected = max(Fraction(0), min(high, k + 1) - max(low, k)) / (high - low)
            else:
                centre = min(max((low + high) / 2 - Fraction(1, 2), 0), length - 1)
                expected = max(Fraction(0), 1 - abs(centre - k))
            assert weights[i, k] == pytest.approx(float(expected), abs=1e-12)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize("height, width, size", [(72, 72, 64), (37, 100, 64), (300, 9, 64), (8, 8, 32), (8, 4000, 16),
                                                 (4000, 8, 16), (64, 200, 64), (640, 480, 256)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resize_unit_is_the_two_matrices(height, width, size, dtype):
    array = np.random.default_rng(0).random((height, width, 3))
    array = array.astype(dtype) if dtype == np.float32 else (array * np.iinfo(dtype).max).astype(dtype)
    white = 1 if dtype == np.float32 else np.iinfo(dtype).max
    rows, columns = resize_weights(height, size), resize_weights(width, size)
    expected = np.einsum("ih,hwc,jw->ijc", rows, array / white, columns, optimize=True)
    resized = resize_unit(array, size)
    assert resized.dtype == np.float32 and resized.shape == (size, size, 3) and resized.flags.c_contiguous
    np.testing.assert_allclose(resized, expected, atol=2e-6)


def test_resize_does_not_depend_on_threads_or_strips(monkeypatch):
    array = noise(301, 517, 3)
    whole = resize_unit(array, 100)
    threads = cv2.getNumThreads()
    try:
        for count in (1, 2, 5):
            cv2.setNumThreads(count)
            np.testing.assert_array_equal(resize_unit(array, 100), whole)
    finally:
        cv2.setNumThreads(threads)
    monkeypatch.setattr(images, "STRIP_VALUES", 5000)
    np.testing.assert_array_equal(resize_unit(array, 100), whole)
    np.testing.assert_array_equal(resize_unit(array.transpose(1, 0, 2), 100), whole.transpose(1, 0, 2))


def test_resize_keeps_black_and_white_and_an_image_of_that_size():
    assert resize_unit(np.zeros((97, 31, 3), np.uint8), 64).max() == 0
    white = resize_unit(np.full((97, 31, 3), 255, np.uint8), 64)
    assert white.max() == 1 and white.min() > 1 - 1e-6
    array = noise(32, 32, 3)
    np.testing.assert_array_equal(resize_unit(array, 32), to_unit(array))


def test_resize_of_a_large_image_needs_little_memory():
    array = noise(3000, 4000, 3)
    tracemalloc.start()
    resize_unit(array, 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * array.nbytes  # a float copy would be 4 times
