"""A norm between attention and its projection."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.module import IntegerModule


class InnerNorm(IntegerModule):
    """The output of integer attention, in real units, to the codes that a norm writes for ``proj``.

    Attention writes int8 codes; here they are read as float32 (torch) and normed. That costs one more rounding to 8
    bits, and a write and a read of [B, S, H * D] float32.

    Args:
        scale: float32 [H * D], real units per code.
        shift: float32 [H * D], the real value of code 0.
        norm: float [..., H * D] to codes: QuantLayerNorm or QuantRmsNorm.
    """

    def __init__(self, scale: Tensor, shift: Tensor, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, codes: Tensor) -> Tensor:
        """int8 [B, S, H * D] to int8 of the same shape."""
        return self.norm(codes.float() * self.scale + self.shift)
