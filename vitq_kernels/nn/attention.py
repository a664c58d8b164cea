"""Multi-head self-attention in integers."""

from __future__ import annotations

from torch import Tensor

from vitq_kernels import ops
from vitq_kernels.nn.inner_norm import InnerNorm
from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.linear import QuantLinear
from vitq_kernels.nn.module import IntegerModule
from vitq_kernels.nn.position_bias import PositionBias
from vitq_kernels.nn.query_key import QueryKeyCodes


class QuantAttention(IntegerModule):
    """qkv linear, log2-quantized softmax attention (semantics S4), output projection added to the residual.

    Args:
        qkv: codes in, codes out; rows [3, H, D].
        proj: codes in, residual out; real where a norm stands between it and the residual stream.
        kappa: float32 [H], code steps per unit of the integer score.
        levels: uint8 [H, 2^b], probability level of each code.
        multiplier: float32 [H, D], v scale over output scale.
        zero_point: int32 [H, D], of the output codes.
        out_bits: width of the output codes.
        codes: makes q, k and v of qkv's real outputs, where q and k are normed or turned.
        norm: between attention and proj.
        bias: what the score gets by the places of the two tokens.
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
        codes: QueryKeyCodes | None = None,
        norm: InnerNorm | None = None,
        bias: PositionBias | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = multiplier.shape
        self.out_bits = out_bits
        self.qkv = qkv
        self.codes = codes
        self.norm = norm
        self.bias = bias
        self.proj = proj
        self.register_buffer("kappa", kappa)
        self.register_buffer("levels", levels)
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("zero_point", zero_point)

    def attend(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """Codes [B, S, C] to the codes [B, S, H * D] that enter ``proj``; ``rope`` as of ``QueryKeyCodes``."""
        qkv = self.qkv(x) if self.codes is None else self.codes(self.qkv(x), rope)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        tables = (self.kappa, self.levels, self.multiplier, self.zero_point)
        bias_q = None if self.bias is None else self.bias.bias_q
        out = ops.attention(q, k, v, *tables, bias_q, None, self.out_bits)
        return out if self.norm is None else self.norm(out)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        rope: Tensor | None = None,
        next_norm: QuantLayerNorm | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Codes int8 [B, S, C] and the residual stream [B, S, C] to the new residual stream, or to real numbers.

        ``next_norm`` as of ``QuantLinear``.
        """
        attended = self.attend(x) if rope is None else self.attend(x, rope)
        return self.proj(attended, residual, next_norm=next_norm)
