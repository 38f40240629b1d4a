"""Lowers a model to a program: walks its modules, without tracing, and does the algebra once (DESIGN section 2).

BatchNorm is folded into its convolution; the time embedding of a fixed t becomes, with the convolution's bias, a shift
that the following GroupNorm takes in; skip concatenations are two-source reads; resampling is index arithmetic of the
reading convolution; both noise scales are one batch of 2B, scale s first. This file alone knows models and kernels.
"""

from __future__ import annotations

import torch
from torch import nn

from dfengine.diffusion import Schedule
from dfengine.engine.builder import Builder, Feature, Fusion, Norm
from dfengine.engine.modules import top_k_count
from dfengine.engine.program import Constant, Program, Value
from dfengine.errors import DfengineError
from dfengine.kernels import ingest, score
from dfengine.kernels.channel_attention import pack_gate, pack_spatial, workspace_size
from dfengine.kernels.one_step import coefficients
from dfengine.models import Model
from dfengine.models.blocks import AttentionBlock, ResBlock
from dfengine.models.segmentation import SegmentationUNet

GAIN = {"unit": (1.0, 0.0), "signed": (2.0, -1.0)}
"""(gain, offset) from [0, 1] to model pixels."""


class NotLoweredError(DfengineError):
    """The engine has no program for this configuration; the message says why."""


class Lowering:
    """The programs of one model: `program(batch)`; their constants are shared.

    dtype: of activations and weights: float32, float16, bfloat16 (and float64 through the reference kernels).
    backend: the kernels that will run: "cpu", which read noise that is drawn once, or those of a GPU, which draw it.
    fusion: what a convolution does itself; by the backend where it is None.
    The model must not change afterwards; after `release` its weights are gone.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        backend: str = "cpu",
        fusion: Fusion | None = None,
    ):
        if model.config.mode == "iterative":
            raise NotLoweredError("mode iterative is not lowered: its reverse chain runs as modules")
        self.model = model
        self.config = model.config
        self.dtype = dtype
        self.device = torch.device(device)
        self.backend = backend
        self.fusion = fusion or Fusion.of(backend)
        self.constants: dict[str, Constant] = {}
        schedule = Schedule.of(model.config)
        self.alpha_bar = [float(schedule.alpha_bar[t]) for t in (model.config.t_s, model.config.t_b)]
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.tensor([model.config.t_s, model.config.t_b])
        with torch.no_grad():
            network = model.reconstruction
            embedding = network.time_embedding[0](steps).to(network.time_embedding[1].weight)
            self.embedding = network.time_embedding[1:](embedding).to("cpu", precise)  # (2, time channels)
        self.shifts: dict[str, torch.Tensor] = {}

    def release(self) -> None:
        """Free the model's weights, which no later program needs: the constants of the first one hold them."""
        if not self.shifts:
            raise ValueError("no program was lowered yet")
        self.model.to("meta")

    @torch.no_grad()
    def program(self, batch: int, seed: int = 0) -> Program:
        """The program for `batch` images and the noise of `seed`.

        Inputs: `images`, float32 (B, S, S, C) in [0, 1], and `threshold`, float32 (1,). Outputs: `anomaly_map`
        (B, S, S), `reconstruction` (M, B, S, S, C) in [0, 1], `pred_score` (B,) and `pred_label` (B,). D noise draws
        give M = D maps, 2 D in mode "averaged".
        """
        return _Lowered(self, batch, seed).program


