"""Building blocks of the reconstruction U-Net (DF 3.1, 4.4; DAD 4.2). Tensors are (B, C, H, W), channels-last."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU}


def activation(name: str) -> nn.Module:
    """The activation module called `name`: "gelu" (erf form), "silu" or "relu"."""
    return _ACTIVATIONS[name]()


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """GroupNorm with min(32, C / 4) groups that keeps its input's dtype.

    Where that number does not divide C (widths that no preset has), the greatest common divisor is used.
    Statistics are accumulated in float32 by torch for half inputs; CUDA autocast is switched off because its policy
    would make a float32 copy of every activation.
    """

    def __init__(self, channels: int):
        groups = min(32, channels // 4)
        super().__init__(groups if channels % groups == 0 else math.gcd(channels, groups), channels)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if weight.dtype != x.dtype and not (x.device.type == "cpu" and weight.dtype == torch.float32):
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if x.device.type != "cuda":
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the zero-based time step: (B,) int64 -> (B, dim) float32.

    cat(sin, cos) of t exp(-ln(1e4) i / half), i = 0 .. half - 1, half = dim / 2.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(1e4) / half))
        angles = t.to(torch.float32)[:, None] * frequencies[None, :]
        return torch.cat((angles.sin(), angles.cos()), dim=1)


class ChannelAttention(nn.Module):
    """CBAM channel gate: sigmoid(mlp(avgpool x) + mlp(maxpool x)), (B, C, H, W) -> (B, C, 1, 1).

    The shared MLP has no bias, reduces C by `reduction` (at least to one channel) and uses GELU (DF 3.1, DACM).
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.GELU(), nn.Linear(hidden, channels, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        return gate.sigmoid()[:, :, None, None]


class SpatialAttention(nn.Module):
    """CBAM spatial gate: sigmoid(conv7x7(cat(channel mean, channel max))), (B, C, H, W) -> (B, 1, H, W)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)), dim=1)
        return self.conv(pooled).sigmoid()


class ResBlock(nn.Module):
    """Pre-activation residual block with a time bias.

    norm, activation, [resample], conv3x3, + time bias, norm, activation, conv3x3 (starts at zero), [channel gate],
    [spatial gate], + skip (1x1 conv where channels change, resampled likewise).

    `resample`: None, "down" (2x2 average) or "up" (nearest x2), applied after the first norm and activation and on
    the skip. `dilation` holds for both 3x3 convs, with padding = dilation. With the gates and dilation 2 this is the
    DACM block of Diff-Fastener; with neither it is the plain block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        act: str,
        *,
        resample: str | None = None,
        dilation: int = 1,
        channel_attention: bool = False,
        spatial_attention: bool = False,
        reduction: int = 16,
    ):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            GroupNorm(in_channels),
            activation(act),
            nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation),
        )
        self.embed_layers = nn.Sequential(activation(act), nn.Linear(time_channels, out_channels))
        # Index 2 is the public code's dropout: kept as a place holder so that the weights' names map one to one.
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            activation(act),
            nn.Identity(),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=dilation, dilation=dilation)),
        )
        self.channel_attention = ChannelAttention(out_channels, reduction) if channel_attention else None
        self.spatial_attention = SpatialAttention() if spatial_attention else None
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        h = conv(self._resampled(act(norm(x))))
        h = h + self.embed_layers(embedding).to(h.dtype)[:, :, None, None]
        return self._joined(x, self.out_layers(h))

    def _joined(self, x: Tensor, h: Tensor) -> Tensor:
        """The gates on `h`, and the sum with the skip."""
        if self.channel_attention is not None:
            h = h * self.channel_attention(h)
        if self.spatial_attention is not None:
            h = h * self.spatial_attention(h)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(nn.Module):
    """Self-attention over pixels: norm, qkv, `heads` heads, projection (starts at zero), + input.

    The qkv channels hold, per head, q, k and v in turn. Pixels are used as tokens through views of the channels-last
    tensor, so `scaled_dot_product_attention` gets 4-D tensors with a contiguous last dimension, which its fused CPU
    and GPU paths ask for. `to_qkv` and `proj_out` are Conv1d by name and shape only (the public weights' layout).
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.to_qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)
        qkv = F.linear(tokens, self.to_qkv.weight[:, :, 0], self.to_qkv.bias)
        q, k, v = qkv.view(b, height * width, self.heads, 3, c // self.heads).transpose(1, 2).unbind(dim=3)
        attended = self._attend(q, k, v).transpose(1, 2).reshape(b, height * width, c)
        projected = F.linear(attended, self.proj_out.weight[:, :, 0], self.proj_out.bias)
        return x + projected.view(b, height, width, c).permute(0, 3, 1, 2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, pixels, channels of a head), of each and of the result."""
        return F.scaled_dot_product_attention(q, k, v)
