"""Training losses (DESIGN section 1 "Training"; DF 4.2 and Eq. 7, DAD 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FOCAL_WEIGHT = 5.0
FOCAL_ALPHA = 0.5
FOCAL_GAMMA = 4.0


def noise_loss(predicted: Tensor, noise: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared error of the predicted noise, over the samples where `counted` (bool (B,)) holds, in float32.

    `predicted`, `noise`: (B, C, H, W). 0 with a zero gradient, not NaN, when no sample counts.
    """
    squared = (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3))
    if counted is None:
        return squared.mean()
    # where, not a product: an overflow in a sample that does not count must not turn into 0 * inf = NaN.
    return torch.where(counted, squared, 0.0).sum() / counted.sum().clamp(min=1)


def focal_loss(logits: Tensor, target: Tensor, alpha: float = FOCAL_ALPHA, gamma: float = FOCAL_GAMMA) -> Tensor:
    """Binary focal loss `alpha (1 - p_t)^gamma * -log p_t`, averaged over all pixels; from logits, in float32."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return (alpha * (1 - torch.exp(-cross_entropy)).pow(gamma) * cross_entropy).mean()


def mask_loss(logits: Tensor, target: Tensor, gamma: float = FOCAL_GAMMA) -> Tensor:
    """SmoothL1 between probabilities and mask, plus 5 times the focal loss. `logits`, `target`: (B, 1, H, W)."""
    logits, target = logits.float(), target.float()
    return F.smooth_l1_loss(torch.sigmoid(logits), target) + FOCAL_WEIGHT * focal_loss(logits, target, gamma=gamma)
