"""Layers of Hugging Face transformers as timm's: q, k and v in one linear, behind the signature their encoder calls.

The names of modules are those of transformers 5.24.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import LayerScale, SwiGLU
from timm.layers.activations import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vitq_kernels.models.parts import UnsupportedModelError

# By the class of transformers' activation. An activation that is not here goes into the block as it is.
ACTIVATIONS = {
    "GELUActivation": lambda: nn.GELU(),
    "NewGELUActivation": lambda: nn.GELU(approximate="tanh"),
    "PytorchGELUTanh": lambda: nn.GELU(approximate="tanh"),
    "GELUTanh": lambda: nn.GELU(approximate="tanh"),
    "QuickGELUActivation": lambda: QuickGELU(),
}


class LayerOfBlock(nn.Module):
    """Mixin: a layer of transformers around a block of timm or of ``vitq_kernels.nn``.

    A subclass also inherits from the layer that it replaces: transformers records ``hidden_states`` by that class.
    """

    def __init__(self, block: nn.Module) -> None:
        nn.Module.__init__(self)  # not the layer's: it would make the layer's own modules
        self.block = block

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """The residual stream [B, S, C] to the residual stream, as transformers calls it.

        Raises:
            ValueError: an attention mask was given; integer attention has none.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask must be None, got a mask {list(attention_mask.shape)}")
        return self.block(hidden_states)


@dataclass(frozen=True)
class LayerNames:
    """Where the modules of a layer are."""

    attention: str
    out: str
    norm1: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None


def twin(model: nn.Module, *, layers_are_replaced: bool = True) -> nn.Module:
    """A copy of the module tree on the same parameters and buffers; what replaces a module of one leaves the other.

    ``layers_are_replaced``: those whose outputs transformers records will be, and the new ones are to be hooked again.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for module in result.modules():
        # transformers hooks the layers in the first call that asks for their outputs
        if layers_are_replaced and getattr(module, "_output_capturing_hooks_installed", False):
            module._output_capturing_hooks_installed = False
    return result


def timm_block(name: str, layer: nn.Module, names: LayerNames) -> Block:
    """The same computation as timm's Block, in eval mode, on the layer's own parameters but for q, k and v.

    Raises:
        UnsupportedModelError: the layer is not laid out as ``names`` says, or computes something else.
    """
    try:
        return _timm_block(name, layer, names)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{name}: {type(layer).__name__} is not laid out as in transformers 5.24: {error}"
        ) from error


def _timm_block(name: str, layer: nn.Module, names: LayerNames) -> Block:
    attn, norm1 = getattr(layer, names.attention), getattr(layer, names.norm1)
    heads = getattr(attn, "num_attention_heads", None) or attn.num_heads
    scale = getattr(attn, "scaling", None) or attn.scale
    if scale != attn.head_dim**-0.5:
        raise UnsupportedModelError(f"{name}: attention scale must be head_dim ** -0.5, got {scale}")
    dim = norm1.normalized_shape[0]
    with torch.device("meta"):  # every parameter is replaced
        block = Block(dim, 1)
    block.norm1, block.norm2 = norm1, getattr(layer, names.norm2)
    block.attn.num_heads, block.attn.head_dim, block.attn.attn_dim = heads, attn.head_dim, heads * attn.head_dim
    block.attn.scale = scale
    block.attn.qkv = fused_linear(f"{name}.{names.attention}", attn.q_proj, attn.k_proj, attn.v_proj)
    block.attn.proj = getattr(attn, names.out)
    block.mlp = timm_mlp(layer.mlp, block.mlp)
    for ours, theirs in (("ls1", names.scale1), ("ls2", names.scale2)):
        if theirs is not None:
            scaled = LayerScale(dim, device="meta")
            scaled.gamma = getattr(layer, theirs).lambda1
            setattr(block, ours, scaled)
    return block.train(layer.training)


def timm_mlp(mlp: nn.Module, result: nn.Module) -> nn.Module:
    """timm's Mlp, or its SwiGLU where the layer has a gate."""
    if hasattr(mlp, "gate_proj"):
        with torch.device("meta"):
            gated = SwiGLU(1)
        gated.fc1_g, gated.fc1_x, gated.fc2 = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        return gated
    result.fc1, result.fc2 = mlp.fc1, mlp.fc2
    made = ACTIVATIONS.get(type(mlp.activation_fn).__name__)
    result.act = mlp.activation_fn if made is None else made()
    return result


def fused_linear(name: str, *linears: nn.Linear) -> nn.Linear:
    """One linear whose rows are those of all, with a bias if one of them has it.

    Raises:
        UnsupportedModelError: one is no nn.Linear.
    """
    for linear in linears:
        if type(linear) is not nn.Linear:  # a subclass may compute something else with its weight
            raise UnsupportedModelError(f"{name}: q, k and v must be nn.Linear, got {type(linear).__name__}")
    weight = torch.cat([linear.weight.detach() for linear in linears])
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=linears[0].weight.requires_grad)
    if any(linear.bias is not None for linear in linears):
        rows = [
            torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach() for linear in linears
        ]
        result.bias = nn.Parameter(torch.cat(rows), requires_grad=linears[0].weight.requires_grad)
    return result
