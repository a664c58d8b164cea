"""Fake quantizers: from a float tensor to the float tensor that its codes stand for.

Each is a module of buffers (its tensors) and plain numbers (``config``), so that ``cls(**buffers, **config())`` makes
it again; that is how a file of a simulated model is read.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

QUANTIZERS: dict[str, type[FakeQuantizer]] = {}  # by class name; what a file of a simulated model may name


class FakeQuantizer(nn.Module):
    """Base of all fake quantizers; a subclass is known to ``QUANTIZERS`` by its name."""

    numbers: ClassVar[tuple[str, ...]] = ()  # constructor arguments that are plain numbers, also attributes

    def __init_subclass__(cls) -> None:
        QUANTIZERS[cls.__name__] = cls

    def config(self) -> dict[str, Any]:
        """The plain numbers, JSON-ready."""
        return {name: getattr(self, name) for name in self.numbers}

    @property
    def levels(self) -> int:
        """How many different values one element can take, zero included."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Levels, numbers and shapes of the tensors."""
        shapes = [f"{name}={list(tensor.shape)}" for name, tensor in self.named_buffers()]
        return ", ".join([f"levels={self.levels}", *(f"{k}={v}" for k, v in self.config().items()), *shapes])


class Uniform(FakeQuantizer):
    """``scale * (clamp(rint(x / scale) + zero_point, qmin, qmax) - zero_point)``.

    A zero point that is no integer is taken as it is (RepQ-ViT's averaged one): codes that the clamp reaches then lie
    off the grid of the others, which makes one level more than qmin..qmax has codes.
    """

    numbers = ("qmin", "qmax")

    def __init__(self, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> None:
        """Takes tensors that broadcast against x: [] per tensor, [C] per channel, [H, 1, 1] per head."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.qmin, self.qmax = qmin, qmax

    @property
    def levels(self) -> int:
        """2^b, or 2^b + 1 with a zero point that is no integer."""
        whole = bool((self.zero_point == self.zero_point.round()).all())
        return self.qmax - self.qmin + (1 if whole else 2)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that scale and zero point broadcast against."""
        codes = ((x / self.scale).round() + self.zero_point).clamp(self.qmin, self.qmax)
        return (codes - self.zero_point) * self.scale


class Log2(FakeQuantizer):
    """``scale * 2^-q`` with ``q = clamp(rint(-log2(x / scale)), 0, 2^bits - 1)``: 2^bits levels, none of them zero."""

    numbers = ("bits",)

    def __init__(self, scale: Tensor, bits: int) -> None:
        """Takes the largest level, which broadcasts against x."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    def forward(self, x: Tensor) -> Tensor:
        """Non-negative x; 0 becomes the smallest level."""
        return torch.exp2(-(-(x / self.scale).log2()).round().clamp(0, self.levels - 1)) * self.scale


class LogSqrt2(FakeQuantizer):
    """RepQ-ViT's quantizer of attention probabilities, base sqrt(2), as its code has it.

    ``q = rint(-2 log2(x / scale))``; ``scale * 2^(-q/2)`` where q < 2^bits (a negative q counts as 0), an exact
    zero from 2^bits on: 2^bits + 1 levels. Source: RepQ-ViT (Li et al., ICCV 2023, arXiv:2212.08254).
    """

    numbers = ("bits",)

    def __init__(self, scale: Tensor, bits: int) -> None:
        """Takes the largest level, which broadcasts against x."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^bits codes and the zero that needs one more."""
        return (1 << self.bits) + 1

    def forward(self, x: Tensor) -> Tensor:
        """Non-negative x."""
        code = (-2 * (x / self.scale).log2()).round()
        kept = code.clamp(0, (1 << self.bits) - 1)
        odd = (kept % 2) * (math.sqrt(2) - 1) + 1  # 2^(-q/2) as a shift and a factor for odd codes
        value = torch.exp2(-(kept / 2).ceil()) * odd * self.scale
        return torch.where(code >= 1 << self.bits, 0.0, value)
