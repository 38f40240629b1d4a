"""Timing of functions, and what a device reaches at best: the rate of a matrix product and of a copy.

The benchmarks and the looks inside a program measure in this one way. On a GPU a function is captured in a CUDA graph,
whose replays are timed by events.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from dfengine.kernels import OPS
from dfengine.kernels.conv_weight import ConvWeight
from dfengine.kernels.quantization import Quantization

CLOCKS = {"elapsed": time.perf_counter, "cpu": time.process_time}
MATMUL = {"cpu": 2048, "cuda": 8192}
"""Side of the matrices whose product is the ceiling of arithmetic."""
INT8_LAYER = (32, 512)
"""Pixels on a side, and channels, of the 3x3 convolution whose rate is the ceiling of int8 on a CPU."""
COPIES = {"cpu": range(18, 29, 2), "cuda": range(20, 31, 2)}
"""Binary logarithms of the bytes that the copies move, read and written, which are the ceiling of bandwidth."""


def on_cpu(function: Callable, sets: list, clock: str) -> Callable[[], float]:
    """A function that runs `function` on the next set of arguments and returns the seconds it took."""
    turn = -1

    def once() -> float:
        nonlocal turn
        turn = (turn + 1) % len(sets)
        start = CLOCKS[clock]()
        function(*sets[turn])
        return CLOCKS[clock]() - start

    return once


def on_cuda(function: Callable, sets: list) -> Callable[[], float]:
    """A function that replays a graph of `function` on all sets and returns the seconds that one call took."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in sets[:3]:
            function(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in sets:
            function(*arguments)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sets)

    return once


def interleaved(
    functions: dict[str, Callable],
    sets: list,
    device: str,
    seconds: float,
    clock: str = "elapsed",
    least: int = 5,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of calls of every function, in turn, at least `least` of each, for about `seconds` after `warmup` calls.

    sets: the arguments of the calls, which rotate. device: "cpu" or "cuda". clock: of `CLOCKS`, on a CPU.
    """
    timed = {name: on_cuda(f, sets) if device == "cuda" else on_cpu(f, sets, clock) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for once in timed.values():
        for _ in range(warmup):
            once()
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < least:
        for name, once in timed.items():
            times[name].append(once())
        rounds += 1
    return times


def statistics_of(times: list[float], batch: int) -> dict[str, float]:
    """Of calls with `batch` images each: images/s by the median; median and, of at least a hundred calls, p99 in ms."""
    ordered, median = sorted(times), statistics.median(times)
    found = {"images_per_second": batch / median, "ms": median * 1e3}
    if len(ordered) >= 100:  # of fewer it would be the largest
        found["ms_p99"] = ordered[-(-99 * len(ordered) // 100) - 1] * 1e3
    return found


def copy_function(moved: int, count: int, device: str | torch.device) -> Callable[..., None]:
    """A copy that reads moved / 2 bytes and writes as many, on `count` pairs of buffers in turn."""
    pairs = [tuple(torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(count)]
    turn = 0

    def copy(*_arguments) -> None:
        nonlocal turn
        source, target = pairs[turn % count]
        turn += 1
        target.copy_(source)

    return copy


@cache
def matmul_rate(dtype: torch.dtype, device: str, clock: str = "elapsed", seconds: float = 0.5) -> float:
    """FLOP/s of the product of two large square matrices on `device`, "cpu", "cuda" or "cuda:N", by the median time;
    measured once in a process."""
    flops, times = _product_times(dtype, device, clock, seconds)
    return flops / statistics.median(times)


def _product_times(dtype: torch.dtype, device: str, clock: str, seconds: float) -> tuple[int, list[float]]:
    """The FLOPs of a large product, and the seconds that each call of it took.

    int8, on a CPU: of the engine's own convolution of a large layer, which reads and writes bfloat16; torch's product
    of int8 matrices is slower than that, and would be no ceiling.
    """
    kind = torch.device(device).type
    if dtype == torch.int8:
        product, sets, flops = _int8_product()
    else:
        side = MATMUL[kind]
        sets = [tuple(torch.ones((side, side), dtype=dtype, device=device) for _ in range(3))]
        product, flops = lambda a, b, c: torch.mm(a, b, out=c), 2 * side**3
    return flops, interleaved({"product": product}, sets, kind, seconds, clock)["product"]


def _int8_product() -> tuple[Callable[[], None], list, int]:
    """A convolution in int8 on the CPU, its (no) arguments, and its FLOPs. Raises CannotRunError where none is."""
    side, channels = INT8_LAYER
    weight = torch.ones((channels, channels, 3, 3))
    packed = ConvWeight.pack(weight, dtype=torch.bfloat16, quantization=Quantization("int8", 0.0, 1.0))
    x, y = (torch.ones((1, side, side, channels), dtype=torch.bfloat16) for _ in range(2))
    arguments = (x, None, packed, None, None, None, "none", "none", None, "none", "none", y, None, 0)
    convolution = OPS["conv2d"].implementations["cpu"]
    convolution.available("cpu")
    convolution.can_run(*arguments)
    return convolution.bound(*arguments), [()], 2 * side**2 * 9 * channels**2


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best, so by the shortest times: beside other work most are far longer.

    products: FLOP/s of the product that `matmul_rate` times, by the type that is multiplied.

    copies: bytes read and written -> bytes/s of a copy of that many, again and again on the same buffers: small ones
    stay in a cache, as the activations of a program do.
    """

    products: dict[torch.dtype, float]
    copies: dict[int, float]

    @classmethod
    def measured(cls, device: torch.device, types: Iterable[torch.dtype], seconds: float = 0.1) -> Ceilings:
        """Of `device`; about `seconds` for each copy, and five times as long for each product, which varies more."""
        copies = {}
        for exponent in COPIES[device.type]:
            # Several copies in a graph, so that its launch does not count; on a CPU the sets only rotate.
            sets, copy = [()] * (16 if device.type == "cuda" else 1), copy_function(2**exponent, 1, device)
            times = interleaved({"copy": copy}, sets, device.type, seconds)["copy"]
            copies[2**exponent] = 2**exponent / min(times)
        products = {}
        for dtype in types:
            flops, times = _product_times(dtype, str(device), "elapsed", 5 * seconds)
            products[dtype] = flops / min(times)
        return cls(products, copies)

    def higher(self, other: Ceilings) -> Ceilings:
        """The higher of each ceiling. other: of the same types and sizes."""
        products = {dtype: max(rate, other.products[dtype]) for dtype, rate in self.products.items()}
        return Ceilings(products, {size: max(rate, other.copies[size]) for size, rate in self.copies.items()})

    def bandwidth(self, moved: int) -> float:
        """Bytes/s of a copy that moves `moved` bytes, between those measured; beyond them that of the nearest."""
        sizes = sorted(self.copies)
        rates = [math.log2(self.copies[size]) for size in sizes]
        return float(2 ** np.interp(math.log2(max(moved, 1)), [math.log2(size) for size in sizes], rates))

    def bound(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """Seconds below which so much arithmetic of this type and traffic cannot go: the longer of the two."""
        return max(flops / self.products[dtype], moved / self.bandwidth(moved))


def type_name(dtype: torch.dtype) -> str:
    """As "bfloat16"."""
    return str(dtype).removeprefix("torch.")
