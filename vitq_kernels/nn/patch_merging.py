"""Patch merging in integers (Swin)."""

from __future__ import annotations

from torch import Tensor, nn

from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.linear import QuantLinear
from vitq_kernels.windows import merged_patches


class QuantPatchMerging(nn.Module):
    """``reduction(norm(2x2 tokens side by side))``; a drop-in for timm's ``PatchMerging``.

    Args:
        norm: float [..., 4 * C] to codes.
        reduction: codes in, real out.
    """

    def __init__(self, norm: QuantLayerNorm, reduction: QuantLinear) -> None:
        super().__init__()
        self.norm = norm
        self.reduction = reduction

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, H, W, C] to [B, H/2, W/2, N] of the same dtype, sides rounded up."""
        return self.reduction(self.norm(merged_patches(x)), out_dtype=x.dtype)
