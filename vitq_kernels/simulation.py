"""The float model with a fake quantizer wherever a site quantizes: what papers measure, and what sensitivities need.

Nothing here executes integers. A fake quantizer is a module from a float tensor to the float tensor that its codes
stand for; nn.Identity leaves a tensor as it is, and with identities alone the model computes what the float model does.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.models import MergingParts, model_parts


class SimulatedLinear(nn.Module):
    """``input(x) weight^T + bias``; the weight holds dequantized numbers once a method has rounded it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.input: nn.Module = nn.Identity()  # fake quantizer of [..., K]
        self.register_buffer("weight", linear.weight.detach().clone())  # [N, K]
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())  # [N] or None

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """N."""
        return int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to [..., N]."""
        return F.linear(self.input(x), self.weight, self.bias)


class SimulatedPatchEmbed(nn.Module):
    """The patch convolution on fake-quantized pixels; a drop-in for timm's ``patch_embed.proj``."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.stride = conv.stride
        self.input: nn.Module = nn.Identity()  # fake quantizer of images [B, C, H, W]
        self.register_buffer("weight", conv.weight.detach().clone())  # [N, C, h, w]
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().clone())

    def forward(self, image: Tensor) -> Tensor:
        """Float [B, C, H, W] to [B, N, H // h, W // w]."""
        return F.conv2d(self.input(image), self.weight, self.bias, self.stride)


class SimulatedAttention(nn.Module):
    """Self-attention whose four inner tensors each pass a fake quantizer; a drop-in for timm's ``Attention``."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, num_heads: int, softmax_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.softmax_scale = softmax_scale
        self.qkv = SimulatedLinear(qkv)
        self.proj = SimulatedLinear(proj)
        self.query: nn.Module = nn.Identity()  # fake quantizers of [B, H, S, D]
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.probability: nn.Module = nn.Identity()  # of softmax's output [B, H, S, S], in [0, 1]

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Float [B, S, C] to [B, S, C].

        Raises:
            ValueError: an attention mask was given.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("SimulatedAttention: attn_mask and is_causal must be absent, got a mask")
        return self.attend(x, 0.0)

    def attend(self, x: Tensor, bias: Tensor | float) -> Tensor:
        """Float [B, S, C] to [B, S, C]; the bias is added to the logits [B, H, S, S]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.query(q) @ self.key(k).mT * self.softmax_scale + bias
        out = self.probability(scores.softmax(-1)) @ self.value(v)
        return self.proj(out.transpose(1, 2).flatten(2))


class SimulatedWindowAttention(SimulatedAttention):
    """Self-attention inside windows with a bias [H, S, S] of positions; a drop-in for timm's ``WindowAttention``."""

    def __init__(self, qkv: nn.Linear, proj: nn.Linear, num_heads: int, softmax_scale: float, bias: Tensor) -> None:
        super().__init__(qkv, proj, num_heads, softmax_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B * W, S, C] to the same, given what is added to the logits of each window, [W, S, S]."""
        bias = self.bias if mask is None else (self.bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.attend(x, bias)


@torch.no_grad()
def simulated(model: nn.Module) -> nn.Module:
    """A copy of a model in which every site of ``model_sites`` is a simulated module that quantizes nothing.

    Sites keep their names: ``patch_embed.proj``, ``blocks.0.attn.qkv``, ``blocks.0.mlp.fc1``, ``head``; the attention
    sites ``.qk`` and ``.av`` are the four quantizers of ``blocks.0.attn``. Norms, layer scales and biases are the
    copy's own, so a method may change them.

    Raises:
        UnsupportedModelError: a part of the model has no integer form and so no sites.
    """
    parts = model_parts(copy.deepcopy(model).requires_grad_(False).eval(), strict=True)
    result = parts.model
    result.set_submodule(parts.patch_name, SimulatedPatchEmbed(parts.patch_proj))
    for block in parts.blocks:
        attn = block.attn
        common = (attn.qkv, attn.proj, attn.num_heads, attn.softmax_scale)
        bias = attn.bias()  # of which the first pattern has no mask
        attention = SimulatedAttention(*common) if bias is None else SimulatedWindowAttention(*common, bias[0])
        result.set_submodule(f"{block.name}.attn", attention.eval())
        for name, linear in (("fc1", block.mlp.fc1), ("fc2", block.mlp.fc2)):
            result.set_submodule(f"{block.name}.mlp.{name}", SimulatedLinear(linear))
    for step in parts.steps:
        if isinstance(step, MergingParts):
            result.set_submodule(f"{step.name}.reduction", SimulatedLinear(step.reduction))
    for name, head in parts.heads.items():
        result.set_submodule(name, SimulatedLinear(head))
    return result.eval()