class _Lowered:
    """One program in the making."""

    def __init__(self, lowering: Lowering, batch: int, seed: int):
        self.of, self.config, self.batch = lowering, lowering.config, batch
        self.emitter = Builder(lowering.dtype, lowering.device, lowering.fusion, lowering.constants)
        config, b = self.config, self.emitter
        size, channels = config.image_size, config.channels
        averaged = config.mode == "averaged"
        maps = config.noise_draws * (2 if averaged else 1)
        images = b.buffer("images", (batch, size, size, channels), torch.float32, "input")
        pair = b.buffer("pair", (maps * batch, size, size, 2 * channels))
        reconstruction = b.buffer("reconstruction", (maps, batch, size, size, channels), b.precise, "output")
        gain, offset = GAIN[config.pixel_range]
        a, noise_scale, weight = coefficients(self.of.alpha_bar, config.guidance)
        for draw in range(config.noise_draws):
            tag = f"draw{draw}." if config.noise_draws > 1 else ""
            x_0 = b.buffer(f"{tag}x_0", images.shape)
            x_t = b.buffer(f"{tag}x_t", (2 * batch, size, size, channels))
            both = (2, batch, size, size, channels)
            b.emit(
                f"{tag}ingest", "ingest", ("x_0", "x_t"),
                images=images, x_0=x_0, x_t=Value(x_t.buffer, view=both), gain=gain, offset=offset, a=a,
                b=noise_scale, seed=seed, draw=draw, step=0, noise=self.noise(seed, draw),
            )  # fmt: skip
            eps = self.reconstruction(tag, Feature(x_t)).value
            scales = ((0, 1), (1, 2)) if averaged else ((0, 2),)
            for index, (first, last) in enumerate(scales, start=draw * len(scales)):
                part, shape = (first * batch, last * batch), (last - first, *images.shape)
                b.emit(
                    f"{tag}one_step" + (f".{first}" if averaged else ""), "one_step", ("pair", "reconstruction"),
                    x_t=Value(x_t.buffer, part, view=shape), eps=Value(eps.buffer, part, view=shape), x_0=x_0,
                    a=a[first:last], b=noise_scale[first:last], weight=0.0 if averaged else weight,
                    gain=gain, offset=offset, pair=Value(pair.buffer, part=(index * batch, (index + 1) * batch)),
                    reconstruction=Value(reconstruction.buffer, part=(index, index + 1), view=images.shape),
                )  # fmt: skip
        logits = self.segmentation(self.of.model.segmentation, Feature(pair)).value
        self.score(logits, maps)
        self.program = Program(b.ops, batch, self.of.dtype)

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

    # ---- the reconstruction network ----------------------------------------------------------------------------------

    def reconstruction(self, tag: str, x: Feature) -> Feature:
        network, b, act = self.of.model.reconstruction, self.emitter, self.config.activation
        partners: list[Feature] = []
        for index, stage in enumerate(network.down):
            if index == 0:
                (conv,) = stage
                x = b.conv(f"{tag}down.0", *self.conv_constants("down.0", conv), x, moments=True)
            else:
                x = self.stage(f"{tag}down.{index}", f"down.{index}", stage, x)
            partners.append(x)
        x = self.stage(f"{tag}middle", "middle", network.middle, x)
        for index, (stage, joins) in enumerate(zip(network.up, network.joins, strict=True)):
            partner = partners.pop()
            x = self.stage(f"{tag}up.{index}", f"up.{index}", stage, x, partner if joins else None)
        norm = b.norm(f"{tag}out.norm", network.out[0], act, x)
        return b.conv(f"{tag}out", *self.conv_constants("out", network.out[2]), x, norm=norm)

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
        h.shift = self.shift(weights, block)
        norm = b.norm(f"{name}.norm2", norm2, act, h)
        residual, residual_resample = x, resample
        if not isinstance(block.skip_connection, nn.Identity):
            skip = self.conv_constants(f"{weights}.skip", block.skip_connection)
            residual, residual_resample = b.conv(f"{name}.skip", *skip, x, partner, resample=resample), "none"
        elif partner is not None:
            raise NotLoweredError(f"{name}: a joining block without a skip convolution")
        second = self.conv_constants(f"{weights}.conv2", conv2)
        if block.channel_attention is None and block.spatial_attention is None:
            return b.conv(
                f"{name}.conv2", *second, h, norm=norm, residual=residual, residual_resample=residual_resample,
                moments=True,
            )  # fmt: skip
        if residual_resample != "none":
            raise NotLoweredError(f"{name}: a gated block that resamples")
        h = b.conv(f"{name}.conv2", *second, h, norm=norm)
        return self.gates(name, weights, block, h, residual)

    def shift(self, weights: str, block: ResBlock) -> Constant:
        """What conv1 leaves to norm2: its bias and the time bias, (2B, O), scale s first; this program's own."""
        b, shifts = self.emitter, self.of.shifts
        if weights not in shifts:
            layer = block.embed_layers
            embedding = layer(self.of.embedding.to(layer[1].weight)).to("cpu", b.precise)
            shifts[weights] = embedding + block.in_layers[2].bias.detach().to("cpu", b.precise)
        shift = shifts[weights].repeat_interleave(self.batch, dim=0).to(b.device)
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
        qkv = b.conv(f"{name}.qkv", *self.conv_constants(f"{weights}.qkv", block.to_qkv), x, norm=norm)
        y = b.buffer(f"{name}.attend", x.shape)
        pixels = height * width
        b.emit(
            f"{name}.attend", "attention", ("y",), 4 * batch * pixels * pixels * channels,
            qkv=qkv.value, heads=block.heads, y=y,
        )  # fmt: skip
        projection = self.conv_constants(f"{weights}.proj", block.proj_out)
        return b.conv(f"{name}.proj", *projection, Feature(y), residual=x, moments=True)

    def conv_constants(self, weights: str, conv: nn.Conv2d | nn.Conv1d) -> tuple[Constant, Constant]:
        b, weight = self.emitter, conv.weight
        weight = weight if weight.ndim == 4 else weight[..., None]
        return b.weight(weights, weight, conv.dilation[0]), b.constant(f"{weights}.bias", conv.bias)

    # ---- the segmentation network ------------------------------------------------------------------------------------

    def segmentation(self, network: SegmentationUNet, x: Feature) -> Feature:
        b, encoder, decoder = self.emitter, network.encoder_segment, network.decoder_segment
        features = []
        for level in range(1, encoder.levels + 1):
            if level > 1:
                batch, height, width, channels = x.shape
                y = b.buffer(f"segment.pool{level}", (batch, height // 2, width // 2, channels))
                b.emit(f"segment.pool{level}", "max_pool", ("y",), x=x.value, y=y)
                x = Feature(y)
            x = self.conv_norm_acts(f"segment.block{level}", getattr(encoder, f"block{level}"), x)
            features.append(x)
        x = features.pop()
        for up, join in decoder.levels:
            batch, height, width, channels = x.shape
            y = b.buffer(f"segment.{up}.upsample", (batch, 2 * height, 2 * width, channels))
            b.emit(f"segment.{up}.upsample", "upsample_bilinear", ("y",), x=x.value, y=y)
            x = self.conv_norm_acts(f"segment.{up}", getattr(decoder, up)[1:], Feature(y))
            x = self.conv_norm_acts(f"segment.{join}", getattr(decoder, join), x, features.pop())
        return b.conv("segment.out", *self.conv_constants("segment.out", decoder.fin_out[0]), x)

    def conv_norm_acts(self, name: str, layers: nn.Sequential, x: Feature, partner: Feature | None = None) -> Feature:
        """(conv, BatchNorm, activation) groups, each one op; `partner` is read beside x by the first."""
        b, act = self.emitter, self.config.seg_activation
        for index, (conv, norm) in enumerate(zip(layers[::3], layers[1::3], strict=True)):
            own = f"{name}.{index}"
            weight, bias = folded(conv, norm) if own not in b.constants else (None, None)
            constants = b.weight(own, weight), b.constants.get(f"{own}.bias") or b.constant(f"{own}.bias", bias)
            x, partner = b.conv(own, *constants, x, partner, act=act), None
        return x


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, in float64, of the one convolution that equals `conv` followed by `norm` in evaluation mode."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    return conv.weight.double() * scale[:, None, None, None], bias
