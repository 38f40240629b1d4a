"""Lowers the segmentation network: its BatchNorm is folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import nn

from dfengine.engine.builder import Builder, Feature
from dfengine.models.segmentation import SegmentationUNet


def segmentation(b: Builder, network: SegmentationUNet, act: str, x: Feature) -> Feature:
    """The logits (N, H, W, 1) of the network, whose activations are `act`, for x (N, H, W, 2C)."""
    encoder, decoder = network.encoder_segment, network.decoder_segment
    features = []
    for level in range(1, encoder.levels + 1):
        if level > 1:
            batch, height, width, channels = x.shape
            y = b.buffer(f"segment.pool{level}", (batch, height // 2, width // 2, channels))
            b.emit(f"segment.pool{level}", "max_pool", ("y",), x=x.value, y=y)
            x = Feature(y)
        x = _conv_norm_acts(b, f"segment.block{level}", getattr(encoder, f"block{level}"), act, x)
        features.append(x)
    x = features.pop()
    for up, join in decoder.levels:
        batch, height, width, channels = x.shape
        y = b.buffer(f"segment.{up}.upsample", (batch, 2 * height, 2 * width, channels))
        b.emit(f"segment.{up}.upsample", "upsample_bilinear", ("y",), x=x.value, y=y)
        x = _conv_norm_acts(b, f"segment.{up}", getattr(decoder, up)[1:], act, Feature(y))
        x = _conv_norm_acts(b, f"segment.{join}", getattr(decoder, join), act, x, features.pop())
    return b.conv("segment.out", *b.conv_constants("segment.out", decoder.fin_out[0]), x)


def _conv_norm_acts(
    b: Builder, name: str, layers: nn.Sequential, act: str, x: Feature, partner: Feature | None = None
) -> Feature:
    """(conv, BatchNorm, activation) groups, each one op; `partner` is read beside x by the first."""
    for index, (conv, norm) in enumerate(zip(layers[::3], layers[1::3], strict=True)):
        own = f"{name}.{index}"
        weight, bias = _folded(conv, norm) if own not in b.constants else (None, None)
        constants = b.weight(own, weight), b.constants.get(f"{own}.bias") or b.constant(f"{own}.bias", bias)
        x, partner = b.conv(own, *constants, x, partner, act=act), None
    return x


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias, in float64, of the one convolution that equals `conv` followed by `norm` in evaluation mode."""
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    bias = (conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()
    return conv.weight.double() * scale[:, None, None, None], bias
