from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dfengine.engine.execute import Executor
from dfengine.engine.lower import Lowering
from dfengine.engine.measure import measure, unmeasured
from dfengine.engine.roofline import roofline_plot
from dfengine.engine.timing import Ceilings
from tests.helpers import tiny_model


def test_a_measured_plan_becomes_a_png():
    executor = Executor(Lowering(tiny_model()).program(1))
    plan = measure(executor, 0.0, Ceilings({torch.float32: 1e11, torch.int8: 4e11}, {2**18: 5e10, 2**28: 1e10}))
    content = roofline_plot(plan, "tiny on this machine")
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and image.width > 1200
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = {tuple(p) for p in pixels[::7]}
    assert (255, 255, 255) in colours and len(colours) > 50  # points and lines, not a white page
    with pytest.raises(ValueError, match="no ceilings"):
        roofline_plot(unmeasured(executor), "tiny")
