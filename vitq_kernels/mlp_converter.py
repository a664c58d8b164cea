"""The MLP of a block to integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitq_kernels.compensation import BlockOutputs, Stream
from vitq_kernels.config import LEVEL_BITS
from vitq_kernels.folding import FoldedLinear
from vitq_kernels.levels import LevelHistogram, level_scale
from vitq_kernels.models import BlockParts
from vitq_kernels.nn import FloatNorm, HiddenCodes, QuantizeInput, QuantLinear, QuantMlp
from vitq_kernels.quantizers import AffineQuantizer
from vitq_kernels.site_converter import SiteConverter
from vitq_kernels.spec import MAX_BITS


def convert_mlp(
    sites: SiteConverter,
    block: BlockParts,
    quantizer: AffineQuantizer,
    inputs: Stream,
    stream: Stream,
    wanted: list[BlockOutputs],
    behind: FloatNorm | None,
) -> QuantMlp:
    """fc1 with GELU and channel-wise requantization in its epilogue, fc2 with the residual in its own.

    Another activation, a gate or a norm stands in float between real outputs of fc1 and the codes of fc2.

    The arguments are those of ``convert_attention``.
    """
    site1, site2 = f"{block.name}.mlp.fc1", f"{block.name}.mlp.fc2"
    folded = sites.fold(site1, block.mlp.fc1, quantizer, inputs, targets=[w.fc1 for w in wanted])
    between = None
    if block.mlp.gelu is None:
        between, hidden = _hidden_codes(sites, block)
        fc1 = sites.real_linear(folded, None)
    elif inputs and sites.config.gelu_levels and sites.bits[site2].activation <= LEVEL_BITS:
        fc1, hidden = _gelu_levels(sites, block, folded, inputs)
    else:
        hidden = sites.quantizer(site2, "fc2")
        fc1 = QuantLinear(
            folded.weight,
            folded.multiplier(),
            folded.bias_q(),
            "gelu",
            zero_point=hidden.zero_point,
            inv_scale=hidden.inv_scale,
            out_bits=hidden.bits,
            gelu=block.mlp.gelu,
            input_bits=folded.input_bits,
        )
    codes = [fc1(x) if between is None else between(fc1(x)) for x in inputs]
    ends = [(w.fc2, w.out) for w in wanted]
    fc2 = sites.branch_end(site2, block.mlp.fc2, hidden, codes, stream, ends, behind, block.layer_scale2)
    return QuantMlp(fc1, fc2, between)


def _hidden_codes(sites: SiteConverter, block: BlockParts) -> tuple[HiddenCodes, AffineQuantizer]:
    """What makes fc2's codes of fc1's real outputs, and their quantizer."""
    site, mlp = f"{block.name}.mlp.fc2", block.mlp
    if mlp.norm is not None:
        codes, hidden = sites.norm(mlp.norm, site, "fc2")
    else:
        hidden = sites.quantizer(site, "fc2")
        codes = QuantizeInput(hidden.inv_scale, hidden.zero_point, hidden.bits)
    return HiddenCodes(mlp.activation, mlp.gate, codes), hidden


def _gelu_levels(
    sites: SiteConverter, block: BlockParts, folded: FoldedLinear, inputs: Stream
) -> tuple[QuantLinear, AffineQuantizer]:
    """fc1 whose codes choose among 2^b levels of the block's own, those of least error at fc2's output.

    Channels keep their ranges (scale s_n = absmax / 127); an error of channel n counts ``(s_n |fc2[:, n]|)^2``.
    """
    site = f"{block.name}.mlp.fc2"
    ranges = sites.stats.inputs[site]
    scale = level_scale(ranges.low[-1], ranges.high[-1])
    hidden = AffineQuantizer(scale, torch.zeros_like(scale, dtype=torch.int32), MAX_BITS)
    channel_weight = (block.mlp.fc2.weight.detach().float() * scale).square().sum(0)
    real = sites.real_linear(folded, None)
    histogram = LevelHistogram()
    for x in inputs:
        units = F.gelu(real(x), approximate=block.mlp.gelu) / scale
        histogram.add(units, sites.token_weights(x)[..., None] * channel_weight)
    levels = histogram.best_levels(1 << sites.bits[site].activation).to(scale.device)
    fc1 = QuantLinear(
        folded.weight,
        folded.multiplier(),
        folded.bias_q(),
        "gelu levels",
        inv_scale=hidden.inv_scale,
        levels=levels,
        gelu=block.mlp.gelu,
        input_bits=folded.input_bits,
    )
    return fc1, hidden
