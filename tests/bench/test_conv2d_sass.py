"""bench/kernels/_conv2d_sass.py: what is wrong with a loop of products of conv2d_wgmma.cu, by made-up instructions."""

from __future__ import annotations

import pytest

from bench import sass
from bench.kernels import _conv2d_sass as conv2d_sass

KERNEL = "conv2d_float16_wgmma_128x64"
STEP = ["LDSM.16.M88.4", "WARPGROUP.ARRIVE", "HGMMA.64x64x16.F32", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]


def wrong(code: list[str]) -> list[str]:
    lines = [
        sass.Instruction(16 * i, "", *(text.split(" ", 1) if " " in text else (text, "")), sass.NO_SCOREBOARD, 0)
        for i, text in enumerate(code)
    ]
    return conv2d_sass.wrong_of_wgmma(KERNEL, lines, lines, sass.shortest_turn(lines))


def test_products_that_stay_under_way_are_right():
    assert wrong(4 * STEP) == []


@pytest.mark.parametrize(
    "code, message",
    [
        (3 * STEP + [*STEP[:3], "WARPGROUP.DEPBAR.LE gsb0, 0x0"], "a wait for gsb0, 0x0"),
        (4 * STEP + ["WARPGROUP.DEPBAR.LE gsb0, 0x1"], "5 waits for 4 steps"),
        (3 * STEP, "3 HGMMA"),
        (4 * STEP + STEP[:1], "5 LDSM"),
        (3 * STEP + [*STEP[:2], "HGMMA.64x32x16.F32", STEP[3]], "HGMMA.64x32x16.F32, HGMMA.64x64x16.F32"),
        (4 * STEP + ["LDG.E.128"], "a turn has LDG"),
        (4 * STEP + 80 * ["IADD3"], "96 instructions a turn"),
    ],
)
def test_what_is_wrong(code, message):
    assert any(message in found for found in wrong(code))
