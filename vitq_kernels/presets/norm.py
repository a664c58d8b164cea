"""A LayerNorm whose input passes a fake quantizer (FQ-ViT quantizes there)."""

from __future__ import annotations

from torch import Tensor, nn


class NormWithInput(nn.Module):
    """``norm(input(x))``; stands in a model where the norm stood."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.input: nn.Module = nn.Identity()  # fake quantizer of [..., C]
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., C] to [..., C]."""
        return self.norm(self.input(x))
