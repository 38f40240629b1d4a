from __future__ import annotations

import io

import pytest
from rich.console import Console

from dfengine.training.log import RunLog


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "begin, words", [((0.25, 3723.0, None), ("25.0%", "1:02:03 left")), ((0.0, None, 40), ("0.0%", "40 steps left"))]
)
def test_what_is_left_is_shown_before_the_first_step(tmp_path, terminal, begin, words):
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal)
    with RunLog(tmp_path, console) as log:
        log.begin(*begin)
    assert all(word in console.file.getvalue() for word in words)
