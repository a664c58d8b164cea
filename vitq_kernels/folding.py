"""A linear layer in integers: bias, zero points and input scales folded into weight, multiplier and ``bias_q``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitq_kernels.observers import InputMoments
from vitq_kernels.packing import PackedWeight, pack_weight
from vitq_kernels.quantizers import AffineQuantizer
from vitq_kernels.rounding import gptq, refine, round_to_nearest, weight_scale
from vitq_kernels.spec import QuantFormat, RowGroups


@dataclass(frozen=True)
class FoldedLinear:
    """A linear in integers: ``real[n] = scale[n] * sum_k w[n, k] * (q_k - z_k) + bias[n]`` (semantics S2)."""

    site: str
    weight: PackedWeight
    scale: Tensor  # float64 [N], real units per accumulator unit
    bias: Tensor  # float64 [N], real units
    zero_sum: Tensor  # int64 [N], sum_k z_k * w[n, k]
    input_bits: int  # width of q

    def multiplier(self, out_scale: Tensor | None = None) -> Tensor:
        """``m[n]``: output codes of ``out_scale`` (or real units) per accumulator unit, float32 [N]."""
        return (self.scale if out_scale is None else self.scale / out_scale.double()).float()

    def bias_q(self, centre: Tensor | None = None) -> Tensor:
        """``rint((bias - centre) / scale) - zero_sum``, int32 [N].

        Raises:
            ValueError: it, or an accumulator that starts from it, does not fit int32.
        """
        bias = self.bias if centre is None else self.bias - centre.double()
        value = (bias / self.scale).round() - self.zero_sum.double()
        if bool((value.abs() >= 2**31 - 2**14 * self.weight.cols).any()):
            row = int(value.abs().argmax())
            raise ValueError(f"{self.site}: bias of row {row} must fit int32 accumulator units, got {value[row]:.4g}")
        return value.int()


def fold_linear(
    site: str,
    weight: Tensor,
    bias: Tensor | None,
    quantizer: AffineQuantizer,
    groups: RowGroups,
    *,
    moments: InputMoments | None = None,
    output_mean: Tensor | None = None,
    use_gptq: bool = True,
    sweeps: int = 0,
) -> FoldedLinear:
    """Quantizes a weight for inputs that ``quantizer`` encodes; the columns carry the input's scale.

    Args:
        site: name, for messages.
        weight: [N, K]; bias: [N] or None.
        quantizer: of the input, K channels.
        groups: widths of the rows.
        moments: of the input codes less their zero points; without them weights round to nearest.
        output_mean: [N], the float model's mean output: the bias is set so that the mean on these moments equals it.
        use_gptq: round against the moments.
        sweeps: of coordinate descent after that.
    """
    folded = weight.float() * quantizer.scale
    row_bits = torch.tensor(groups.row_bits(), device=weight.device)
    # Where inputs hardly vary their scales, and so the accumulator's unit, are too fine for the bias. A 2^-29th of what
    # bias and zero points come to is still far below all that such a row can say.
    offset = folded.abs() @ quantizer.zero_point.abs().float()
    for vector in (bias, output_mean):
        offset = offset if vector is None else offset + vector.float().abs()
    scale = torch.maximum(weight_scale(folded, row_bits), offset / 2**29)
    if moments is not None and use_gptq:
        codes = gptq(folded, scale, row_bits, moments.covariance)
        codes = refine(folded, scale, row_bits, codes, moments.covariance, sweeps)
    else:
        codes = round_to_nearest(folded, scale, row_bits)
    real_bias = torch.zeros_like(scale).double() if bias is None else bias.double()
    # What all codes of a channel that stays away from zero have in common passes through the exact weight: beside a
    # channel that hardly varies, its column may well round to zero.
    fmt, zero_point = QuantFormat(quantizer.bits), quantizer.zero_point.double()
    common = torch.zeros_like(zero_point).clamp(min=fmt.qmin - zero_point, max=fmt.qmax - zero_point)
    real_bias = real_bias + (folded.double() - codes.double() * scale.double()[:, None]) @ common
    if moments is not None and output_mean is not None:
        real_bias = output_mean.double() - scale.double() * (codes.double() @ moments.mean)
    zero_sum = codes.long() @ quantizer.zero_point.long()
    return FoldedLinear(site, pack_weight(codes, groups), scale.double(), real_bias, zero_sum, quantizer.bits)
