"""What the tests of the three stages of GroupNorm share: arguments, and running an implementation on them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.kernels import slices


def random(shape, dtype=torch.float32, mean=-2.3, seed=0, padding=0) -> torch.Tensor:
    """Off-centre values; with padding a channel slice of a wider buffer that holds NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    values = (mean + torch.randn(shape, generator=generator)).to(dtype)
    return slices.widened(values, padding, padding // 2) if padding else values


def poisoned(shape, dtype=torch.float32, padding=0) -> torch.Tensor:
    return slices.poisoned(shape, dtype, extra=padding, before=padding // 2)


def run(launcher, op, *args, outputs=1):
    """The last `outputs` arguments after the run, on the CPU; strides survive the trip to a GPU."""

    def moved(value):
        if not isinstance(value, torch.Tensor) or launcher.device == "cpu":
            return value
        whole = value._base if value._base is not None else value
        return whole.to(launcher.device).as_strided(value.shape, value.stride(), value.storage_offset())

    args = [moved(value) for value in args]
    launcher.run(op, *args)
    return [None if value is None else value.cpu() for value in args[-outputs:]]


def assert_threads_change_nothing(compute: Callable[[int], list[torch.Tensor]]) -> None:
    """compute(count) runs with `count` threads of torch."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3, 64):
            torch.set_num_threads(count)
            results.append(compute(count))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
