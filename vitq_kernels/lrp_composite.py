"""What a family of relevance rules is: one function for every operation, and how relevance is read off.

One forward program written in these functions (relevance_program.py) serves every composite, and no model is patched.
Autograd sums what arrives at a fork, which is Chefer's Clone rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-9  # the stabiliser of Chefer's divisions


def stable_divide(a: Tensor, b: Tensor) -> Tensor:
    """sd(a, b) = a / (b + EPSILON * sign(b)), and 0 where b is 0."""
    return torch.where(b == 0, 0.0, a / (b + torch.copysign(torch.full_like(b, EPSILON), b)))


@dataclass(frozen=True)
class Composite:
    """One rule for every operation of a Vision Transformer, and how relevance is read off what flows back."""

    name: str
    patch_embed: Callable[[Tensor, nn.Conv2d], Tensor]  # images [B, 3, H, W] -> [B, C, h, w]
    linear: Callable[[Tensor, nn.Linear], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor], Tensor]  # two tensors of one shape, samples along dimension 0
    scale: Callable[[Tensor, Tensor | float], Tensor]  # times a constant: softmax scale, layer scale, mean of heads
    norm: Callable[[Tensor, Any], Tensor]  # LayerNorm or RMSNorm over the last dimension
    activation: Callable[[Tensor, str], Tensor]  # the str is a name of ACTIVATIONS
    product: Callable[[Tensor, Tensor], Tensor]  # of two tensors of one shape: a gate and what it lets pass
    softmax: Callable[[Tensor], Tensor]  # over the last dimension
    # A tensor and a function of it: the pooling of tokens, and rotary embedding, which is linear.
    pool: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
    relevance: Callable[[Tensor, Tensor], Tensor]  # (a tensor, what flowed back to it) -> its relevance


def plain_norm(x: Tensor, layer: Any) -> Tensor:
    """LayerNorm, or RMSNorm for any other layer, over the last dimension; the layer's numbers are constants."""
    weight = None if layer.weight is None else layer.weight.detach()
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, x.shape[-1:], weight, None if layer.bias is None else layer.bias.detach(), layer.eps)
    return F.rms_norm(x, x.shape[-1:], weight, layer.eps)
