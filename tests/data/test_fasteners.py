from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from dfengine.data.fasteners import DEFECTS, render_fastener, write_fasteners
from dfengine.data.fasteners.render import render_noiseless
from dfengine.errors import DfengineError, UsageError

SIZE = 128
BROKEN_WAYS = DEFECTS[1:]


@pytest.fixture(scope="module")
def renderings():
    """Eight noiseless scenes of each defect, both clip types among them."""
    return {defect: [render_noiseless(3, index, defect, SIZE, "test") for index in range(8)] for defect in BROKEN_WAYS}


def test_both_clip_types_are_covered(renderings):
    for scenes in renderings.values():
        assert {result.scene.fastener.kind for result in scenes} == {"e", "w"}


@pytest.mark.parametrize("defect", DEFECTS)
def test_same_arguments_give_the_same_bytes_whatever_the_threads(defect):
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        image, mask = render_fastener(1, 5, defect, SIZE)
        cv2.setNumThreads(4)
        again, mask_again = render_fastener(1, 5, defect, SIZE)
    finally:
        cv2.setNumThreads(threads)
    assert image.dtype == np.uint8 and image.shape == (SIZE, SIZE, 3)
    assert mask.dtype == bool and mask.shape == (SIZE, SIZE)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)


def test_seed_index_split_and_defect_each_make_another_picture():
    pictures = [
        render_fastener(seed, index, defect, 64, split)[0].astype(float)
        for seed, index, defect, split in (
            (0, 0, "good", "train"),
            (1, 0, "good", "train"),
            (0, 1, "good", "train"),
            (0, 0, "missing", "train"),
            (0, 0, "good", "test"),
        )
    ]
    for i, first in enumerate(pictures):
        for second in pictures[:i]:
            assert np.abs(first - second).mean() > 4


def test_good_pictures_are_exposed_and_have_no_mask():
    for index in range(6):
        image, mask = render_fastener(2, index, "good", 64)
        assert not mask.any()
        assert 30 < image.mean() < 225
        assert image.std() > 12


@pytest.mark.parametrize("defect", BROKEN_WAYS)
def test_mask_holds_the_change_and_nothing_else(renderings, defect):
    for result in renderings[defect]:
        change = np.abs(result.image - result.good).max(axis=2)
        assert 0.015 < result.mask.mean() < 0.30
        assert change[result.mask].mean() > 0.05
        # Beyond the mask only cast and ambient shadows of the clip may differ: nothing gets the clip's own texture.
        near = cv2.dilate(result.mask.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
        assert change[~near].mean() < 0.03
        assert change[result.mask].mean() > 4 * change[~near].mean()


@pytest.mark.parametrize("defect", BROKEN_WAYS)
def test_defects_stay_visible_at_64_pixels(renderings, defect):
    """A person sees a change of about 0.05 of full scale over a connected patch of some 20 pixels."""
    for result in renderings[defect]:
        small = cv2.resize(np.abs(result.image - result.good).max(axis=2), (64, 64), interpolation=cv2.INTER_AREA)
        count, _, stats, _ = cv2.connectedComponentsWithStats((small > 0.05).astype(np.uint8), connectivity=8)
        assert count > 1 and stats[1:, cv2.CC_STAT_AREA].max() >= 20


def test_noiseless_pictures_are_finite_and_in_range(renderings):
    for scenes in renderings.values():
        for result in scenes:
            assert result.image.shape == result.good.shape
            assert result.image.min() >= 0 and result.image.max() <= 1
            assert np.isfinite(result.image).all()


@pytest.mark.parametrize("size", [32, 45, 64, 200])
def test_any_size(size):
    image, mask = render_fastener(0, 0, "broken", size)
    assert image.shape == (size, size, 3) and mask.shape == (size, size) and mask.any()


def test_the_same_scene_at_two_sizes_looks_the_same():
    large = cv2.resize(render_noiseless(4, 2, "good", 192).image, (48, 48), interpolation=cv2.INTER_AREA)
    small = cv2.resize(render_noiseless(4, 2, "good", 96).image, (48, 48), interpolation=cv2.INTER_AREA)
    assert np.corrcoef(large.ravel(), small.ravel())[0, 1] > 0.85


@pytest.mark.parametrize(
    "arguments",
    [(0, 0, "scratched"), (-1, 0, "good"), (0, -1, "good"), (0, 0, "good", 31), (0, 0, "good", 64, "valid")],
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(UsageError):
        render_fastener(*arguments)


def test_writes_the_mvtec_layout(tmp_path):
    calls = []
    write_fasteners(tmp_path, train=3, test_good=2, per_defect=1, seed=7, size=32, progress=lambda *a: calls.append(a))
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = {f"train/good/00{i}.png" for i in range(3)} | {f"test/good/00{i}.png" for i in range(2)}
    expected |= {f"test/{defect}/000.png" for defect in BROKEN_WAYS}
    expected |= {f"ground_truth/{defect}/000_mask.png" for defect in BROKEN_WAYS}
    assert written == expected
    assert calls == [(i + 1, 8) for i in range(8)]
    image, mask = render_fastener(7, 0, "displaced", 32, "test")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "test/displaced/000.png")), image)
    stored = np.asarray(Image.open(tmp_path / "ground_truth/displaced/000_mask.png"))
    np.testing.assert_array_equal(stored, np.where(mask, 255, 0))


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.raises(DfengineError) as caught:
        write_fasteners(blocker / "set", train=1, test_good=0, per_defect=0, size=32)
    assert str(blocker) in str(caught.value) and "\n" not in str(caught.value)
    assert blocker.read_text() == "in the way"
