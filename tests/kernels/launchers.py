"""Every implementation of an op, for its tests: the instruction sets of the CPU kernels, each launch configuration of
the Triton kernels (in the interpreter where no GPU is), and the CUDA kernels (on the host where no GPU is)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from dfengine import native
from dfengine.kernels import CannotRunError, Op, cuda_launch, triton_import
from tests.kernels import cuda_on_host

GPU = torch.cuda.is_available()
LEVELS = ("base", "avx2", "avx512", "avx512_bf16")


@dataclass(frozen=True)
class Launcher:
    """One implementation; its tensors live on `device`."""

    backend: str
    device: str
    options: dict = field(default_factory=dict)

    def run(self, op: Op, *args) -> None:
        """Call the implementation of `op`, whose arguments are those of its `run`."""
        op.implementations[self.backend].run(*args, **self.options)


def names(configurations: Sequence[dict] = (), cpu: bool = True, cuda: bool = True) -> list[str]:
    """What to parametrise a test with; `configurations` are those of the Triton kernels."""
    found = ["reference"]
    found += [f"cpu-{level}" for level in LEVELS] if cpu else []
    found += [f"triton-{number}" for number in range(len(configurations))]
    if cuda:
        found += ["cuda"] if GPU else ["cuda-forwards", "cuda-backwards"]
    return found


def launcher(name: str, monkeypatch: pytest.MonkeyPatch, configurations: Sequence[dict] = ()) -> Launcher:
    """The implementation called `name`; skips with the reason where it does not run here."""
    backend, _, variant = name.partition("-")
    if backend in ("reference", "library"):
        return Launcher(backend, "cpu")
    if backend == "cpu":
        if not native.available():
            pytest.skip(native.status())
        if not native.cpu_levels().get(variant):
            pytest.skip(f"this processor does not run {variant}")
        return Launcher("cpu", "cpu", {"level": variant})
    device = "cuda" if GPU else "cpu"
    try:
        if backend == "triton":
            triton_import.available(device)
            return Launcher("triton", device, {"configuration": configurations[int(variant)]})
        if GPU:
            cuda_launch.available(device)
    except CannotRunError as error:
        pytest.skip(str(error))
    if not GPU:
        cuda_on_host.install(monkeypatch, backwards=variant == "backwards")
    return Launcher("cuda", device)
