"""The float model with a fake quantizer wherever a site quantizes: what papers measure, and what sensitivities need.

Nothing here executes integers. A fake quantizer is a module from a float tensor to the float tensor that its codes
stand for; nn.Identity leaves a tensor as it is, and with identities alone the model computes what the float model does.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.activations import hidden_features
from vitq_kernels.models import AttentionParts, MergingParts, MlpParts, model_parts
from vitq_kernels.rotary import rotated, with_prefix


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
    """Self-attention whose four inner tensors each pass a fake quantizer; a drop-in for timm's modules."""

    def __init__(self, attn: AttentionParts) -> None:
        super().__init__()
        self.num_heads = attn.num_heads
        if isinstance(attn.softmax_scale, Tensor):
            self.register_buffer("softmax_scale", attn.softmax_scale)  # [H, 1, 1]
        else:
            self.softmax_scale = attn.softmax_scale
        self.qkv = SimulatedLinear(attn.qkv)
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.rope = None if attn.rope is None else (attn.rope.prefix, attn.rope.half)
        self.proj = SimulatedLinear(attn.proj)
        self.query: nn.Module = nn.Identity()  # fake quantizers of [B, H, S, D]
        self.key: nn.Module = nn.Identity()
        self.value: nn.Module = nn.Identity()
        self.probability: nn.Module = nn.Identity()  # of softmax's output [B, H, S, S], in [0, 1]
        bias = attn.bias()  # of which the first pattern has no mask
        self.register_buffer("bias", None if bias is None else bias[0])  # [H, S, S] or None

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        """Float [B, S, C] to [B, S, C]; ``rope`` as timm passes it, ``shared_rel_pos_bias`` a part of the bias here.

        Raises:
            ValueError: an attention mask was given.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("SimulatedAttention: attn_mask and is_causal must be absent, got a mask")
        return self.attend(x, 0.0 if self.bias is None else self.bias, rope)

    def attend(self, x: Tensor, bias: Tensor | float, rope: Tensor | None = None) -> Tensor:
        """Float [B, S, C] to [B, S, C]; the bias is added to the logits [B, H, S, S]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
        if self.rope is not None and rope is not None:
            prefix, half = self.rope
            table = with_prefix(rope.to(x.dtype), prefix)
            q, k = rotated(q, table, half), rotated(k, table, half)
        scores = self.query(q) @ self.key(k).mT * self.softmax_scale + bias
        out = (self.probability(scores.softmax(-1)) @ self.value(v)).transpose(1, 2).flatten(2)
        return self.proj(out if self.norm is None else self.norm(out))


class SimulatedWindowAttention(SimulatedAttention):
    """Self-attention inside windows; a drop-in for timm's ``WindowAttention``."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows [B * W, S, C] to the same, given what is added to the logits of each window, [W, S, S]."""
        bias = self.bias if mask is None else (self.bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        return self.attend(x, bias)


class SimulatedMlp(nn.Module):
    """An MLP whose fc1 is put together of several layers, as of ``MlpParts``; a drop-in for timm's ``SwiGLU``."""

    def __init__(self, mlp: MlpParts) -> None:
        super().__init__()
        self.fc1 = SimulatedLinear(mlp.fc1)
        self.fc2 = SimulatedLinear(mlp.fc2)
        self.norm = mlp.norm
        self.activation, self.gate = mlp.activation, mlp.gate

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, S, C] to [B, S, C]."""
        x = hidden_features(self.fc1(x), self.activation, self.gate)
        return self.fc2(x if self.norm is None else self.norm(x))


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
        make = SimulatedAttention if block.attn.windows is None else SimulatedWindowAttention
        result.set_submodule(f"{block.name}.attn", make(block.attn).eval())
        if block.mlp.fc1_reader is None:
            for name, linear in (("fc1", block.mlp.fc1), ("fc2", block.mlp.fc2)):
                result.set_submodule(f"{block.name}.mlp.{name}", SimulatedLinear(linear))
        else:
            result.set_submodule(f"{block.name}.mlp", SimulatedMlp(block.mlp).eval())
    for step in parts.steps:
        if isinstance(step, MergingParts):
            result.set_submodule(f"{step.name}.reduction", SimulatedLinear(step.reduction))
    for name, head in parts.heads.items():
        result.set_submodule(name, SimulatedLinear(head))
    return result.eval()
