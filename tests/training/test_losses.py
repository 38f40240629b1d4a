from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine.training.losses import focal_loss, mask_loss, noise_loss


def test_noise_loss_is_the_mean_over_the_samples_that_count():
    predicted = torch.stack([torch.full((3, 4, 4), value) for value in (1.0, 2.0, 5.0)])
    counted = torch.tensor([True, True, False])
    assert noise_loss(predicted, torch.zeros_like(predicted), counted).item() == pytest.approx((1 + 4) / 2)
    assert noise_loss(predicted, torch.zeros_like(predicted)).item() == pytest.approx((1 + 4 + 25) / 3)


def test_noise_loss_of_no_normal_sample_is_zero_with_zero_gradient():
    predicted = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = noise_loss(predicted, torch.randn(2, 3, 4, 4), torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_an_overflow_in_an_anomalous_sample_stays_out():
    predicted = torch.ones(2, 3, 4, 4)
    predicted[1] = float("inf")
    loss = noise_loss(predicted, torch.zeros_like(predicted), torch.tensor([True, False]))
    assert loss.item() == 1


def test_mask_losses_match_their_definition_in_float64():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(0, 3, (2, 1, 8, 8)), rng.random((2, 1, 8, 8)) < 0.3
    probability = 1 / (1 + np.exp(-logits))
    p_t = np.where(target, probability, 1 - probability)
    focal = np.mean(0.5 * (1 - p_t) ** 4 * -np.log(p_t))
    smooth = np.mean(0.5 * (probability - target) ** 2)  # differences below 1 are in the quadratic part
    tensors = torch.from_numpy(logits).float(), torch.from_numpy(target)
    assert focal_loss(*tensors).item() == pytest.approx(focal, rel=1e-5)
    assert mask_loss(*tensors).item() == pytest.approx(smooth + 5 * focal, rel=1e-5)


def test_mask_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([[[[-200.0, 200.0]]]], requires_grad=True)
    loss = mask_loss(logits, torch.tensor([[[[1, 0]]]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
