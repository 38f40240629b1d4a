from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dfengine.evaluation.plots import DEFECT, GOOD, pr_plot, roc_plot, score_histogram


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)


def has_colour(png, colour):
    return (pixels(png) == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=1).any()


def test_equal_input_gives_equal_bytes():
    assert roc_plot([0, 0, 1], [0, 1, 1], "x") == roc_plot([0, 0, 1], [0, 1, 1], "x")
    assert pr_plot([0, 1], [1, 0.5], 0.5) == pr_plot([0, 1], [1, 0.5], 0.5)


@pytest.mark.parametrize("scores", [[0.5], [0, 1], [0.4] * 10])
def test_histogram_colours_follow_the_truth(scores):
    unknown = score_histogram(scores, None, 0.1)
    assert has_colour(unknown, GOOD) and not has_colour(unknown, DEFECT)
    assert has_colour(score_histogram(scores, [True] * len(scores), 0.1), DEFECT)
