"""The integer modules of a model with the right shapes and no numbers, for a checkpoint to fill."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from vitq_kernels.models import AttentionParts, BlockParts, MergingParts, model_parts
from vitq_kernels.nn import (
    FloatNorm,
    HiddenCodes,
    InnerNorm,
    PositionBias,
    QuantAttention,
    QuantBlock,
    QuantizeInput,
    QuantLayerNorm,
    QuantLinear,
    QuantMlp,
    QuantPatchEmbed,
    QuantPatchMerging,
    QuantPostNormBlock,
    QuantPostNormMerging,
    QuantRmsNorm,
    QuantWindowAttention,
    QueryKeyCodes,
)
from vitq_kernels.nn.linear import Epilogue
from vitq_kernels.packing import PackedWeight
from vitq_kernels.spec import MAX_BITS, BitAllocation, RowGroups, SiteBits


def quantized_skeleton(model: nn.Module, allocation: BitAllocation, tensors: Container[str] = ()) -> nn.Module:
    """Replaces the modules of a float model by integer ones on the meta device, in place.

    What ``converter.py`` builds from statistics, here from widths alone: names, shapes and dtypes of the buffers agree.

    Args:
        model: the float model.
        allocation: the widths.
        tensors: names of the tensors that will fill it: those of levels say which fc1 have some.
    """
    parts = model_parts(model)
    bits = allocation.sites
    site = bits[parts.patch_name]
    conv = parts.patch_proj
    cols = conv.weight[0].numel()
    model.set_submodule(parts.patch_name, QuantPatchEmbed(_float_linear(site, cols), conv.kernel_size))
    for step in parts.steps:
        if isinstance(step, BlockParts):
            model.set_submodule(step.name, _block(step, allocation, f"{step.name}.mlp.fc1.levels" in tensors))
        elif isinstance(step, MergingParts):
            model.set_submodule(step.name, _merging(step, bits))
    for name, head in parts.heads.items():
        model.set_submodule(name, _float_linear(bits[name], head.in_features))
    return model


def _block(block: BlockParts, allocation: BitAllocation, gelu_levels: bool) -> QuantBlock | QuantPostNormBlock:
    def at(suffix: str) -> SiteBits:
        return allocation.sites[f"{block.name}.{suffix}"]

    attn_parts, mlp_parts = block.attn, block.mlp
    heads, dim = attn_parts.num_heads, attn_parts.head_dim
    qkv, qk, av, proj = at("attn.qkv"), at("attn.qk"), at("attn.av"), at("attn.proj")
    fc1, fc2 = at("mlp.fc1"), at("mlp.fc2")
    inner = attn_parts.norm
    end: Epilogue = "real" if block.post_norm else "residual"
    codes = None if attn_parts.fused else _query_key(attn_parts, qk.activation)
    common = (
        _linear(qkv, attn_parts.qkv.in_features, "codes" if attn_parts.fused else "real", qk.activation),
        _linear(proj, attn_parts.proj.in_features, end),
        _empty(heads),
        _empty(heads, 1 << av.activation, dtype=torch.uint8),
        _empty(heads, dim),
        _empty(heads, dim, dtype=torch.int32),
        proj.activation if inner is None else MAX_BITS,
    )
    if attn_parts.windows is None:
        norm = None if inner is None else InnerNorm(_empty(heads * dim), _empty(heads * dim), _norm(inner, proj))
        bias = None if attn_parts.grid is None else PositionBias(_bias_table(attn_parts), attn_parts.grid)
        attn = QuantAttention(*common, codes, norm, bias)
    else:
        padding = _empty(attn_parts.qkv.in_features if codes is None else 3 * heads * dim, dtype=torch.int8)
        attn = QuantWindowAttention(*common, _bias_table(attn_parts), padding, attn_parts.windows, codes)
    epilogue: Epilogue = "real" if mlp_parts.gelu is None else "gelu levels" if gelu_levels else "gelu"
    hidden = None
    if mlp_parts.gelu is None:
        width = mlp_parts.fc2.in_features
        hidden_codes = _quantize_input(width, fc2) if mlp_parts.norm is None else _norm(mlp_parts.norm, fc2)
        hidden = HiddenCodes(mlp_parts.activation, mlp_parts.gate, hidden_codes)
    mlp = QuantMlp(
        _linear(fc1, mlp_parts.fc1.in_features, epilogue, fc2.activation, mlp_parts.gelu or "none"),
        _linear(fc2, mlp_parts.fc2.in_features, end, input_bits=MAX_BITS if gelu_levels else None),
        hidden,
    )
    if block.post_norm:
        codes1, codes2 = (
            _quantize_input(linear.in_features, site) for linear, site in ((attn_parts.qkv, qkv), (mlp_parts.fc1, fc1))
        )
        return QuantPostNormBlock(codes1, attn, _float_norm(block.norm1), codes2, mlp, _float_norm(block.norm2))
    return QuantBlock(_norm(block.norm1, qkv), attn, _norm(block.norm2, fc1), mlp)


def _merging(merging: MergingParts, bits: Mapping[str, SiteBits]) -> QuantPatchMerging | QuantPostNormMerging:
    name, linear = next(iter(merging.linears.items()))
    reduction = _linear(bits[name], linear.in_features, "real")
    if merging.post_norm:
        codes = _quantize_input(linear.in_features, bits[name])
        return QuantPostNormMerging(codes, reduction, _float_norm(merging.norm))
    return QuantPatchMerging(_norm(merging.norm, bits[name]), reduction)


def _norm(module: nn.Module, site: SiteBits) -> QuantLayerNorm | QuantRmsNorm:
    channels = module.normalized_shape[0]
    if isinstance(module, nn.LayerNorm):
        return QuantLayerNorm(_empty(channels), _empty(channels), module.eps, site.activation)
    return QuantRmsNorm(_float_norm(module), _quantize_input(channels, site))


def _float_norm(module: nn.Module) -> FloatNorm:
    weight, bias = (None if t is None else _empty(len(t)) for t in (module.weight, getattr(module, "bias", None)))
    return FloatNorm("layer" if isinstance(module, nn.LayerNorm) else "rms", weight, bias, module.eps)


def _query_key(attn: AttentionParts, bits: int) -> QueryKeyCodes:
    width = attn.num_heads * attn.head_dim
    norms = [None if norm is None else _float_norm(norm) for norm in (attn.q_norm, attn.k_norm)]
    rope = (0, False) if attn.rope is None else (attn.rope.prefix, attn.rope.half)
    return QueryKeyCodes(attn.num_heads, _empty(3 * width), _empty(width), bits, *norms, *rope)


def _bias_table(attn: AttentionParts) -> Tensor:
    assert attn.bias_table is not None
    return _empty(*attn.bias_table.shape, dtype=torch.int32)


def _quantize_input(channels: int, site: SiteBits) -> QuantizeInput:
    return QuantizeInput(_empty(channels), _empty(channels, dtype=torch.int32), site.activation)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _packed(groups: RowGroups | None, cols: int) -> PackedWeight:
    assert groups is not None
    data = _empty(groups.weight_bytes(cols), dtype=torch.uint8)
    return PackedWeight(data, _empty(groups.order_bytes, dtype=torch.uint8), groups, cols)


def _linear(
    site: SiteBits,
    cols: int,
    epilogue: Epilogue,
    out_bits: int = MAX_BITS,
    gelu: str = "none",
    input_bits: int | None = None,  # None: the site's own width
) -> QuantLinear:
    weight = _packed(site.weight, cols)
    rows = weight.groups.rows
    coded = epilogue in ("codes", "gelu")
    return QuantLinear(
        weight,
        _empty(rows),
        _empty(rows, dtype=torch.int32),
        epilogue,
        zero_point=_empty(rows, dtype=torch.int32) if coded else None,
        inv_scale=_empty(rows) if epilogue in ("gelu", "gelu levels") else None,
        levels=_empty(1 << out_bits, dtype=torch.int8) if epilogue == "gelu levels" else None,
        out_bits=out_bits,
        gelu=gelu,
        input_bits=input_bits or site.activation,
    )


def _float_linear(site: SiteBits, cols: int) -> QuantLinear:
    weight = _packed(site.weight, cols)
    rows = weight.groups.rows
    quantize_input = _quantize_input(cols, site)
    multiplier, bias_q = _empty(rows), _empty(rows, dtype=torch.int32)
    return QuantLinear(weight, multiplier, bias_q, "real", input_bits=site.activation, quantize_input=quantize_input)
