"""Joint steps that leave the denoiser as it is: through the engine's kernels, and as the modules do it."""

from __future__ import annotations

import pytest
import torch

from dfengine import native
from dfengine.data.synthesis import Synthesizer
from dfengine.data.textures import TextureSource
from dfengine.training.config import TrainConfig
from dfengine.training.data import read_normals
from dfengine.training.distributed import World
from dfengine.training.frozen import FrozenDenoiser
from dfengine.training.group_norm import speed_up
from dfengine.training.precision import Precision
from dfengine.training.state import RunState
from dfengine.training.step import Losses, Objective
from dfengine.training.trainer import Trainer
from tests.helpers import redraw, tiny_config, tiny_model

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no compiled kernels: {native.reason}")
CPU = torch.device("cpu")


def config(**changes) -> TrainConfig:
    return TrainConfig(**{"steps": 1, "inference_t_share": 1.0, "denoiser_every": 2, **changes})


def batch_of(size: int, count: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8),
        "mask": torch.randint(0, 2, (count, size, size), dtype=torch.uint8),
        "label": torch.arange(count) % 2,
        "position": torch.arange(count),
    }


def step_of(model, precision: str, kernels: bool) -> tuple[Losses, torch.Tensor]:
    """The losses of a step that leaves the denoiser, and the segmentation network's gradient in one piece."""
    objective = Objective(model, config().resolve(model.config), model.config, Precision(precision, CPU))
    assert objective.frozen
    if not kernels:
        objective.frozen = None
    losses = objective(batch_of(model.config.image_size), 2, train_denoiser=False)
    assert not losses.noise.requires_grad
    gradients = torch.autograd.grad(losses.total, list(model.segmentation.parameters()))
    return losses, torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("pixel_range", ["unit", "signed"])
def test_a_step_is_that_of_the_modules(pixel_range):
    model = tiny_model(pixel_range=pixel_range)
    speed_up(model.train())
    exact, gradient = step_of(model, "float32", kernels=False)
    for precision, loss_floor, floor in (("float32", 1e-5, 1e-3), ("bfloat16", 1e-2, 2e-2)):
        (have, own), (want, others) = (step_of(model, precision, kernels) for kernels in (True, False))
        for kernels, modules, true in zip(have, want, exact, strict=True):
            allowed = 2 * abs(modules - true) + loss_floor * abs(true)
            assert abs(kernels - true) <= allowed
        allowed = 2 * (others - gradient).norm() + floor * gradient.norm()
        assert (own - gradient).norm() <= allowed
        assert precision != "float32" or allowed < 0.1 * gradient.norm()


def test_a_trainer_tells_it_of_new_weights(normals):
    model_config = tiny_config()
    images = read_normals(normals, 32, 0.2, 0).images
    options = config(workers=0, batch_size=2, device="cpu", precision="float32", init=None).resolve(model_config)
    synthesizer = Synthesizer(images, TextureSource.procedural(32), options.synthesis)
    with World("cpu") as world:
        precision = Precision("float32", world.device)
        trainer = Trainer(options, model_config, images, synthesizer, world, precision, RunState({}))
        redraw(trainer.model)
        found = []
        for number in range(4):
            trainer.step(2, 0.5)
            trained = number % 2 == 0
            assert (trainer.objective.frozen._executor is None) == trained
            have = trainer.objective(batch_of(32), 2, train_denoiser=False)
            fresh = Objective(trainer.model, options, model_config, precision)(batch_of(32), 2, train_denoiser=False)
            assert have.noise == fresh.noise
            found.append(have.noise.item())
        assert found[0] == found[1] != found[2] == found[3]


def test_a_sample_does_not_depend_on_its_batch():
    model = tiny_model()
    frozen = FrozenDenoiser(model, Precision("float32", CPU))
    torch.manual_seed(0)
    x_0, noise = torch.rand(3, 3, 32, 32), torch.randn(2, 3, 3, 32, 32)
    pair, eps = frozen(x_0, noise)
    one, its = frozen(x_0[1:2], noise[:, 1:2])
    assert torch.equal(one, pair[1:2]) and torch.equal(its, eps[:, 1:2])


@pytest.mark.parametrize(
    "model, train, device",
    [({"mode": "averaged"}, {}, "cpu"), ({"mode": "iterative"}, {}, "cpu"), ({}, {"inference_t_share": 0.9}, "cpu"),
     ({}, {}, "meta")],
)  # fmt: skip
def test_where_the_modules_stay(model, train, device):
    model = tiny_model(**model)
    options = config().replace(**train).resolve(model.config)
    assert FrozenDenoiser.serves(tiny_model(), config(), Precision("float32", CPU))
    assert not FrozenDenoiser.serves(model, options, Precision("float32", torch.device(device)))
