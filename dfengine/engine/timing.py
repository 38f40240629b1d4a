"""Timing of functions, and the rates of matrix products and copies beside which they are held.

The benchmarks and the looks inside a program time functions in this one way. On a GPU a function is captured in a CUDA
graph, whose replays are timed by events. A benchmark holds its medians to a median, that of `matmul_rate`; a plan holds
its ops to `Ceilings`, which are of shortest times.
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
"""Side of the matrices of `matmul_rate`."""
SHORT_MATMUL = 512
"""Side of the matrices, a product for each thread, whose rate is the ceiling of arithmetic on a CPU: over within 2 ms,
and at the rate of larger ones."""
INT8_LAYER = (32, 512)
"""Pixels on a side, and channels, of the 3x3 convolution whose rate is the ceiling of int8 on a CPU."""
COPIES = {"cpu": range(18, 29, 2), "cuda": range(20, 31, 2)}
"""Binary logarithms of the bytes that the copies move, read and written, which are the ceiling of bandwidth."""
COPY_PIECE = 2**22
"""Bytes for each thread of a CPU that a call of a large copy moves: one piece after the other, over within 1 ms."""


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
    median, p99 = statistics.median(times), p99_of(times)
    found = {"images_per_second": batch / median, "ms": median * 1e3}
    return found if p99 is None else found | {"ms_p99": p99 * 1e3}


def p99_of(times: list[float]) -> float | None:
    """The time that 99% do not exceed; None of fewer than a hundred, of which it would be the largest."""
    return sorted(times)[-(-99 * len(times) // 100) - 1] if len(times) >= 100 else None


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
    measured once in a process. int8, on a CPU: of `_int8_product`."""
    product, sets, flops = _int8_product() if dtype == torch.int8 else _large_product(dtype, device)
    times = interleaved({"product": product}, sets, torch.device(device).type, seconds, clock)["product"]
    return flops / statistics.median(times)


def _large_product(dtype: torch.dtype, device: str) -> tuple[Callable, list, int]:
    """A product of two large square matrices, its arguments, and its FLOPs."""
    side = MATMUL[torch.device(device).type]
    sets = [tuple(torch.randn((side, side), device=device).to(dtype) for _ in range(3))]
    return lambda a, b, c: torch.mm(a, b, out=c), sets, 2 * side**3


def _short_products(dtype: torch.dtype) -> tuple[Callable, list, int]:
    """On the CPU a product of two square matrices for each thread (torch multiplies one pair of this size in bfloat16
    in one thread), their arguments, and their FLOPs."""
    count, side = torch.get_num_threads(), SHORT_MATMUL
    sets = [tuple(torch.randn((count, side, side)).to(dtype) for _ in range(3))]
    return lambda a, b, c: torch.bmm(a, b, out=c), sets, 2 * count * side**3


def _int8_product() -> tuple[Callable[[], None], list, int]:
    """The engine's own convolution in int8 of a large layer on the CPU, its (no) arguments, and its FLOPs. It reads and
    writes bfloat16; torch's product of int8 matrices is slower than that. Raises CannotRunError where there is none."""
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
    """What a device reaches at best, so by the shortest times: beside other work most are far longer. On a CPU every
    call is short, that one may fall between the turns of other work; with several threads, between those on all cores.

    products: FLOP/s of matrix products, by the type that is multiplied: of large matrices on a GPU, of `SHORT_MATMUL`
    on a CPU (int8: of `_int8_product`).

    copies: bytes read and written -> bytes/s of copying that many, again and again on the same buffers: small ones stay
    in a cache, as the activations of a program do.
    """

    products: dict[torch.dtype, float]
    copies: dict[int, float]

    @classmethod
    def measured(cls, device: torch.device, types: Iterable[torch.dtype], seconds: float = 0.1) -> Ceilings:
        """Of `device`; about `seconds` for each copy, and five times as long for each product, which varies more."""
        cuda, copies, products = device.type == "cuda", {}, {}
        for exponent in COPIES[device.type]:
            # Several copies in a graph, so that its launch does not count; on a CPU the sets only rotate.
            pieces = 1 if cuda else max(1, 2**exponent // (COPY_PIECE * torch.get_num_threads()))
            piece = 2**exponent // pieces
            sets, copy = [()] * (16 if cuda else 1), copy_function(piece, pieces, device)
            copies[2**exponent] = piece / min(interleaved({"copy": copy}, sets, device.type, seconds)["copy"])
        for dtype in types:
            if dtype == torch.int8:
                product, sets, flops = _int8_product()
            else:
                product, sets, flops = _large_product(dtype, str(device)) if cuda else _short_products(dtype)
            times = interleaved({"product": product}, sets, device.type, 5 * seconds)["product"]
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
