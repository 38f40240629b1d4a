from __future__ import annotations

import io

import pytest
from rich.console import Console

from dfengine.training.log import RunLog, loss_figure


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "begin, words", [((0.25, 3723.0, None), ("25.0%", "1:02:03 left")), ((0.0, None, 40), ("0.0%", "40 steps left"))]
)
def test_what_is_left_is_shown_before_the_first_step(tmp_path, terminal, begin, words):
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with RunLog(tmp_path, console) as log:
        log.begin(*begin)
    assert all(word in console.file.getvalue() for word in words)


def test_the_loss_plot_hides_no_point_and_speaks_plainly():
    rows = [{"step": step, "noise_loss": 1 / step, "mask_loss": 1 / step} for step in range(1, 9)]
    rows += [{"step": 8, "val_noise_loss": 0.2, "val_image_auroc": 0.9, "val_pixel_auroc": 0.8, "val_pixel_ap": 0.5}]
    figure = loss_figure(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend, plotted = axes.get_legend().get_window_extent(), axes.patch.get_window_extent()
        assert not legend.overlaps(plotted)
        assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width and legend.y1 <= figure.bbox.height
        assert not any("_" in text.get_text() for text in axes.get_legend().get_texts())
        assert all(len(line.get_xdata()) for line in axes.lines)
