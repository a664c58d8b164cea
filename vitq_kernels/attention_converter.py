"""The attention of a block to integers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vitq_kernels.compensation import BlockOutputs, Stream
from vitq_kernels.models import AttentionParts, BlockParts
from vitq_kernels.nn import (
    FloatNorm,
    InnerNorm,
    PositionBias,
    QuantAttention,
    QuantLinear,
    QuantWindowAttention,
    QueryKeyCodes,
)
from vitq_kernels.quantizers import (
    AffineQuantizer,
    affine_quantizer,
    log2_levels,
    log2_steps,
    query_key_scales,
)
from vitq_kernels.site_converter import SiteConverter, float_norm
from vitq_kernels.spec import MAX_BITS, MIN_BITS, QuantFormat
from vitq_kernels.windows import BIAS_LIMIT

# Logits that a bias must be able to say. They are 144 octaves and the levels of a probability have 8, so what is masked
# has none.
BIAS_REACH = 100.0


def convert_attention(
    sites: SiteConverter,
    block: BlockParts,
    quantizer: AffineQuantizer,
    inputs: Stream,
    stream: Stream,
    wanted: list[BlockOutputs],
    behind: FloatNorm | None,
) -> QuantAttention:
    """qkv, integer attention and proj (semantics S4); the stream moves on behind it.

    Keys are centred by their mean, which softmax does not see; values by the middle of their range, which comes
    back through proj's bias. Where q and k are normed or turned, or a norm stands before proj, that is float between
    integer products.

    Args:
        sites: what is known of the model.
        block: whose attention it is.
        quantizer: of its input.
        inputs: codes that enter it.
        stream: the residual stream that enters the block; the one behind attention afterwards.
        wanted: what the float block computes; empty without images.
        behind: the norm between its last linear and the stream, if there is one.
    """
    qkv_site, qk, av, proj_site = (f"{block.name}.attn.{s}" for s in ("qkv", "qk", "av", "proj"))
    attn, stats = block.attn, sites.stats
    heads, dim = attn.num_heads, attn.head_dim
    code_bits, av_bits = sites.bits[qk].activation, sites.bits[av].activation
    low, high = stats.qkv[qkv_site].choose(code_bits, sites.config)
    _, key_mean, _ = stats.mean_of_qkv(qkv_site).chunk(3)
    middle = ((low + high) / 2).chunk(3)[2]
    centre = torch.cat((torch.zeros_like(middle), key_mean, middle))
    radius = torch.maximum((low - centre).abs(), (high - centre).abs())
    q_scale, k_scale, score_scale = query_key_scales(*radius.chunk(3)[:2], heads, code_bits, _least_score_scale(attn))
    v_scale = affine_quantizer(-radius.chunk(3)[2], radius.chunk(3)[2], code_bits).scale

    padding = _zero_codes(quantizer)
    entering, targets = inputs, [w.qkv for w in wanted]
    if attn.windows is not None and attn.fused:
        entering = [attn.windows_of(x).pad(x, padding) for x in inputs]
    elif attn.windows is not None:  # padding is made behind the linear
        targets = [attn.windows_of(x).crop(y) for x, y in zip(inputs, targets, strict=bool(targets))]
    folded = sites.fold(qkv_site, attn.qkv, quantizer, entering, targets=targets)
    out_scale = torch.cat((q_scale, k_scale, v_scale))
    codes_of_qkv = None
    if attn.fused:
        qkv = QuantLinear(
            folded.weight,
            folded.multiplier(out_scale),
            folded.bias_q(centre),
            "codes",
            zero_point=torch.zeros_like(folded.zero_sum, dtype=torch.int32),
            out_bits=code_bits,
            input_bits=folded.input_bits,
        )
    else:
        value_centre = torch.cat((torch.zeros_like(middle), torch.zeros_like(middle), middle))
        qkv = sites.real_linear(folded, None, value_centre)
        codes_of_qkv = _query_key_codes(attn, (1.0 / out_scale.double()).float(), key_mean, code_bits)
        of_zero = torch.zeros_like(value_centre) if attn.qkv.bias is None else attn.qkv.bias.detach().float()
        padding = codes_of_qkv(of_zero - value_centre)
    tau_index = stats.tau_error[av][av_bits - MIN_BITS].argmin(0)
    tau = [log2_steps(av_bits)[i] for i in tau_index.tolist()]
    octaves = attn.scale_of_heads * math.log2(math.e)
    kappa = score_scale.double() * octaves / torch.tensor(tau, dtype=torch.float64, device=score_scale.device)
    # What attention puts out enters proj, or a norm before it, in 8 bits then.
    if attn.norm is None:
        norm, out = None, sites.quantizer(proj_site, "proj", shift=middle)
    else:
        low, high = stats.inputs[av].choose(MAX_BITS, sites.config)
        out = affine_quantizer(low - middle, high - middle, MAX_BITS)
        shift = middle.double() - out.scale.double() * out.zero_point
        written, into_proj = sites.norm(attn.norm, proj_site, "proj")
        norm = InnerNorm(out.scale, shift.float(), written)
    shape = (heads, dim)
    tables = (
        kappa.float(),
        torch.stack([log2_levels(av_bits, t) for t in tau]).to(kappa.device),
        (v_scale.double() / out.scale.double()).float().view(shape),
        out.zero_point.view(shape),
        out.bits,
    )
    # proj is qkv until the codes that enter it exist
    if attn.windows is None:
        bias = None if attn.grid is None else PositionBias(_score_units(attn, score_scale), attn.grid)
        result = QuantAttention(qkv, qkv, *tables, codes_of_qkv, norm, bias)
    else:
        bias_table = _score_units(attn, score_scale)
        result = QuantWindowAttention(qkv, qkv, *tables, bias_table, padding, attn.windows, codes_of_qkv)
    codes = [result.attend(x) if attn.rope is None else result.attend(x, attn.rope.table) for x in inputs]
    if norm is not None:
        out, middle = into_proj, torch.zeros_like(middle)
    ends = [(w.proj, w.middle) for w in wanted]
    result.proj = sites.branch_end(
        proj_site, attn.proj, out, codes, stream, ends, behind, block.layer_scale1, shift=middle
    )
    return result


def _least_score_scale(attn: AttentionParts) -> Tensor | float:
    """The smallest scale of a head's score at which its bias, in units of the score, stays within limits: [H]."""
    if attn.bias_table is None:
        return 0.0
    reach = attn.bias_table.detach().double().abs().amax(0).clamp_min(BIAS_REACH)
    return reach / (attn.scale_of_heads * BIAS_LIMIT)


def _score_units(attn: AttentionParts, score_scale: Tensor) -> Tensor:
    """The bias table in units of the integer score, int32 [T, H]."""
    units = attn.bias_table.detach().double() / (score_scale.double() * attn.scale_of_heads)
    return units.round().clamp(-BIAS_LIMIT, BIAS_LIMIT).int()


def _zero_codes(quantizer: AffineQuantizer) -> Tensor:
    """The codes of zero, or the nearest where a channel has none: int8 [K]."""
    fmt = QuantFormat(quantizer.bits)
    return quantizer.zero_point.clamp(fmt.qmin, fmt.qmax).to(torch.int8)


def _query_key_codes(attn: AttentionParts, inv_scale: Tensor, key_mean: Tensor, bits: int) -> QueryKeyCodes:
    norms = [None if norm is None else float_norm(norm) for norm in (attn.q_norm, attn.k_norm)]
    rope = (0, False) if attn.rope is None else (attn.rope.prefix, attn.rope.half)
    return QueryKeyCodes(attn.num_heads, inv_scale, key_mean, bits, *norms, *rope)
