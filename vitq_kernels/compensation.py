"""What a layer should put out on the quantized stream, and the weights that come closest to it.

Layers are rounded one after another on the inputs that the quantized model really makes. Those inputs already carry the
errors of the layers before; a least-squares change of the float weights makes good what a linear map can make good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.models import BlockParts
from vitq_kernels.observers import InputMoments

Stream = list[Tensor]  # one tensor a batch: codes or the residual stream of the model as far as it is converted


@dataclass(frozen=True)
class BlockOutputs:
    """What the float model computes inside a block, [B, S, ...] or maps [B, H, W, ...]."""

    qkv: Tensor  # [B, L, ...] of the padded map where attention is in windows
    proj: Tensor | None  # before the norm behind it, where there is one
    middle: Tensor  # the residual stream after attention
    fc1: Tensor  # before the activation
    fc2: Tensor | None  # as proj
    out: Tensor  # the residual stream behind the block


def float_block(block: BlockParts, x: Tensor) -> BlockOutputs:
    """The float block on its residual stream [B, S, C], or a map [B, H, W, C]."""
    attn, mlp = block.attn, block.mlp
    windows = attn.windows_of(x)
    y = _normed(x, block.before[0])
    qkv = attn.qkv(y if windows is None else windows.pad(y))
    q, k, v = attn.heads(qkv, windows)
    scale = attn.softmax_scale
    if isinstance(scale, Tensor):
        q, scale = q * scale, 1.0
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn.bias_of(windows), scale=scale)
    attended = attn.merged(attended, windows)
    proj = attn.proj(_normed(attended, attn.norm))
    middle = x + _normed(_scaled(proj, block.layer_scale1), block.behind[0])
    fc1 = mlp.fc1(_normed(middle, block.before[1]))
    fc2 = mlp.fc2(_normed(mlp.hidden(fc1), mlp.norm))
    out = middle + _normed(_scaled(fc2, block.layer_scale2), block.behind[1])
    return BlockOutputs(qkv, proj if block.post_norm else None, middle, fc1, fc2 if block.post_norm else None, out)


def _scaled(x: Tensor, layer_scale: Tensor | None) -> Tensor:
    return x if layer_scale is None else x * layer_scale


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x)


def mean_output(targets: Sequence[Tensor]) -> Tensor:
    """Mean of targets [..., N] over all tokens, float64 [N]."""
    totals = torch.stack([y.double().flatten(0, -2).sum(0) for y in targets])
    return totals.sum(0) / sum(y[..., 0].numel() for y in targets)


def compensated(
    weight: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    token_weights: Sequence[Tensor],
    moments: InputMoments,
    ridge: float,
) -> Tensor:
    """The weights nearest to ``weight`` whose outputs come nearest to the targets, both about their means.

    ``argmin_V sum_t a_t |y_t - V x_t|^2 / sum_t a_t + ridge * h * |V - W|^2`` with h the mean second moment of an input
    channel: W plus a ridge regression of what W leaves over. ERQ (Zhong et al., ICML 2024, Aqer) has this form for
    errors of activations alone, GPTAQ (Li et al., 2025, arXiv:2504.02692) without the ridge.

    Args:
        weight: float32 [N, K], for inputs in code units.
        inputs: batches [..., K] of codes less zero points, float32.
        targets: batches [..., N], float32.
        token_weights: batches [...], float32 > 0.
        moments: of the inputs with these weights.
        ridge: > 0; the larger the nearer to ``weight``.

    Returns:
        float32 [N, K].
    """
    centre, middle = moments.mean.float(), mean_output(targets).float()
    cross = torch.zeros_like(weight, dtype=torch.float64)
    for x, y, a in zip(inputs, targets, token_weights, strict=True):
        x = (x - centre).flatten(0, -2)
        left = (y - middle).flatten(0, -2) - x @ weight.t()
        cross += ((left * a.flatten()[:, None]).t() @ x).double()
    h = moments.covariance
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (ridge * h.diagonal().mean()).clamp_min(1e-30)
    return weight + torch.linalg.solve(h, cross.t() / moments.mass).t().float()
