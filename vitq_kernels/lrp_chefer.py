"""Chefer's rules as functions whose backward is the rule: what flows back is the relevance R itself.

Source: Chefer, Gur, Wolf, "Transformer Interpretability Beyond Attention Visualization", CVPR 2021, as its code does it
(methods.md 1), with two differences: the stabiliser has the sign of what it stabilises, and a residual's normalising
sums are taken per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input

from vitq_kernels.activations import ACTIVATIONS
from vitq_kernels.lrp_composite import Composite, plain_norm, stable_divide


class _Unchanged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        return relevance[0], None


def unchanged(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """y = function(x, ...) of x's shape; R_x = R_y (norms, activations, softmax, multiplication by a constant)."""
    with torch.no_grad():
        y = function(x, *arguments)
    return _Unchanged.apply(x, y)


class _AlphaBetaLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.alpha = alpha
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        positive, negative = x.clamp(min=0), x.clamp(max=0)
        weight_positive, weight_negative = weight.clamp(min=0), weight.clamp(max=0)

        def share(with_positive: Tensor, with_negative: Tensor) -> Tensor:
            z = F.linear(positive, with_positive) + F.linear(negative, with_negative)
            quotient = stable_divide(relevance[0], z)
            return positive * (quotient @ with_positive) + negative * (quotient @ with_negative)

        result = share(weight_positive, weight_negative)
        if ctx.alpha != 1.0:
            result = ctx.alpha * result - (ctx.alpha - 1.0) * share(weight_negative, weight_positive)
        return result, None, None, None


def alpha_beta_linear(x: Tensor, layer: nn.Linear, alpha: float = 1.0) -> Tensor:
    """Linear y = x Wᵀ + b; R_x = alpha * act - (alpha - 1) * inh, the bias takes no relevance.

    act = x⁺ (S W⁺) + x⁻ (S W⁻), S = sd(R, x⁺ W⁺ᵀ + x⁻ W⁻ᵀ); inh the same with W⁺ and W⁻ exchanged. Both terms share one
    denominator, as in Chefer's ``layers_ours.py``. alpha = 1 is the z⁺ rule: R_x >= 0 where R >= 0.
    """
    bias = None if layer.bias is None else layer.bias.detach()
    return _AlphaBetaLinear.apply(x, layer.weight.detach(), bias, alpha)


class _ZBConv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = {"stride": stride, "padding": padding}
        return F.conv2d(x, weight, bias, **ctx.geometry)

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        low, high = (extreme(x, dim=(1, 2, 3), keepdim=True).expand_as(x) for extreme in (torch.amin, torch.amax))
        # every term of (x - low) W⁺ + (x - high) W⁻ is >= 0
        terms = ((x, weight), (-low, weight.clamp(min=0)), (-high, weight.clamp(max=0)))
        z = torch.stack([F.conv2d(v, w, **ctx.geometry) for v, w in terms]).sum(0)
        quotient = stable_divide(relevance[0], z)
        pulled = [v * conv2d_input(x.shape, w, quotient, **ctx.geometry) for v, w in terms]
        return torch.stack(pulled).sum(0), None, None, None, None


def zb_conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Convolution of pixels; z^B rule with the bounds L = min and H = max of each image.

    S = sd(R, x∗W - L∗W⁺ - H∗W⁻); R_x = x convᵀ(S, W) - L convᵀ(S, W⁺) - H convᵀ(S, W⁻); the bias takes no relevance.
    Chefer's code knows the first layer by its 3 input channels; here it is the patch embedding of any channels.
    """
    bias = None if layer.bias is None else layer.bias.detach()
    return _ZBConv.apply(x, layer.weight.detach(), bias, layer.stride, layer.padding)


class _HalvedMatmul(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        y = a @ b
        ctx.save_for_backward(a, b, y)
        return y

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        a, b, y = ctx.saved_tensors
        quotient = 0.5 * stable_divide(relevance[0], y)
        return a * (quotient @ b.mT), b * (a.mT @ quotient)


def halved_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Y = A B of tensors [..., M, K] and [..., K, N]; S = sd(R, Y), R_A = A (S Bᵀ) / 2, R_B = B (Aᵀ S) / 2."""
    return _HalvedMatmul.apply(a, b)


class _HalvedProduct(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor, Tensor]:
        half = relevance[0] * 0.5
        return half, half


def halved_product(a: Tensor, b: Tensor) -> Tensor:
    """Y = A * B, element by element; R_A = R_B = R / 2, what ``halved_matmul`` gives for factors of size 1.

    Chefer's models have no gates; their code gives the factors of a matrix product half each.
    """
    return _HalvedProduct.apply(a, b)


class _NormalizedAdd(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        def total(t: Tensor) -> Tensor:
            return t.sum(dim=tuple(range(1, t.ndim)), keepdim=True)

        a, b = ctx.saved_tensors
        quotient = stable_divide(relevance[0], a + b)
        a, b = a * quotient, b * quotient
        a_sum, b_sum = total(a), total(b)
        scale = stable_divide(total(relevance[0]), a_sum.abs() + b_sum.abs())
        # |Σa| / Σa is a sign: taken as one, the shares add up to ΣR exactly, with no stabiliser in between
        return a * scale * a_sum.sign(), b * scale * b_sum.sign()


def normalized_add(a: Tensor, b: Tensor) -> Tensor:
    """Residual y = a + b; each branch gets a sd(R, y), rescaled to the share |Σa sd| / (|Σa sd| + |Σb sd|) of ΣR.

    The sums run over each sample by itself, so that a sample's relevance does not depend on its batch.
    """
    return _NormalizedAdd.apply(a, b)


class _Proportional(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x).clone()  # a view of an input would restrict what autograd may do with the output

    @staticmethod
    def backward(ctx: Any, *relevance: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        y, pull_back = torch.func.vjp(ctx.function, x)[:2]
        return x * pull_back(stable_divide(relevance[0], y))[0], None


def proportional(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """y = function(x); R_i = x_i Σ_j (dy_j / dx_i) sd(R_j, y_j).

    For the selection of a class token this places R on the token; for average pooling it shares R in proportion to x.
    """
    return _Proportional.apply(x, function)


def chefer(alpha: float = 1.0) -> Composite:
    """Chefer's composite with the alpha-beta rule, beta = alpha - 1, in every linear; alpha >= 1."""
    if not 1.0 <= alpha < math.inf:
        raise ValueError(f"chefer: alpha must be a finite number >= 1, got {alpha}")
    return Composite(
        name="chefer",
        patch_embed=zb_conv,
        linear=partial(alpha_beta_linear, alpha=alpha),
        matmul=halved_matmul,
        add=normalized_add,
        scale=partial(unchanged, torch.mul),
        norm=lambda x, layer: unchanged(plain_norm, x, layer),
        activation=lambda x, name: unchanged(ACTIVATIONS[name].function, x),
        product=halved_product,
        softmax=lambda x: unchanged(lambda v: v.softmax(dim=-1), x),
        pool=proportional,
        relevance=lambda y, flowed: flowed,
    )


CHEFER = chefer()
