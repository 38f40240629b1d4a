from __future__ import annotations

import itertools

import pytest

from dfengine.data.streams import Stream, seed_sequence, stream


def test_streams_are_pairwise_different():
    numbers = (0, 1, 2, 3, 7, 8, 2**32 - 1, 2**32, 2**32 + 1)
    keys = list(itertools.product(numbers, Stream, numbers))
    words = {tuple(seed_sequence(*key).generate_state(4)) for key in keys}
    assert len(words) == len(keys) == 9 * 8 * 9
    assert len({stream(*key).random() for key in keys}) == len(keys)


def test_a_stream_is_the_same_each_time():
    assert stream(3, Stream.SAMPLE, 5).random() == stream(3, Stream.SAMPLE, 5).random()
    assert stream(3, Stream.HOLDOUT).random() == stream(3, Stream.HOLDOUT, 0).random()


@pytest.mark.parametrize("seed, index", [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_numbers_outside_64_bits_are_refused(seed, index):
    with pytest.raises(ValueError, match="below 2\\^64"):
        seed_sequence(seed, Stream.SAMPLE, index)
