from __future__ import annotations

import pytest

from dfengine.training.validation import verdict


@pytest.mark.parametrize(
    "auroc, cases, doubtful",
    [(1.0, 100, False), (0.9999, 99, False), (0.97, 97, False), (0.29, 29, True), (0.8499, 84, True), (0.85, 85, 0)],
)
def test_the_verdict_counts_cases_and_warns_below_85(auroc, cases, doubtful):
    first, *others = verdict({"val_image_auroc": auroc, "val_pixel_ap": 0.1})
    assert first == (
        "on held-out images with synthetic defects the detector ranks a defective above a sound image in "
        f"{cases} of 100 cases"
    )
    assert len(others) == int(doubtful)
    assert all("more minutes or more images would help; look at the last panel" in line for line in others)


def test_the_verdict_says_where_it_is_optimistic_or_missing():
    assert verdict({"val_image_auroc": 0.9}, trained=2)[0].endswith("(optimistic: the weights have seen 2 of them)")
    assert verdict({"val_noise_loss": 0.1}) == [
        "no verdict on quality: these weights were never tried on synthetic defects"
    ]
