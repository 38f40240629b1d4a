"""Emits the ops of a program: convolutions and norms with what can be fused into them, on buffers that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dfengine.engine.program import Buffer, Constant, Op, Value
from dfengine.kernels.conv_weight import ConvWeight
from dfengine.kernels.group_norm_moments import tile_counts
from dfengine.kernels.quantization import Quantization
from dfengine.kernels.slices import resampled


@dataclass(frozen=True)
class Fusion:
    """What a convolution does itself; what it does not is an op of its own before or after it.

    prologue: applies a GroupNorm with its activation, and resampling, to what it reads. two_sources: reads a channel
    concatenation from two tensors. residual_resample: pools or repeats the residual while it adds it. moments: leaves
    the moments of its output for the next GroupNorm. tile_pixels: pixels in a tile of moments.
    """

    prologue: bool = True
    two_sources: bool = True
    residual_resample: bool = True
    moments: bool = True
    tile_pixels: int = 256

    @classmethod
    def of(cls, backend: str) -> Fusion:
        """What the convolutions of a backend fuse by default. That of Triton only makes programs run: each of its
        configurations can leave tiles of 64 pixels, but which tile and which prologues are quick is not measured."""
        return cls() if backend == "cpu" else cls(tile_pixels=64)


@dataclass
class Feature:
    """An activation (N, H, W, C), and its moments once there are some.

    shift: (1, C) or (N, C), what a convolution left for the next GroupNorm to add, or None.
    """

    value: Value
    moments: Value | None = None
    shift: Constant | Value | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@dataclass(frozen=True)
class Norm:
    """A GroupNorm folded to scale and offset (N, C), and the activation after it."""

    scale: Value
    offset: Value
    act: str


@dataclass
class Builder:
    """The ops so far. dtype: of activations. precise: of statistics and parameters. constants: by name, shared by the
    programs of one model. disposable: whether a backend may keep a packed weight in its own form alone. quantizations:
    of the convolutions that multiply in eight bits, by the names of their weights."""

    dtype: torch.dtype
    device: torch.device
    fusion: Fusion
    constants: dict[str, Constant]
    disposable: bool = True
    quantizations: Mapping[str, Quantization] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    @property
    def precise(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def buffer(
        self, name: str, shape: Iterable[int], dtype: torch.dtype | None = None, role: str = "workspace"
    ) -> Value:
        return Value(Buffer(name, tuple(shape), dtype or self.dtype, role))

    def emit(self, name: str, kernel: str, writes: tuple[str, ...], flops: int = 0, **arguments: Any) -> None:
        self.ops.append(Op(name, kernel, arguments, writes, flops))

    def constant(self, name: str, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> Constant | None:
        """The tensor on the device in `dtype` (by default that of parameters), under its name."""
        if tensor is None:
            return None
        if name not in self.constants:
            content = tensor.detach().to(self.device, dtype or self.precise).contiguous()
            self.constants[name] = Constant(name, content, content.nbytes)
        return self.constants[name]

    def weight(self, name: str, weight: torch.Tensor, dilation: int = 1) -> Constant:
        """A convolution's weight (O, C, KH, KW), packed; it is the programs' own."""
        if name not in self.constants:
            quantization = self.quantizations.get(name)
            packed = ConvWeight.pack(weight.to(self.device), dilation, self.dtype, self.disposable, quantization)
            self.constants[name] = Constant(name, packed, packed.packed.nbytes)
        return self.constants[name]

    def conv_constants(self, name: str, conv: torch.nn.Conv2d | torch.nn.Conv1d) -> tuple[Constant, Constant]:
        """Its packed weight and its bias."""
        weight = conv.weight if conv.weight.ndim == 4 else conv.weight[..., None]
        return self.weight(name, weight, conv.dilation[0]), self.constant(f"{name}.bias", conv.bias)

    def moments(self, feature: Feature) -> Value:
        """The moments of a feature, by an op of its own where what wrote it left none."""
        if feature.moments is None:
            name = feature.value.buffer.name
            feature.moments = self._moments_buffer(name, feature.shape)
            self.emit(
                f"{name}.moments", "group_norm_moments", ("moments",),
                x=feature.value, tile_pixels=self.fusion.tile_pixels, moments=feature.moments,
            )  # fmt: skip
        return feature.moments

    def _moments_buffer(self, name: str, shape: tuple[int, ...]) -> Value:
        batch, height, width, channels = shape
        tiles = -(-height * width // self.fusion.tile_pixels)
        return self.buffer(f"{name}.moments", (batch, tiles, 2, channels), self.precise)

    def _counts(self, feature: Feature) -> Constant:
        pixels, tile = feature.shape[1] * feature.shape[2], self.fusion.tile_pixels
        return self.constant(f"counts.{pixels}.{tile}", tile_counts(pixels, tile), torch.int32)

    def norm(self, name: str, module: torch.nn.GroupNorm, act: str, x: Feature, x2: Feature | None = None) -> Norm:
        """The GroupNorm of one feature, or of the concatenation of two."""
        batch, channels = x.shape[0], module.num_channels
        scale, offset = (self.buffer(f"{name}.{part}", (batch, channels), self.precise) for part in ("scale", "offset"))
        self.emit(
            name, "group_norm_merge", ("scale", "offset"),
            moments=self.moments(x), counts=self._counts(x),
            moments2=self.moments(x2) if x2 else None, counts2=self._counts(x2) if x2 else None,
            weight=self.constant(f"{name}.weight", module.weight), bias=self.constant(f"{name}.bias", module.bias),
            shift=x.shift, groups=module.num_groups, eps=module.eps, scale=scale, offset=offset,
        )  # fmt: skip
        return Norm(scale, offset, act)

    def apply(
        self, name: str, x: Feature, x2: Feature | None = None, norm: Norm | None = None, resample: str = "none"
    ) -> Feature:
        """resample(act(norm(cat(x, x2)))) as an op of its own."""
        batch, height, width, channels = x.shape
        height, width = resampled((height, width), resample)
        y = self.buffer(name, (batch, height, width, channels + (x2.shape[3] if x2 else 0)))
        self.emit(
            name, "group_norm_apply", ("y",),
            x=x.value, x2=x2.value if x2 else None, scale=norm.scale if norm else None,
            offset=norm.offset if norm else None, act=norm.act if norm else "none", resample=resample, y=y,
        )  # fmt: skip
        return Feature(y)

    def conv(
        self,
        name: str,
        weight: Constant,
        bias: Constant | None,
        x: Feature,
        x2: Feature | None = None,
        *,
        norm: Norm | None = None,
        resample: str = "none",
        residual: Feature | None = None,
        residual_resample: str = "none",
        act: str = "none",
        moments: bool = False,
        role: str = "workspace",
    ) -> Feature:
        """act(conv(resample(norm(cat(x, x2)))) + bias) + resampled residual, in a buffer of that role; `moments`: a
        GroupNorm will read it."""
        fusion = self.fusion
        prologue = norm is not None or resample != "none"
        if (prologue and not fusion.prologue) or (x2 is not None and not fusion.two_sources):
            x, x2, norm, resample = self.apply(f"{name}.input", x, x2, norm, resample), None, None, "none"
        if residual is not None and residual_resample != "none" and not fusion.residual_resample:
            residual, residual_resample = self.apply(f"{name}.residual", residual, resample=residual_resample), "none"
        batch, (height, width) = x.shape[0], resampled(x.shape[1:3], resample)
        packed: ConvWeight = weight.content
        y = self.buffer(name, (batch, height, width, packed.outputs), role=role)
        result = Feature(y, self._moments_buffer(name, y.shape) if moments and fusion.moments else None)
        taps = packed.kernel[0] * packed.kernel[1]
        self.emit(
            name, "conv2d", ("y", "moments"), 2 * batch * height * width * taps * packed.inputs * packed.outputs,
            x=x.value, x2=x2.value if x2 else None, weight=weight, bias=bias, scale=norm.scale if norm else None,
            offset=norm.offset if norm else None, prologue_act=norm.act if norm else "none", resample=resample,
            residual=residual.value if residual else None, residual_resample=residual_resample, act=act, y=y,
            moments=result.moments, tile_pixels=fusion.tile_pixels if result.moments else 0,
        )  # fmt: skip
        return result
