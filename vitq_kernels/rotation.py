"""The same Vision Transformer with its residual stream in a rotated basis, in which no channel stands out."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vitq_kernels.models import ModelParts, UnsupportedModelError, model_parts
from vitq_kernels.models.vit import VitParts

EXACT_POOLS = ("token", "avg", "")  # linear in the tokens, the same for every channel


@torch.no_grad()
def rotate(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a VisionTransformer that computes the same logits on a residual stream ``Q x`` instead of ``x``.

    Q is orthogonal and keeps the vector of ones. So the mean and the variance of a token stay what they were, and
    LayerNorm without its gain and bias gives ``Q LN(x)`` for ``Q x``: no RMSNorm and no new operation is needed. Gains
    and biases of the norms move into the linears that read them, layer scales into those that write the stream, and Q
    into both. A linear without a bias gets one.

    Quantize the copy like any model. A channel of its LayerNorm outputs is a mix of all channels, so the few channels
    of large range are gone; on the other hand ranges that really differ by channel are no longer there to be used.

    Args:
        model: a timm VisionTransformer whose every part has an integer form.
        seed: of Q.

    Raises:
        UnsupportedModelError: a part does not commute with a rotation: a norm in front of the first block, max pooling,
            two final norms, a model without a classifier; or it has no integer form.

    Source: rotation of the residual stream: QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; methods.md 3.14.
        The condition ``Q 1 = 1`` replaces their step from LayerNorm to RMSNorm.
    """
    result = copy.deepcopy(model)
    parts = model_parts(result, strict=True)
    if parts.token_map:
        raise UnsupportedModelError(
            f"rotate: model must have one residual stream from end to end, got a {type(model).__name__}"
        )
    if not isinstance(parts, VitParts):
        raise UnsupportedModelError(f"rotate: model must be a timm VisionTransformer, got {type(model).__name__}")
    for block in parts.blocks:
        if not block.plain:
            raise UnsupportedModelError(f"rotate: {block.name} must be a block as of ViT, with LayerNorms and one qkv")
    final_norm = _final_norm(parts)
    rotation = mean_keeping_rotation(parts.patch_proj.out_channels, seed).to(parts.patch_proj.weight.device)
    for tokens in result.parameters(recurse=False):  # class, distillation and register tokens, positions: [1, T, C]
        tokens.copy_(tokens.double() @ rotation.T)
    _rotate_writer(parts.patch_proj, None, rotation)
    for block in parts.blocks:
        _rotate_readers([block.attn.qkv], block.norm1, rotation)
        _rotate_writer(block.attn.proj, block.layer_scale1, rotation)
        _rotate_readers([block.mlp.fc1], block.norm2, rotation)
        _rotate_writer(block.mlp.fc2, block.layer_scale2, rotation)
    _rotate_readers(parts.heads.values(), final_norm, rotation)
    return result


def mean_keeping_rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix Q with ``Q 1 = 1``: float64 [width, width].

    It takes one random orthonormal basis to another, and both begin with the direction of ones. A Hadamard matrix,
    which others use, saves time only where a rotation is computed at run time, and one whose rows all have the same
    sum, as this condition asks, exists at most for square widths.
    """
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(2, width, width, dtype=torch.float64, generator=generator)
    bases[:, :, 0] = 1.0
    first, second = torch.linalg.qr(bases).Q
    return second @ first.T


def _final_norm(parts: ModelParts) -> nn.LayerNorm | None:
    """The norm in front of the heads.

    Raises:
        UnsupportedModelError: the model's ends do not commute with a rotation.
    """
    norms = {name: norm for name, norm in parts.norms.items() if not isinstance(norm, nn.Identity)}
    final = [norm for name, norm in norms.items() if name in ("norm", "fc_norm")]
    for name, norm in norms.items():
        if norm not in final:
            raise UnsupportedModelError(f"rotate: {name}: its gain stands in front of the residual stream")
        if not isinstance(norm, nn.LayerNorm):
            raise UnsupportedModelError(f"rotate: {name} must be a LayerNorm, got {type(norm).__name__}")
    if len(final) > 1:
        raise UnsupportedModelError("rotate: norm and fc_norm: a model with both has a gain between them")
    if parts.model.global_pool not in EXACT_POOLS:
        raise UnsupportedModelError(
            f"rotate: global_pool must be one of {EXACT_POOLS}, got {parts.model.global_pool!r}"
        )
    if not parts.heads:
        raise UnsupportedModelError("rotate: head: a model without a classifier would give rotated features")
    return final[0] if final else None


def _rotate_readers(linears: Iterable[nn.Linear], norm: nn.LayerNorm | None, rotation: Tensor) -> None:
    """``W (g LN(x) + b) + c`` to ``(W g Q^T) LN(Q x) + (W b + c)``; the norm keeps gain 1 and bias 0."""
    gain = None if norm is None else norm.weight
    shift = None if norm is None else norm.bias
    for linear in linears:
        weight = linear.weight.double()
        if shift is not None:
            _give_bias(linear)
            linear.bias.copy_(linear.bias.double() + weight @ shift.double())
        if gain is not None:
            weight = weight * gain.double()
        linear.weight.copy_(weight @ rotation.T)
    if gain is not None:
        gain.fill_(1.0)
    if shift is not None:
        shift.zero_()


def _rotate_writer(layer: nn.Linear | nn.Conv2d, layer_scale: Tensor | None, rotation: Tensor) -> None:
    """``s (W x + c)`` to ``Q s W x + Q s c``; the layer scale becomes 1."""
    scaled = rotation if layer_scale is None else rotation * layer_scale.double()
    if isinstance(layer, nn.Linear):
        _give_bias(layer)
    layer.weight.copy_((scaled @ layer.weight.double().flatten(1)).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(scaled @ layer.bias.double())
    if layer_scale is not None:
        layer_scale.fill_(1.0)


def _give_bias(linear: nn.Linear) -> None:
    """A bias of zeros where there is none. All linears of a block get one, as timm's constructor would give them."""
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))
