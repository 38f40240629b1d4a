"""The reconstruction U-Net: predicts the noise in a noised image (DF 3.1; DAD 4.2). Names are the public ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfengine.models.blocks import AttentionBlock, GroupNorm, ResBlock, TimeEmbedding, activation, zeroed
from dfengine.models.config import ModelConfig


class Stage(nn.ModuleList):
    """Modules run in turn; residual blocks also get the time embedding. Children are named 0, 1, ..."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for module in self:
            x = module(x, embedding) if isinstance(module, ResBlock) else module(x)
        return x


class ReconstructionUNet(nn.Module):
    """eps_theta(x_t, t).

    forward(x_t: float (B, channels, S, S) in model pixels, t: int64 (B,) zero-based) -> predicted noise, same shape.

    `joins[i]` tells whether `up[i]` reads its encoder partner beside the running activation (Sparse-Skip: decoder
    block j of a level joins when j % skip_every == 0).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        act, time_channels = config.activation, 4 * config.base
        widths = [int(m * config.base) for m in config.multipliers]

        def block(in_channels: int, out_channels: int, **options) -> ResBlock:
            return ResBlock(in_channels, out_channels, time_channels, act, **options)

        def attention(channels: int, factor: int) -> list[nn.Module]:
            return [AttentionBlock(channels, config.heads)] if factor in config.attention_factors else []

        self.time_embedding = nn.Sequential(
            TimeEmbedding(config.base),
            nn.Linear(config.base, time_channels),
            activation(act),
            nn.Linear(time_channels, time_channels),
        )

        width, factor = widths[0], 1
        self.down = nn.ModuleList([Stage([nn.Conv2d(config.channels, width, 3, padding=1)])])
        partners = [width]
        for level, out in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage([block(width, out), *attention(out, factor)]))
                width = out
                partners.append(width)
            if level < len(widths) - 1:
                self.down.append(Stage([block(width, width, resample="down")]))
                factor *= 2
                partners.append(width)

        middle = dict(
            dilation=config.dilation,
            channel_attention=config.channel_attention,
            spatial_attention=config.spatial_attention,
            reduction=config.reduction,
        )
        self.middle = Stage(
            [block(width, width, **middle), AttentionBlock(width, config.heads), block(width, width, **middle)]
        )

        self.up = nn.ModuleList()
        self.joins: list[bool] = []
        for level, out in reversed(list(enumerate(widths))):
            for j in range(config.blocks + 1):
                partner = partners.pop()
                self.joins.append(j % config.skip_every == 0)
                stage = [block(width + partner if self.joins[-1] else width, out), *attention(out, factor)]
                width = out
                if level > 0 and j == config.blocks:
                    stage.append(block(width, width, resample="up"))
                    factor //= 2
                self.up.append(Stage(stage))

        self.out = nn.Sequential(
            GroupNorm(width), activation(act), zeroed(nn.Conv2d(width, config.channels, 3, padding=1))
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        embedding = self.time_embedding(t)
        x = x_t
        partners = []
        for stage in self.down:
            x = stage(x, embedding)
            partners.append(x)
        x = self.middle(x, embedding)
        for stage, joins in zip(self.up, self.joins, strict=True):
            partner = partners.pop()
            x = stage(torch.cat((x, partner), dim=1) if joins else x, embedding)
        return self.out(x)
