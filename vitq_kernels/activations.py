"""Elementwise activations of MLPs by name. All have the form ``x * gate(x)``, which their relevance rule needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An elementwise function of float tensors."""

    function: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]  # function(x) / x and its limit at 0
    gelu: Literal["none", "tanh"] | None = None  # the form of GELU that the linear ops have an epilogue for


def _gelu_gate(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh_gate(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


# The names are those of timm's ``act_layer``.
ACTIVATIONS = {
    "gelu": Activation(F.gelu, _gelu_gate, "none"),
    "gelu_tanh": Activation(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_gate, "tanh"),
    "quick_gelu": Activation(lambda x: x * torch.sigmoid(1.702 * x), lambda x: torch.sigmoid(1.702 * x)),
    "silu": Activation(F.silu, torch.sigmoid),
    "relu": Activation(F.relu, lambda x: (x > 0).to(x.dtype)),
    "hard_swish": Activation(F.hardswish, F.hardsigmoid),
    "mish": Activation(F.mish, lambda x: torch.tanh(F.softplus(x))),
}

Gate = Literal["first", "last"]  # the half of the channels that the activation of a gated MLP is applied to


def hidden_features(x: Tensor, activation: str, gate: Gate | None) -> Tensor:
    """``activation(x)``, or the activation of one half of the channels times the other: [..., 2 * K] to [..., K].

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, section 2.
    """
    function = ACTIVATIONS[activation].function
    if gate is None:
        return function(x)
    first, last = x.chunk(2, -1)
    return function(first) * last if gate == "first" else first * function(last)
