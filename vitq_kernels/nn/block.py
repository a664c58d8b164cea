"""A transformer block in integers; a drop-in for timm's ``Block`` and ``SwinTransformerBlock``."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.mlp import QuantMlp


class QuantBlock(nn.Module):
    """Pre-norm block; only the residual stream between its two halves is float.

    Layer scale is folded into ``attn.proj`` and ``mlp.fc2``. The norms write codes (QuantLayerNorm, QuantRmsNorm).
    """

    def __init__(self, norm1: nn.Module, attn: QuantAttention, norm2: nn.Module, mlp: QuantMlp) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Residual stream [B, S, C] to residual stream, as timm calls it; a map [B, H, W, C] with windowed attention.

        ``rope`` is as of ``QueryKeyCodes``. Conversion has put ``shared_rel_pos_bias`` into the attention's own bias.

        Raises:
            ValueError: an attention mask was given; integer attention here has none yet.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("QuantBlock: attn_mask and is_causal must be absent, got a mask")
        codes = self.norm1(x)
        x = self.attn(codes, x) if rope is None else self.attn(codes, x, rope)
        return self.mlp(self.norm2(x), x)
