"""The weight of a convolution as its kernels take it (not an op: kernels/conv2d.py reads it)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dfengine.kernels.quantization import Quantization
from dfengine.kernels.registry import CannotRunError


@dataclass(frozen=True, eq=False)
class ConvWeight:
    """A weight packed once for the GEMM.

    packed: (KH, KW, C, O), contiguous, of the activations' dtype; or, with a quantization, which the input takes too,
    in its format, where 1 means `unit`, float32 (O,). disposable: whether a backend that is bound to it and has its own
    form of it may `release` it. prepacked: what other backends make of it on first use, by backend; the weight must not
    change afterwards.
    """

    packed: Tensor
    dilation: int = 1
    disposable: bool = False
    quantization: Quantization | None = None
    unit: Tensor | None = None
    prepacked: dict[str, object] = field(default_factory=dict, repr=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", self.packed.device)
        if self.packed.ndim != 4 or self.packed.numel() == 0 or not self.packed.is_contiguous():
            raise ValueError(f"weight: expected contiguous (KH, KW, C, O), got {tuple(self.packed.shape)}")
        if self.packed.shape[0] % 2 == 0 or self.packed.shape[1] % 2 == 0:
            raise ValueError(f"weight: a kernel of {self.kernel[0]} x {self.kernel[1]} has no centre")
        if self.dilation < 1:
            raise ValueError(f"weight: dilation {self.dilation} is below 1")

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        dilation: int = 1,
        dtype: torch.dtype | None = None,
        disposable: bool = False,
        quantization: Quantization | None = None,
    ) -> ConvWeight:
        """From torch's (O, C, KH, KW), in `dtype` (by default the weight's own), or in the format of a quantization."""
        taps, unit = weight.detach().permute(2, 3, 1, 0), None
        if quantization is None:
            taps = taps.to(dtype or weight.dtype)
        else:
            taps, unit = quantization.weight(taps)
        return cls(taps.contiguous(), dilation, disposable, quantization, unit)

    def release(self) -> None:
        """Drop the taps, whose shape and dtype stay: from then on only what is in `prepacked` runs."""
        if not self.prepacked:
            raise ValueError("weight: nothing was made of it yet")
        object.__setattr__(self, "packed", self.packed.to("meta"))

    def taps(self) -> Tensor:
        """`packed`. Raises CannotRunError where it was released."""
        if self.packed.device != self.device:
            raise CannotRunError("weight: released, only the form that was made of it is left")
        return self.packed

    @property
    def kernel(self) -> tuple[int, int]:
        return tuple(self.packed.shape[:2])

    @property
    def inputs(self) -> int:
        return self.packed.shape[2]

    @property
    def outputs(self) -> int:
        return self.packed.shape[3]


def whole(weight: ConvWeight) -> None:
    """Raise CannotRunError for a quantized weight."""
    if weight.quantization is not None:
        raise CannotRunError(f"weight: in {weight.quantization.format}, which is not multiplied here")
