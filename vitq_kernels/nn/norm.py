"""Norms in float, for places that S3 does not serve: inside attention, and where no mean is subtracted."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vitq_kernels.nn.module import IntegerModule, QuantizeInput

NormKind = Literal["layer", "rms"]


class FloatNorm(IntegerModule):
    """LayerNorm or RMSNorm over the last dimension; its numbers stay float32.

    Args:
        kind: "layer", or "rms" which subtracts no mean.
        weight: float32 [K], or None for ones.
        bias: float32 [K], or None for zeros; of "layer" only.
        eps: added to the variance or the mean square.
    """

    def __init__(self, kind: NormKind, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to float32 [..., K]."""
        x = x.float()
        if self.kind == "rms":
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """Kind and eps."""
        return f"{self.kind}, eps={self.eps}"


class QuantRmsNorm(IntegerModule):
    """RMSNorm that writes codes: float [..., K] to int8 [..., K].

    The norm is float (torch) and its codes a second pass (semantics S1): S3 subtracts a mean. That costs a write and a
    read of [..., K] float32 more than a LayerNorm of the same size.
    """

    def __init__(self, norm: FloatNorm, quantize: QuantizeInput) -> None:
        super().__init__()
        self.norm = norm
        self.quantize = quantize

    @property
    def bits(self) -> int:
        """Of the codes."""
        return self.quantize.bits

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to int8 [..., K]."""
        return self.quantize(self.norm(x))
