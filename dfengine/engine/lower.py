"""Lowers a model to a program: walks its modules, without tracing, and does the algebra once (DESIGN section 2).

The time embedding of a fixed t becomes, with the convolution's bias, a shift that the following GroupNorm takes in;
skip concatenations are two-source reads; resampling is index arithmetic of the reading convolution; both noise scales
are one batch of 2B, scale s first; the reverse chain of mode "iterative" is a loop, whose shifts come from a table of
all steps. This file and lower_segmentation.py alone know models and kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from torch import nn

from dfengine.diffusion import Schedule
from dfengine.engine.builder import Builder, Feature, Fusion, Norm
from dfengine.engine.lower_segmentation import segmentation
from dfengine.engine.modules import top_k_count
from dfengine.engine.program import Constant, Loop, PerStep, Program, Value
from dfengine.errors import DfengineError
from dfengine.kernels import ingest, reverse_step, score
from dfengine.kernels.channel_attention import pack_gate, pack_spatial, workspace_size
from dfengine.kernels.one_step import coefficients
from dfengine.kernels.quantization import Quantization
from dfengine.models import Model
from dfengine.models.blocks import AttentionBlock, ResBlock

GAIN = {"unit": (1.0, 0.0), "signed": (2.0, -1.0)}
"""(gain, offset) from [0, 1] to model pixels."""


class NotLoweredError(DfengineError):
    """The engine has no program for this configuration; the message says why."""


class Lowering:
    """The programs of one model: `program(batch)`; their constants are shared.

    dtype: of activations and weights: float32, float16, bfloat16 (and float64 through the reference kernels).
    backend: the kernels that will run: "cpu", which read noise that is drawn once, or those of a GPU, which draw it.
    fusion: what a convolution does itself; by the backend where it is None. disposable, quantizations: as in `Builder`.
    The model must not change afterwards; after `release` its weights are gone.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        backend: str = "cpu",
        fusion: Fusion | None = None,
        disposable: bool = True,
        quantizations: Mapping[str, Quantization] | None = None,
    ):
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend = backend
        self.fusion = fusion or Fusion.of(backend)
        self.disposable = disposable
        self.quantizations = quantizations or {}
        self.constants: dict[str, Constant] = {}
        self.schedule = Schedule.of(model.config)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        chain = range(model.config.t_b, -1, -1)
        self.steps = list(chain) if model.config.mode == "iterative" else [model.config.t_s, model.config.t_b]
        """The t of the network's evaluations: one after the other, or of both halves of one batch."""
        steps = torch.tensor(self.steps)
        with torch.no_grad():
            network = model.reconstruction
            embedding = network.time_embedding[0](steps).to(network.time_embedding[1].weight)
            embedding = network.time_embedding[1:](embedding).to("cpu", precise)  # (steps, time channels)
            self.shifts = dict(_shifts(network, embedding))
            """(steps, O) by block: what its conv1 leaves to norm2, its bias and the time bias."""

    def release(self) -> None:
        """Free the model's weights, which no later program needs: the constants of the first one hold them."""
        if not self.constants:
            raise ValueError("no program was lowered yet")
        self.model.to("meta")

    def alpha_bar(self, steps: Iterable[int]) -> list[float]:
        return [float(self.schedule.alpha_bar[t]) for t in steps]

    def reverse_coefficients(self, t: int) -> tuple[float, ...]:
        """Of kernels/reverse_step.py; at t = 0 they are those of an x_0 known exactly: only clamp(x0_hat) is left."""
        before = self.schedule.alpha_bar[t - 1] if t > 0 else 1.0
        return reverse_step.coefficients(self.schedule.alpha_bar[t], before, self.schedule.beta[t])

    @cached_property
    def shift_table(self) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
        """The shifts of all blocks side by side, (steps, sum of O), on the device, and the columns of each block."""
        ends = list(itertools.accumulate(shift.shape[1] for shift in self.shifts.values()))
        places = dict(zip(self.shifts, itertools.pairwise([0, *ends]), strict=True))
        return torch.cat(list(self.shifts.values()), dim=1).to(self.device), places

    @torch.no_grad()
    def program(self, batch: int, seed: int = 0) -> Program:
        """The program for `batch` images and the noise of `seed`.

        Inputs: `images`, float32 (B, S, S, C) in [0, 1], and `threshold`, float32 (1,). Outputs: `anomaly_map`
        (B, S, S), `reconstruction` (M, B, S, S, C) in [0, 1], `pred_score` (B,) and `pred_label` (B,). D noise draws
        give M = D maps, 2 D in mode "averaged".
        """
        return _Lowered(self, batch).detection(seed)

    @torch.no_grad()
    def reconstruction_program(self, batch: int) -> Program:
        """The program that reconstructs `batch` noised images, of mode "norm-guided" with one evaluation.

        Inputs, in model pixels and the program's dtype: `x_0` (B, S, S, C) and `x_t` (2B, S, S, C), scale s first.
        Outputs: `out`, as x_t, the predicted noise; `pair` (B, S, S, 2C), what the segmentation network reads.
        Raises ValueError for another mode.
        """
        if self.config.mode != "norm-guided":
            raise ValueError(f"mode {self.config.mode!r} has no program of its reconstruction alone")
        return _Lowered(self, batch).noised()


