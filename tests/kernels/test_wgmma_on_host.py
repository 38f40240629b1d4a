"""The host's stand-in for wgmma (wgmma_on_host.h): products whose second factors lie in shared memory as the PTX manual
says, laid out here anew, and that each mistake around a product shows."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from tests.kernels import cuda_on_host

KERNELS = {"float16_64": 64, "float16_128": 128, "bfloat16_256": 256}
MODES = {0: 0, 128: 1, 64: 2, 32: 3}
"""Bytes of a swizzled row: bits 62 and 63 of a matrix descriptor."""
LAYOUTS = [
    (0, 128, 256, 0),
    (4112, 4096, 128, 0),
    (48, 144, 304, 0),
    (2048, 16, 1024, 128),
    (512, 16, 512, 64),
    (256, 16, 256, 32),
]
"""Start, leading, stride and swizzle, in bytes."""
MISTAKES = dict(
    no_wait=1, no_fence=2, no_proxy_fence=3, other_b=4, other_a=5, other_sums=6, other_descriptor=7, early=8
)  # fmt: skip


@pytest.fixture(scope="module")
def probe() -> ctypes.CDLL:
    here = cuda_on_host.HERE
    built = cuda_on_host.compiled(f'#include "{here / "cuda_on_host.h"}"\n#include "{here / "wgmma_probe.h"}"\n')
    built.described.restype = ctypes.c_uint64
    built.described.argtypes = [ctypes.c_uint32] * 3
    return built


def image_of(b: torch.Tensor, start: int, leading: int, stride: int, swizzle: int) -> torch.Tensor:
    """b (16, N) as bytes of shared memory, K-major: in units of 16 bytes ((8, n), 2) with the strides ((1, stride),
    leading), or ((swizzle / 16, stride), 1) where bits 4 to 6 of the address are changed by bits 7 to 9."""
    bits = b.view(torch.int16)
    image = torch.full((64 * 1024 // 2,), 0x7FFF, dtype=torch.int16)
    for n in range(b.shape[1]):
        for k in range(16):
            if swizzle:
                address = start + n // 8 * stride + n % 8 * swizzle + 2 * k
                address ^= (address & {128: 0x380, 64: 0x180, 32: 0x80}[swizzle]) >> 3
            else:
                address = start + n // 8 * stride + n % 8 * 16 + k // 8 * leading + 2 * (k % 8)
            image[address // 2] = bits[k, n]
    return image.view(torch.uint8)


def product(probe, kernel: str, layout=(256, 128, 256, 0), as_if=None, mistake: int = 0, backwards: bool = False):
    """(what the kernel makes of sums + a b, what is right); as_if: the layout that it is told, if another."""
    columns, dtype = KERNELS[kernel], getattr(torch, kernel.split("_")[0])
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(size, generator=g).to(dtype) for size in ((64, 16), (16, columns)))
    sums = torch.randn((64, columns), generator=g)
    right = sums + a.float() @ b.float()
    start, leading, stride, swizzle = as_if or layout
    descriptor = start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62
    image = image_of(b, *layout)
    numbers = np.int32(image.numel()), np.uint64(descriptor), np.int32(mistake)
    cuda_on_host.launch_from(
        probe, f"probe_{kernel}", (1, 1, 1), (128, 1, 1), (a, image, *numbers, sums), image.numel(), backwards
    )
    return sums, right


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"swizzle{layout[3]}-{layout[1]}-{layout[2]}")
def test_products_of_every_layout(probe, kernel, layout):
    for backwards in (False, True):
        torch.testing.assert_close(*product(probe, kernel, layout, backwards=backwards), rtol=1e-5, atol=1e-5)


def test_a_step_inside_a_swizzled_row(probe):
    """16 values of K further on in a pattern of 128 bytes: the start moves by 32 bytes, the pattern stays."""
    layout = (1024 + 32, 16, 1024, 128)
    torch.testing.assert_close(*product(probe, "float16_64", layout), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "as_if", [(256, 256, 128, 0), (272, 128, 256, 0), (256, 128, 128, 0), (1024, 128, 256, 128)], ids=str
)
def test_another_layout_gives_another_product(probe, as_if):
    made, right = product(probe, "float16_64", as_if=as_if)
    assert not torch.allclose(made, right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_give_what_is_not_a_number(probe, mistake):
    made, _ = product(probe, "float16_128", mistake=MISTAKES[mistake])
    assert made.isnan().any()


def test_the_descriptor_that_kernels_make(probe):
    for address, leading, stride in ((0, 128, 256), (0x12340, 144, 4096), (227 * 1024 - 16, 16, 1024)):
        made = probe.described(address, leading, stride)
        assert made == address // 16 | leading // 16 << 16 | stride // 16 << 32
