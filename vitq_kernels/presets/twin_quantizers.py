"""Two uniform grids for two regions of a tensor, after softmax and after GELU (PTQ4ViT, and methods built on it)."""

from __future__ import annotations

import torch
from torch import Tensor

from vitq_kernels.presets.quantizers import FakeQuantizer


class TwinSoftmax(FakeQuantizer):
    """Probabilities below ``split`` on a fine grid, above it on a coarse one, as PTQ4ViT's code adds them.

    With ``q = 2^(bits-1) - 1``: ``rint(clamp(x, split, 1) q) / q + rint(clamp(x, 0, split) q / split) split / q``. So a
    number above the split comes out one split too large, and one below it too large by the split rounded to the coarse
    grid (methods.md 8.6). Source: Yuan et al., ECCV 2022, arXiv:2111.12293; quant_layers/matmul.py.
    """

    numbers = ("bits",)

    def __init__(self, split: Tensor, bits: int) -> None:
        """Takes the border [] in (0, 1]."""
        super().__init__()
        self.register_buffer("split", split)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^(bits-1) fine ones and the coarse ones above the split: less than 2^bits."""
        top = (1 << (self.bits - 1)) - 1
        return 1 + top + top - int((self.split * top).round())

    def forward(self, x: Tensor) -> Tensor:
        """x in [0, 1]."""
        top = (1 << (self.bits - 1)) - 1
        coarse = (torch.clamp(x, self.split, torch.ones_like(self.split)) * top).round() / top
        fine = (torch.minimum(x, self.split) * (top / self.split)).round() * (self.split / top)
        return coarse + fine


class TwinSign(FakeQuantizer):
    """Positive and negative numbers on grids of their own: codes 0..2^(bits-1) - 1 and -2^(bits-1)..0."""

    numbers = ("bits",)

    def __init__(self, scale: Tensor, negative_scale: Tensor, bits: int) -> None:
        """Takes the scales [] of the two."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("negative_scale", negative_scale)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^bits: the two grids share zero."""
        return 1 << self.bits

    def forward(self, x: Tensor) -> Tensor:
        """Any x."""
        half = 1 << (self.bits - 1)
        positive = (x / self.scale).round().clamp(0, half - 1) * self.scale
        return positive + (x / self.negative_scale).round().clamp(-half, 0) * self.negative_scale
