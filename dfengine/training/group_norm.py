"""GroupNorm with a fast backward pass on CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfengine.models.blocks import GroupNorm


class FastGroupNorm(GroupNorm):
    """The same function as `GroupNorm`, value for value; only how its CPU gradient is computed differs.

    torch's channels-last backward kernel is not vectorised over few channels and slower still in bfloat16: here it
    takes 1.5 to 2 times as long as the same formula in tensor operations in float32, 3 to 4 times in bfloat16
    (16 to 64 channels, 8 to 64 pixels, torch 2.13).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)


def speed_up(model: nn.Module) -> None:
    """Makes every `GroupNorm` in `model` a `FastGroupNorm`, in place. Names and weights stay."""
    for module in model.modules():
        if type(module) is GroupNorm:
            module.__class__ = FastGroupNorm


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *x.shape[:2], x[0, 0].numel(), groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        b, c, height, width = x.shape
        groups = mean.shape[1]
        size = c // groups  # channels of a group

        def pixels(t: Tensor) -> Tensor:  # (B, H W, C) float32; a view for a channels-last float32 tensor
            return t.permute(0, 2, 3, 1).reshape(b, height * width, c).float()

        def channels(t: Tensor) -> Tensor:  # (B, groups) -> (B, C)
            return t.repeat_interleave(size, dim=1)

        # y = weight centred rstd + bias with centred = x - mean, so dx is linear in dy and centred with one set of
        # coefficients per (b, channel). Sums over x itself would cancel where the mean is large beside the deviation.
        mean, rstd = mean.float(), rstd.float()
        dy_pixels, centred = pixels(dy), pixels(x) - channels(mean)[:, None]
        total, product = dy_pixels.sum(dim=1), (dy_pixels * centred).sum(dim=1)
        group_total = (total * weight).view(b, groups, size).sum(dim=2)
        group_product = (product * weight).view(b, groups, size).sum(dim=2)
        of_centred = -group_product * rstd.pow(3) / (size * height * width)
        constant = -group_total * rstd / (size * height * width)

        dx = torch.addcmul(channels(constant)[:, None], dy_pixels, (channels(rstd) * weight)[:, None])
        dx = dx.addcmul_(centred, channels(of_centred)[:, None]).to(x.dtype)
        dweight = (product * channels(rstd)).sum(dim=0)
        return dx.view(b, height, width, c).permute(0, 3, 1, 2), dweight, total.sum(dim=0), None, None
