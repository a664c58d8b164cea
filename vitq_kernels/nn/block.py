"""A transformer block in integers; a drop-in for timm's ``Block`` and ``SwinTransformerBlock``."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.mlp import QuantMlp


class QuantBlock(nn.Module):
    """Pre-norm block; only the residual stream between its two halves is float.

    Layer scale is folded into ``attn.proj`` and ``mlp.fc2``. The norms write codes (QuantLayerNorm, QuantRmsNorm).
    With ``fused_norm`` (``fuse_layernorm``) ``attn.proj`` runs ``norm2`` too.
    """

    def __init__(self, norm1: nn.Module, attn: QuantAttention, norm2: nn.Module, mlp: QuantMlp) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp
        self.fused_norm = False

    @property
    def can_fuse(self) -> bool:
        """Whether ``norm2`` is a LayerNorm of what ``attn.proj`` adds to the residual stream."""
        return isinstance(self.norm2, QuantLayerNorm) and self.attn.proj.epilogue == "residual"

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
        turned = {} if rope is None else {"rope": rope}
        if self.fused_norm:
            x, codes = self.attn(self.norm1(x), x, next_norm=self.norm2, **turned)
        else:
            x = self.attn(self.norm1(x), x, **turned)
            codes = self.norm2(x)
        return self.mlp(codes, x)


def fuse_layernorm(model: nn.Module, fused: bool = True) -> int:
    """Has the blocks of a quantized model run the norm in front of the MLP in one op with attention's projection.

    Backend ``cuda`` then takes one launch for both on Hopper where its model expects that to be faster
    (``ops/cuda/tiles.py``): the same residual stream, codes within the bound of S3. Elsewhere it is two passes, and
    every bit the same. Not stored in a checkpoint. Hooks on ``norm2`` do not run then, and those on ``attn`` and
    ``attn.proj`` see two outputs.

    Args:
        model: from ``quantize`` or ``load``; changed in place. What was captured or compiled of it before stays.
        fused: False takes it back.

    Returns:
        How many blocks. Left alone are those whose ``norm2`` is no LayerNorm, and those with norms behind attention and
        MLP (``QuantPostNormBlock``).
    """
    blocks = [module for module in model.modules() if isinstance(module, QuantBlock) and module.can_fuse]
    for block in blocks:
        block.fused_norm = fused
    return len(blocks)