class _Lowered:
    """One program in the making."""

    def __init__(self, lowering: Lowering, batch: int):
        self.of, self.config, self.batch = lowering, lowering.config, batch
        self.emitter = Builder(
            lowering.dtype, lowering.device, lowering.fusion, lowering.constants, lowering.disposable,
            lowering.quantizations,
        )  # fmt: skip
        self.loops: list[Loop] = []
        self.shift_row: Value | None = None  # of the step of a loop

    def made(self) -> Program:
        return Program(self.emitter.ops, self.batch, self.of.dtype, tuple(self.loops))

    def detection(self, seed: int) -> Program:
        """From images to scores."""
        config, b, batch = self.config, self.emitter, self.batch
        size, channels = config.image_size, config.channels
        averaged = config.mode == "averaged"
        maps = config.noise_draws * (2 if averaged else 1)
        images = b.buffer("images", (batch, size, size, channels), torch.float32, "input")
        pair = b.buffer("pair", (maps * batch, size, size, 2 * channels))
        reconstruction = b.buffer("reconstruction", (maps, batch, size, size, channels), b.precise, "output")
        for draw in range(config.noise_draws):
            tag = f"draw{draw}." if config.noise_draws > 1 else ""
            if config.mode == "iterative":
                self.chain(tag, draw, seed, images, pair, reconstruction)
            else:
                self.one_evaluation(tag, draw, seed, images, pair, reconstruction)
        logits = segmentation(b, self.of.model.segmentation, config.seg_activation, Feature(pair)).value
        self.score(logits, maps)
        return self.made()

    def noised(self) -> Program:
        """From noised images to what the segmentation network reads."""
        b, size, channels = self.emitter, self.config.image_size, self.config.channels
        shape = (self.batch, size, size, channels)
        x_0 = b.buffer("x_0", shape, role="input")
        x_t = b.buffer("x_t", (2 * self.batch, *shape[1:]), role="input")
        eps = self.reconstruction("", Feature(x_t), role="output").value
        pair = b.buffer("pair", (*shape[:3], 2 * channels), role="output")
        reconstruction = b.buffer("reconstruction", (1, *shape), b.precise)
        self.one_step("one_step", (0, 2), x_0, x_t, eps, pair, reconstruction)
        return self.made()

    def ingest(
        self, tag: str, draw: int, seed: int, images: Value, steps: tuple[int, int], dtype: torch.dtype | None = None
    ) -> tuple[Value, Value]:
        """x_0 (B, S, S, C) in model pixels, and x_t (2B, S, S, C) with the noise of both scales at their steps t."""
        b, (gain, offset) = self.emitter, GAIN[self.config.pixel_range]
        a, noise_scale, _ = coefficients(self.of.alpha_bar(steps))
        x_0 = b.buffer(f"{tag}x_0", images.shape, dtype)
        x_t = b.buffer(f"{tag}x_t", (2 * self.batch, *images.shape[1:]), dtype)
        b.emit(
            f"{tag}ingest", "ingest", ("x_0", "x_t"),
            images=images, x_0=x_0, x_t=Value(x_t.buffer, view=(2, *images.shape)), gain=gain, offset=offset, a=a,
            b=noise_scale, seed=seed, draw=draw, step=0, noise=self.noise(seed, draw),
        )  # fmt: skip
        return x_0, x_t

    def one_evaluation(
        self, tag: str, draw: int, seed: int, images: Value, pair: Value, reconstruction: Value
    ) -> None:
        """Modes "norm-guided" and "averaged": both scales in one evaluation."""
        averaged = self.config.mode == "averaged"
        x_0, x_t = self.ingest(tag, draw, seed, images, (self.config.t_s, self.config.t_b))
        eps = self.reconstruction(tag, Feature(x_t)).value
        scales = ((0, 1), (1, 2)) if averaged else ((0, 2),)
        for index, of in enumerate(scales, start=draw * len(scales)):
            name = f"{tag}one_step" + (f".{of[0]}" if averaged else "")
            self.one_step(name, of, x_0, x_t, eps, pair, reconstruction, index)

    def one_step(
        self, name: str, of: tuple[int, int], x_0: Value, x_t: Value, eps: Value, pair: Value, out: Value, at: int = 0
    ) -> None:
        """Map `at` of `pair` and of the reconstructions `out`, from the scales [first, last) `of` the evaluation."""
        config, b, batch, (first, last) = self.config, self.emitter, self.batch, of
        gain, offset = GAIN[config.pixel_range]
        a, noise_scale, weight = coefficients(self.of.alpha_bar((config.t_s, config.t_b)), config.guidance)
        part, shape = (first * batch, last * batch), (last - first, *x_0.shape)
        b.emit(
            name, "one_step", ("pair", "reconstruction"),
            x_t=Value(x_t.buffer, part, view=shape), eps=Value(eps.buffer, part, view=shape), x_0=x_0,
            a=a[first:last], b=noise_scale[first:last], weight=weight if last - first == 2 else 0.0,
            gain=gain, offset=offset, pair=Value(pair.buffer, part=(at * batch, (at + 1) * batch)),
            reconstruction=Value(out.buffer, part=(at, at + 1), view=x_0.shape),
        )  # fmt: skip

    def chain(self, tag: str, draw: int, seed: int, images: Value, pair: Value, reconstruction: Value) -> None:
        """Mode "iterative": the reverse chain from t_b to 0, a loop; x_t stays float32, in the half for the big scale.

        At t = 0 the step's coefficients leave clamp(x0_hat) alone, which `one_step` then passes on as it is.
        """
        config, b, batch, steps = self.config, self.emitter, self.batch, self.of.steps
        gain, offset = GAIN[config.pixel_range]
        x_0, noised = self.ingest(tag, draw, seed, images, (config.t_b, config.t_b), b.precise)
        x_t = Value(noised.buffer, part=(batch, 2 * batch))
        first = len(b.ops)
        table, _ = self.of.shift_table
        self.shift_row = b.buffer(f"{tag}shifts", (1, table.shape[1]), b.precise)
        rows = [Constant(f"shifts[{t}]", row[None], row.nbytes) for t, row in zip(steps, table, strict=True)]
        b.emit(f"{tag}shift", "copy", ("y",), x=PerStep(tuple(rows)), y=self.shift_row)
        x = x_t
        if b.dtype != b.precise:
            x = b.buffer(f"{tag}x", images.shape)
            b.emit(f"{tag}round", "copy", ("y",), x=x_t, y=x)
        eps = self.reconstruction(tag, Feature(x)).value
        numbers = [self.of.reverse_coefficients(t) for t in steps]
        names = ("a", "b", "from_x0", "from_xt", "sigma")
        b.emit(
            f"{tag}reverse_step", "reverse_step", ("out",), x_t=x_t, eps=eps,
            **{name: PerStep(tuple(n[i] for n in numbers)) for i, name in enumerate(names)},
            seed=seed, draw=draw, step=PerStep(tuple(steps)), out=x_t,
        )  # fmt: skip
        self.loops.append(Loop(first, len(b.ops), len(steps)))
        one = (1, *images.shape)
        b.emit(
            f"{tag}one_step", "one_step", ("pair", "reconstruction"),
            x_t=Value(noised.buffer, x_t.part, view=one), eps=Value(eps.buffer, view=one), x_0=x_0, a=[1.0], b=[0.0],
            weight=0.0, gain=gain, offset=offset, pair=Value(pair.buffer, part=(draw * batch, (draw + 1) * batch)),
            reconstruction=Value(reconstruction.buffer, part=(draw, draw + 1), view=images.shape),
        )  # fmt: skip

    def noise(self, seed: int, draw: int) -> Constant | None:
        """The noise of both scales where it is drawn once."""
        b, size, name = self.emitter, self.config.image_size, f"noise.{seed}.{draw}"
        if self.of.backend != "cpu":
            return None
        if name not in b.constants:
            b.constant(name, ingest.draw_noise((size, size, self.config.channels), 2, seed, draw), torch.float32)
        return b.constants[name]

    def score(self, logits: Value, maps: int) -> None:
        b, config, batch, size = self.emitter, self.config, self.batch, self.config.image_size
        b.emit(
            "score", "score", ("anomaly_map", "pred_score", "pred_label", "workspace"),
            logits=Value(logits.buffer, view=(maps, batch, size, size)),
            threshold=b.buffer("threshold", (1,), torch.float32, "input"), k=top_k_count(size, size, config.top_k),
            anomaly_map=b.buffer("anomaly_map", (batch, size, size), b.precise, "output"),
            pred_score=b.buffer("pred_score", (batch,), b.precise, "output"),
            pred_label=b.buffer("pred_label", (batch,), torch.bool, "output"),
            workspace=b.buffer("score.workspace", score.workspace_shape(batch, size, size), torch.int32),
        )  # fmt: skip

    def reconstruction(self, tag: str, x: Feature, role: str = "workspace") -> Feature:
        """The predicted noise "out", in a buffer of that role."""
        network, b, act = self.of.model.reconstruction, self.emitter, self.config.activation
        partners: list[Feature] = []
        for index, stage in enumerate(network.down):
            if index == 0:
                (conv,) = stage
                x = b.conv(f"{tag}down.0", *b.conv_constants("down.0", conv), x, moments=True)
            else:
                x = self.stage(f"{tag}down.{index}", f"down.{index}", stage, x)
            partners.append(x)
        x = self.stage(f"{tag}middle", "middle", network.middle, x)
        for index, (stage, joins) in enumerate(zip(network.up, network.joins, strict=True)):
            partner = partners.pop()
            x = self.stage(f"{tag}up.{index}", f"up.{index}", stage, x, partner if joins else None)
        norm = b.norm(f"{tag}out.norm", network.out[0], act, x)
        return b.conv(f"{tag}out", *b.conv_constants("out", network.out[2]), x, norm=norm, role=role)

    def stage(
        self, name: str, weights: str, stage: nn.ModuleList, x: Feature, partner: Feature | None = None
    ) -> Feature:
        for index, module in enumerate(stage):
            own = f"{name}.{index}", f"{weights}.{index}"
            if isinstance(module, ResBlock):
                x, partner = self.block(*own, module, x, partner), None
            elif isinstance(module, AttentionBlock):
                x = self.attention(*own, module, x)
            else:
                raise NotLoweredError(f"{name}.{index}: {type(module).__name__} is not lowered")
        return x

    def block(self, name: str, weights: str, block: ResBlock, x: Feature, partner: Feature | None) -> Feature:
        b, act = self.emitter, self.config.activation
        resample = block.resample or "none"
        norm1, conv1 = block.in_layers[0], block.in_layers[2]
        norm2, conv2 = block.out_layers[0], block.out_layers[3]
        norm = b.norm(f"{name}.norm1", norm1, act, x, partner)
        weight = b.weight(f"{weights}.conv1", conv1.weight, conv1.dilation[0])
        h = b.conv(f"{name}.conv1", weight, None, x, partner, norm=norm, resample=resample, moments=True)
        h.shift = self.shift(weights)
        norm = b.norm(f"{name}.norm2", norm2, act, h)
        residual, residual_resample = x, resample
        if not isinstance(block.skip_connection, nn.Identity):
            skip = b.conv_constants(f"{weights}.skip", block.skip_connection)
            residual, residual_resample = b.conv(f"{name}.skip", *skip, x, partner, resample=resample), "none"
        elif partner is not None:
            raise NotLoweredError(f"{name}: a joining block without a skip convolution")
        second = b.conv_constants(f"{weights}.conv2", conv2)
        if block.channel_attention is None and block.spatial_attention is None:
            return b.conv(
                f"{name}.conv2", *second, h, norm=norm, residual=residual, residual_resample=residual_resample,
                moments=True,
            )  # fmt: skip
        if residual_resample != "none":
            raise NotLoweredError(f"{name}: a gated block that resamples")
        h = b.conv(f"{name}.conv2", *second, h, norm=norm)
        return self.gates(name, weights, block, h, residual)

    def shift(self, weights: str) -> Constant | Value:
        """What conv1 leaves to norm2: its bias and the time bias, (2B, O), scale s first; this program's own. In a loop
        (1, O), that of the step."""
        if self.shift_row is not None:
            return Value(self.shift_row.buffer, channels=self.of.shift_table[1][weights])
        shift = self.of.shifts[weights].repeat_interleave(self.batch, dim=0).to(self.emitter.device)
        return Constant(f"{weights}.shift", shift, shift.nbytes)

    def gates(self, name: str, weights: str, block: ResBlock, h: Feature, residual: Feature) -> Feature:
        """The gates of a DACM block, and the sum with its residual."""
        b, channel, spatial = self.emitter, block.channel_attention, block.spatial_attention
        y = b.buffer(f"{name}.gates", h.shape)
        workspace = b.buffer(f"{name}.gates.workspace", (workspace_size(h.shape),), torch.float32)
        w1, w2 = pack_gate(channel.mlp[0].weight, channel.mlp[2].weight) if channel else (None, None)
        window, bias = pack_spatial(spatial.conv.weight, spatial.conv.bias) if spatial else (None, None)
        b.emit(
            f"{name}.gates", "channel_attention", ("y", "workspace"), x=h.value,
            w1=b.constant(f"{weights}.mlp1", w1), w2=b.constant(f"{weights}.mlp2", w2),
            spatial_weight=b.constant(f"{weights}.spatial", window),
            spatial_bias=b.constant(f"{weights}.spatial.bias", bias), residual=residual.value, y=y, workspace=workspace,
        )  # fmt: skip
        return Feature(y)

    def attention(self, name: str, weights: str, block: AttentionBlock, x: Feature) -> Feature:
        b, (batch, height, width, channels) = self.emitter, x.shape
        norm: Norm = b.norm(f"{name}.norm", block.norm, "none", x)
        qkv = b.conv(f"{name}.qkv", *b.conv_constants(f"{weights}.qkv", block.to_qkv), x, norm=norm)
        y = b.buffer(f"{name}.attend", x.shape)
        pixels = height * width
        b.emit(
            f"{name}.attend", "attention", ("y",), 4 * batch * pixels * pixels * channels,
            qkv=qkv.value, heads=block.heads, y=y,
        )  # fmt: skip
        projection = b.conv_constants(f"{weights}.proj", block.proj_out)
        return b.conv(f"{name}.proj", *projection, Feature(y), residual=x, moments=True)


def _shifts(network: nn.Module, embedding: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and shift (T, O) of every residual block, for the time embedding (T, E) of T steps."""
    stages = {"middle": network.middle}
    for side in ("down", "up"):
        stages |= {f"{side}.{index}": stage for index, stage in enumerate(getattr(network, side))}
    for name, stage in stages.items():
        for index, block in enumerate(stage):
            if isinstance(block, ResBlock):
                layer = block.embed_layers
                time = layer(embedding.to(layer[1].weight)).to("cpu", embedding.dtype)
                yield f"{name}.{index}", time + block.in_layers[2].bias.detach().to("cpu", embedding.dtype)
