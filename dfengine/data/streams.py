"""The random streams of a training run: one seed, and for every purpose and index a generator of its own."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_WORD = 2**32
_WORDS = 2**64


class Stream(IntEnum):
    """What a stream is drawn for, and what its index counts."""

    HOLDOUT = 1  # which images are held out
    EPOCH = 2  # the order of the images; epochs
    BATCH = 3  # the places of the anomalies; batches
    SAMPLE = 4  # augmentation and synthesis; samples of the endless stream, over all processes
    TIMES = 5  # time steps of a sample; the same samples
    NOISE = 6  # diffusion noise of a sample; the same samples
    VALIDATION = 7  # synthetic anomalies of the validation set; anomalies
    VALIDATION_NOISE = 8  # noise of the validation's noise loss; images


def seed_sequence(seed: int, tag: Stream, index: int = 0) -> np.random.SeedSequence:
    """The key of a stream. `seed` and `index` are in [0, 2^64); raises `ValueError` outside.

    Always five 32-bit words: SeedSequence pads short keys with zeros, so that [0, 1] and [0, 1, 0] would be one stream.
    """
    if not (0 <= seed < _WORDS and 0 <= index < _WORDS):
        raise ValueError(f"seed and index must be at least 0 and below 2^64, not {seed} and {index}")
    return np.random.SeedSequence([seed % _WORD, seed // _WORD, int(tag), index % _WORD, index // _WORD])


def stream(seed: int, tag: Stream, index: int = 0) -> np.random.Generator:
    """The generator of `seed_sequence(seed, tag, index)`, at its start."""
    return np.random.default_rng(seed_sequence(seed, tag, index))
