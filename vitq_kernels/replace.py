"""Integer linears for any model: no calibration, activations quantized per token in the call."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from vitq_kernels.nn import DynamicQuantLinear
from vitq_kernels.packing import pack_weight
from vitq_kernels.rounding import round_to_nearest, weight_scale
from vitq_kernels.spec import RowGroups, check_bits


@torch.no_grad()
def replace_linears(model: nn.Module, *, weight_bits: int = 8, exclude: Sequence[str] = ()) -> nn.Module:
    """Replaces every ``nn.Linear`` of any model by an integer one, in place, without calibration.

    Activations are quantized per token in the call (semantics S5). Subclasses of ``nn.Linear`` are left alone: their
    owners may read the weight in ways of their own.

    Args:
        model: any module tree.
        weight_bits: 2..8, one width for all.
        exclude: names or fnmatch patterns (``"head*"``) of linears to keep in float.

    Returns:
        The model; a bare ``nn.Linear`` is returned as its replacement.
    """
    check_bits(weight_bits, "weight_bits")
    if type(model) is nn.Linear:
        return _dynamic_linear("", model, weight_bits)
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and not any(fnmatch(name, pattern) for pattern in exclude)
    }
    if not linears:
        raise ValueError(f"model must contain an nn.Linear that is not excluded, got none in {type(model).__name__}")
    # All are made before the first takes its place: a bad weight leaves the model whole.
    replaced: dict[nn.Linear, DynamicQuantLinear] = {}
    for name, module in linears.items():
        if module not in replaced:
            replaced[module] = _dynamic_linear(name, module, weight_bits)
    for name, module in linears.items():
        model.set_submodule(name, replaced[module])
    for layer in model.modules():
        # The fused inference paths of torch's transformer read the weights of their linears; these flags turn them off.
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.activation_relu_or_gelu = 0
        elif isinstance(layer, nn.TransformerEncoder):
            layer.use_nested_tensor = False
    return model


def _dynamic_linear(name: str, linear: nn.Linear, bits: int) -> DynamicQuantLinear:
    for part, parameter in linear.named_parameters(name):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"model: weights must be finite, got NaN or Inf in {part}")
    weight = linear.weight.detach().float()
    groups = RowGroups.uniform(weight.shape[0], bits)
    row_bits = torch.full((weight.shape[0],), bits, device=weight.device)
    scale = weight_scale(weight, row_bits)
    codes = round_to_nearest(weight, scale, row_bits)
    bias = None if linear.bias is None else linear.bias.detach().float()
    return DynamicQuantLinear(pack_weight(codes, groups), scale, bias).train(linear.training)
