"""A model's modules beside its program: in float64, and which module gives what an op writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfengine.engine.modules import ModuleRunner
from dfengine.engine.program import Op, Program
from dfengine.models import Model
from dfengine.models.blocks import AttentionBlock, ResBlock


class ExactRunner(ModuleRunner):
    """`ModuleRunner` in float64 from the float32 images and noise on. The model becomes float64."""

    def __init__(self, model: Model, device: str | torch.device = "cpu", seed: int = 0):
        super().__init__(model.double(), device, "float32", seed)
        embedding = self.model.reconstruction.time_embedding[0]
        embedding.register_forward_hook(lambda _module, _inputs, output: output.double())

    def _draw(self, draw: int, step: int, scale: int) -> Tensor:
        return super()._draw(draw, step, scale).double()

    def reconstruct(self, x_0: Tensor, draw: int = 0) -> list[Tensor]:
        return super().reconstruct(x_0.double(), draw)

    def segment(self, x_0: Tensor, reconstruction: Tensor) -> Tensor:
        pair = torch.cat((x_0.double(), reconstruction), dim=1)
        return self.model.segmentation(pair).sigmoid()[:, 0]


def named_outputs(model: Model) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
    """Modules whose outputs a program has too, with the names that the op may bear which writes them, the last first.

    Those of the reconstruction network are its first convolution, its blocks and its result; those of the
    segmentation network the activations, each the end of one op, and the logits.
    """
    for path, module in model.reconstruction.named_modules():
        if isinstance(module, ResBlock):
            yield module, (f"{path}.gates", f"{path}.conv2")
        elif isinstance(module, AttentionBlock):
            yield module, (f"{path}.proj",)
        elif path in ("down.0", "out"):
            yield module, (path,)
    network = model.segmentation
    for part in (network.encoder_segment, network.decoder_segment):
        for name, group in part.named_children():
            activations = [module for module in group if isinstance(module, (nn.GELU, nn.SiLU, nn.ReLU))]
            for index, module in enumerate(activations):
                yield module, (f"segment.{name}.{index}",)
    yield network.decoder_segment.fin_out, ("segment.out",)


def module_ops(model: Model, program: Program) -> list[tuple[nn.Module, tuple[Op, ...]]]:
    """Each module of `named_outputs` with the ops that write what it gives, one for each noise draw. Raises ValueError
    where the program has none."""
    ops = {op.name: op for op in program.ops}
    draws = model.config.noise_draws
    found = []
    for module, names in named_outputs(model):
        shared = draws == 1 or names[0].startswith("segment.")  # one segmentation serves all draws
        tags = [""] if shared else [f"draw{draw}." for draw in range(draws)]
        name = next((name for name in names if all(tag + name in ops for tag in tags)), None)
        if name is None:
            raise ValueError(f"the program has no op called {' or '.join(names)}")
        found.append((module, tuple(ops[tag + name] for tag in tags)))
    return found


@contextmanager
def watched(
    modules: list[tuple[nn.Module, tuple[Op, ...]]], take: Callable[[Op, int, Tensor], None]
) -> Iterator[None]:
    """For `with`: every output of the modules, a view (rows, H, W, C), goes to `take(op, first, output)`: these are the
    rows of what `op` writes from `first` on. Modules are called once for all rows of an op, or for its parts in turn.
    """

    def hook(ops: tuple[Op, ...]) -> Callable[[nn.Module, tuple, Tensor], None]:
        rows = 0

        def taken(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            nonlocal rows
            turn, first = divmod(rows, ops[0].arguments["y"].shape[0])
            take(ops[turn], first, output.permute(0, 2, 3, 1))
            rows += len(output)

        return taken

    handles = [module.register_forward_hook(hook(ops)) for module, ops in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
