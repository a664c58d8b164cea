"""AttnLRP's rules as functions whose backward is the rule: what flows back is g = R/y, so R = y * g at any tensor y.

Source: Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers", ICML 2024, in its
gradient x input form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from vitq_kernels.activations import ACTIVATIONS
from vitq_kernels.lrp_composite import Composite


class _HalfGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0] * 0.5


def uniform_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Y = A B; uniform rule (AttnLRP proposition 3.3): half of the gradient, so half of ΣR, to each factor."""
    return _HalfGradient.apply(a @ b)


def uniform_product(a: Tensor, b: Tensor) -> Tensor:
    """Y = A * B, element by element; uniform rule (AttnLRP proposition 3.3): half of R to each factor."""
    return _HalfGradient.apply(a * b)


def identity_activation(x: Tensor, name: str) -> Tensor:
    """Identity rule (AttnLRP eq. 9), R_x = R_y: the gradient is activation(x)/x, a gate, so nothing is divided at 0.

    Args:
        x: any shape.
        name: of ACTIVATIONS.
    """
    return x * ACTIVATIONS[name].gate(x.detach())


def detached_norm(x: Tensor, layer: Any) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, its divisor taken as a constant (AttnLRP proposition 3.4)."""
    centred = x - x.mean(dim=-1, keepdim=True) if isinstance(layer, nn.LayerNorm) else x
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    y = centred * (centred.detach().square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if layer.weight is not None:
        y = y * layer.weight.detach()
    bias = getattr(layer, "bias", None)
    return y if bias is None else y + bias.detach()


def _gradient_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _gradient_conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach()
    return F.conv2d(x, layer.weight.detach(), bias, layer.stride, layer.padding)


ATTNLRP = Composite(
    name="attnlrp",
    patch_embed=_gradient_conv,
    linear=_gradient_linear,  # the epsilon rule (eq. 8) with epsilon -> 0
    matmul=uniform_matmul,
    add=torch.add,
    scale=torch.mul,
    norm=detached_norm,
    activation=identity_activation,
    product=uniform_product,
    softmax=lambda x: x.softmax(dim=-1),  # the gradient is AttnLRP's Taylor rule (proposition 3.1)
    pool=lambda x, function: function(x),
    relevance=torch.mul,
)
