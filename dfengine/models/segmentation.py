"""The segmentation U-Net: what differs between an image and its reconstruction (DAD 3.2). Names are the public ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfengine.models.blocks import activation
from dfengine.models.config import ModelConfig

# Decoder levels from the deepest outwards: the public names of their up-convolution and their join.
_LEVEL_NAMES = (("up_b", "db_b"), ("up1", "db1"), ("up2", "db2"), ("up3", "db3"), ("up4", "db4"))
_WIDTHS = (1, 2, 4, 8, 8, 8)


def _conv_norm_act(in_channels: int, out_channels: int, act: str) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.BatchNorm2d(out_channels), activation(act)]


def _double(in_channels: int, out_channels: int, act: str) -> nn.Sequential:
    return nn.Sequential(
        *_conv_norm_act(in_channels, out_channels, act), *_conv_norm_act(out_channels, out_channels, act)
    )


class _Encoder(nn.Module):
    def __init__(self, in_channels: int, widths: list[int], act: str):
        super().__init__()
        for level, width in enumerate(widths, start=1):
            self.add_module(f"block{level}", _double(in_channels, width, act))
            in_channels = width
        self.levels = len(widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for level in range(1, self.levels + 1):
            x = getattr(self, f"block{level}")(x if level == 1 else F.max_pool2d(x, 2))
            features.append(x)
        return features


class _Decoder(nn.Module):
    def __init__(self, widths: list[int], act: str):
        super().__init__()
        self.levels = _LEVEL_NAMES
        width = widths[-1]
        # Each level's up-convolution narrows to the next partner's width; its join reads the partner beside that.
        narrowed = [*reversed(widths[:-2]), widths[0]]
        for (up, join), partner, out in zip(_LEVEL_NAMES, reversed(widths[:-1]), narrowed, strict=True):
            upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.add_module(up, nn.Sequential(upsample, *_conv_norm_act(width, out, act)))
            self.add_module(join, _double(out + partner, out, act))
            width = out
        self.fin_out = nn.Sequential(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for (up, join), partner in zip(self.levels, reversed(features[:-1]), strict=True):
            x = getattr(self, join)(torch.cat((getattr(self, up)(x), partner), dim=1))
        return self.fin_out(x)


class SegmentationUNet(nn.Module):
    """forward(cat(x_0, x0_hat): float (B, 2 channels, S, S) in model pixels) -> logits (B, 1, S, S).

    The anomaly map is sigmoid(logits); S must be a multiple of 32.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        widths = [w * config.seg_base for w in _WIDTHS]
        self.encoder_segment = _Encoder(2 * config.channels, widths, config.seg_activation)
        self.decoder_segment = _Decoder(widths, config.seg_activation)

    def forward(self, pair: Tensor) -> Tensor:
        return self.decoder_segment(self.encoder_segment(pair))
