"""Blocks and patch merging whose norms stand behind the linears, as of Swin Transformer V2."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.linear import QuantLinear
from vitq_kernels.nn.mlp import QuantMlp
from vitq_kernels.nn.module import QuantizeInput
from vitq_kernels.nn.norm import FloatNorm
from vitq_kernels.windows import merged_patches


class QuantPostNormBlock(nn.Module):
    """``x + norm1(attn(x))``, ``x + norm2(mlp(x))``; a drop-in for timm's ``SwinTransformerV2Block``.

    The residual stream itself is quantized for the linears that read it. The norms are float (torch), on the real
    outputs of ``proj`` and ``fc2``: where a block with norms in front lets an epilogue add the residual, this one
    writes and reads [..., C] float32 twice more a branch.

    Args:
        codes1, codes2: the stream to the codes that attention and MLP read.
        attn, mlp: their last linears put out real numbers.
        norm1, norm2: of those.

    Source: Liu et al., "Swin Transformer V2", CVPR 2022, arXiv:2111.09883, section 3.2.
    """

    def __init__(
        self,
        codes1: QuantizeInput,
        attn: QuantAttention,
        norm1: FloatNorm,
        codes2: QuantizeInput,
        mlp: QuantMlp,
        norm2: FloatNorm,
    ) -> None:
        super().__init__()
        self.codes1 = codes1
        self.attn = attn
        self.norm1 = norm1
        self.codes2 = codes2
        self.mlp = mlp
        self.norm2 = norm2

    def forward(self, x: Tensor) -> Tensor:
        """Residual stream [B, S, C], or a map [B, H, W, C], to residual stream."""
        x = x + self.norm1(self.attn(self.codes1(x))).to(x.dtype)
        return x + self.norm2(self.mlp(self.codes2(x))).to(x.dtype)


class QuantPostNormMerging(nn.Module):
    """``norm(reduction(2x2 tokens side by side))``; a drop-in for the ``PatchMerging`` of timm's Swin V2.

    Args:
        codes: float [..., 4 * C] to codes.
        reduction: codes in, real out.
        norm: over N.
    """

    def __init__(self, codes: QuantizeInput, reduction: QuantLinear, norm: FloatNorm) -> None:
        super().__init__()
        self.codes = codes
        self.reduction = reduction
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, H, W, C] to [B, H/2, W/2, N] of the same dtype, sides rounded up."""
        return self.norm(self.reduction(self.codes(merged_patches(x)))).to(x.dtype)
