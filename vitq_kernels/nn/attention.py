"""Multi-head self-attention in integers."""

from __future__ import annotations

from torch import Tensor

from vitq_kernels import ops
from vitq_kernels.nn.linear import QuantLinear
from vitq_kernels.nn.module import IntegerModule


class QuantAttention(IntegerModule):
    """qkv linear, log2-quantized softmax attention (semantics S4), output projection added to the residual.

    Args:
        qkv: codes in, codes out; rows [3, H, D].
        proj: codes in, residual out.
        kappa: float32 [H], code steps per unit of the integer score.
        levels: uint8 [H, 2^b], probability level of each code.
        multiplier: float32 [H, D], v scale over output scale.
        zero_point: int32 [H, D], of the output codes.
        out_bits: width of the output codes.
    """

    def __init__(
        self,
        qkv: QuantLinear,
        proj: QuantLinear,
        kappa: Tensor,
        levels: Tensor,
        multiplier: Tensor,
        zero_point: Tensor,
        out_bits: int,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = multiplier.shape
        self.out_bits = out_bits
        self.qkv = qkv
        self.proj = proj
        self.register_buffer("kappa", kappa)
        self.register_buffer("levels", levels)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("zero_point", zero_point)

    def attend(self, x: Tensor) -> Tensor:
        """Codes [B, S, C] to the codes [B, S, H * D] that enter ``proj``."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        tables = (self.kappa, self.levels, self.multiplier, self.zero_point)
        return ops.attention(q, k, v, *tables, None, None, self.out_bits)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """Codes int8 [B, S, C] and the residual stream [B, S, C] to the new residual stream."""
        return self.proj(self.attend(x), residual)
