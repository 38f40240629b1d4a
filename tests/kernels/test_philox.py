"""Philox4x32-10 and its normals in torch; those of the kernels are held to these in test_ingest.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dfengine.kernels import philox


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, words):
    """The known-answer vectors of Random123 for philox4x32-10."""
    assert tuple(int(word) for word in philox.philox(counter, key)) == words


def test_normals_follow_the_formula_of_the_counter():
    """One normal of each lane, computed from scalar words with the math of the docstring."""
    seed, draw, step, scale = 2**40 + 12345, 11, 4, 1
    noise = philox.philox_normal(seed, draw, step, scale, (5, 7, 6), torch.float64)
    for y, x, channel in ((0, 0, 0), (3, 2, 1), (4, 6, 2), (1, 5, 3), (2, 2, 4), (4, 0, 5)):
        words = philox.philox((y * 7 + x, channel // 4, 2 * step + scale, draw), (seed % 2**32, seed // 2**32))
        u = [((int(word) >> 9) + 0.5) / 2**23 for word in words]
        pair = channel % 4 // 2 * 2
        turn = np.cos if channel % 2 == 0 else np.sin
        expected = np.sqrt(-2 * np.log(u[pair])) * turn(2 * np.pi * u[pair + 1])
        assert noise[y, x, channel].item() == pytest.approx(expected, abs=1e-12)


def test_noise_is_standard_normal_and_independent():
    noise = philox.philox_normal(1, 0, 0, 0, (256, 256, 4), torch.float64).numpy()
    flat = noise.ravel()
    n = flat.size
    assert abs(flat.mean()) < 4 / np.sqrt(n)
    assert abs(flat.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(stats.skew(flat)) < 4 * np.sqrt(6 / n)
    assert abs(stats.kurtosis(flat)) < 4 * np.sqrt(24 / n)
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    others = [
        philox.philox_normal(*key, (256, 256, 4), torch.float64).numpy().ravel()
        for key in ((2, 0, 0, 0), (1 + 2**32, 0, 0, 0), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1))
    ]
    shifted = [np.roll(noise, 1, axis).ravel() for axis in (0, 1, 2)]
    for other in others + shifted:
        assert abs(np.corrcoef(flat, other)[0, 1]) < 5 / np.sqrt(n)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**31 - 1),
    scale=st.integers(0, 1),
)
def test_float32_noise_is_float64_noise_rounded(seed, draw, step, scale):
    single = philox.philox_normal(seed, draw, step, scale, (3, 5, 3))
    double = philox.philox_normal(seed, draw, step, scale, (3, 5, 3), torch.float64)
    assert (single - double).abs().max() < 5e-6
