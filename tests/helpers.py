"""Small models for tests, with every weight redrawn so that each layer changes the output (DESIGN section 3)."""

from __future__ import annotations

import torch

from dfengine import precision as module
from dfengine.engine.modules import Output, image_score
from dfengine.models import Model, ModelConfig, build_model, preset


def tiny_config(**changes) -> ModelConfig:
    """A 32-pixel configuration with every kind of block, small enough for a millisecond test."""
    fields = dict(image_size=32, multipliers=(1, 2), base=8, heads=2, seg_base=4, attention_factors=(2,), reduction=4)
    return preset("diff-fastener", **{**fields, **changes})


def redraw(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Redraws every parameter and statistic of `module` in place, zero-initialised ones included."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            scale = 0.5 if tensor.dim() == 1 else tensor[0].numel() ** -0.5
            tensor.data = torch.randn(tensor.shape, generator=generator) * scale
            if name.endswith("running_var"):
                tensor.data = tensor.data.abs() + 0.5
    return module


def tiny_model(seed: int = 0, **changes) -> Model:
    """A redrawn model of `tiny_config(**changes)`, in evaluation mode."""
    return redraw(build_model(tiny_config(**changes)), seed).eval()


def spoil_precision(monkeypatch, precision: str, change) -> None:
    """Detectors that run in `precision` get their anomaly maps (B, S, S) changed in place by `change`, and the scores
    that belong to them."""
    make = module.make_runner

    def spoilt(model, device, used, *more):
        runner = make(model, device, used, *more)
        if used == precision:
            run = runner.run

            def changed(unit):
                output = run(unit)
                maps = output.anomaly_map.clone()
                change(maps)
                return Output(maps, output.reconstruction.clone(), image_score(maps, runner.config.top_k))

            runner.run = changed
        return runner

    monkeypatch.setattr(module, "make_runner", spoilt)
