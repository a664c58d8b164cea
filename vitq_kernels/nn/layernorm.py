"""LayerNorm that writes codes."""

from __future__ import annotations

from torch import Tensor

from vitq_kernels import ops
from vitq_kernels.nn.module import IntegerModule


class QuantLayerNorm(IntegerModule):
    """LayerNorm and quantization in one pass: float [..., K] to int8 codes (semantics S3).

    Args:
        gain: float32 [K], ``gamma / scale``.
        offset: float32 [K], ``beta / scale + zero_point``.
        eps: added to the variance.
        bits: width of the codes.
    """

    def __init__(self, gain: Tensor, offset: Tensor, eps: float, bits: int) -> None:
        super().__init__()
        self.eps = eps
        self.bits = bits
        self.register_buffer("gain", gain)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to int8 [..., K]."""
        return ops.layernorm(x, self.gain, self.offset, self.eps, self.bits)

    def extra_repr(self) -> str:
        """Channels and width."""
        return f"{self.gain.numel()}, bits={self.bits}"
