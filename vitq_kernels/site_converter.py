"""One linear or norm of a model to its integer form, with what conversion knows of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitq_kernels.calibration import CalibrationStats
from vitq_kernels.compensation import Stream, compensated, mean_output
from vitq_kernels.config import MINMAX_BITS, QuantConfig
from vitq_kernels.folding import FoldedLinear, fold_linear
from vitq_kernels.models import ModelParts
from vitq_kernels.nn import FloatNorm, QuantizeInput, QuantLayerNorm, QuantLinear, QuantRmsNorm
from vitq_kernels.observers import InputMoments
from vitq_kernels.quantizers import AffineQuantizer, affine_quantizer
from vitq_kernels.spec import BitAllocation, SiteKind

# Channels of the last MLP and of the pooled features answer to single classes, and a few dozen images do not show most
# classes: new images leave the calibrated ranges. ViT-Tiny, only the last fc2 input at 8 bits: KL .0019 with the ranges
# as calibrated, .0003 with twice as wide ones. Below 6 bits there is no resolution to spare.
CLASS_MARGIN = 2.0


class SiteConverter:
    """Statistics, widths and settings of one conversion, and what they make of a site."""

    def __init__(
        self, parts: ModelParts, stats: CalibrationStats, allocation: BitAllocation, config: QuantConfig
    ) -> None:
        self.parts = parts
        self.stats = stats
        self.bits = allocation.sites
        self.config = config
        self.class_sites = {f"{parts.blocks[-1].name}.mlp.fc2", *parts.heads}

    def quantizer(self, site: str, kind: SiteKind, shift: Tensor | float = 0.0) -> AffineQuantizer:
        """Of a linear's input; ``shift`` [K] is what the producer takes off each channel."""
        bits = self.bits[site].activation
        low, high = self.stats.inputs[site].choose(bits, self.config)
        if site in self.class_sites and bits >= MINMAX_BITS:
            middle, reach = (low + high) / 2, (high - low) / 2 * CLASS_MARGIN
            # At least as far as the typical channel, either side of zero: from one image every range is a point.
            reach = torch.maximum(reach, middle.abs() + torch.maximum(low.abs(), high.abs()).median())
            low, high = middle - reach, middle + reach
        return affine_quantizer(low - shift, high - shift, bits, self.config.exponent(kind, bits))

    def fold(
        self,
        site: str,
        module: nn.Linear | nn.Conv2d,
        quantizer: AffineQuantizer,
        inputs: Stream,
        *,
        targets: Stream | None = None,
        layer_scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> FoldedLinear:
        """A float linear under its site's widths.

        Args:
            site: name.
            module: the float layer.
            quantizer: of its input.
            inputs: codes that the quantized model makes, [..., K].
            targets: what should come out of these inputs, [..., N], or None for what the float layer makes of them.
            layer_scale: [N], folded in.
            shift: [K], what the input lacks of its float values.
        """
        weight = module.weight.detach().flatten(1).float()
        bias = None if module.bias is None else module.bias.detach().float()
        if shift is not None:
            bias = weight @ shift + (0.0 if bias is None else bias)
        mean = self.stats.output_mean[site]
        if layer_scale is not None:
            weight = weight * layer_scale[:, None]
            bias = None if bias is None else bias * layer_scale
            mean = mean * layer_scale
        groups = self.bits[site].weight
        assert groups is not None
        numbers = [(codes.int() - quantizer.zero_point).float() for codes in inputs]
        token_weights = [self.token_weights(x) for x in inputs]
        moments = InputMoments.empty(quantizer.scale.numel(), quantizer.scale.device) if inputs else None
        for x, a in zip(numbers, token_weights, strict=True):
            moments.add(x.flatten(0, -2), a.flatten())
        if targets and self.config.compensation is not None and self.config.bias_correction:
            folded = weight * quantizer.scale
            folded = compensated(folded, numbers, targets, token_weights, moments, self.config.compensation)
            weight, mean = folded / quantizer.scale, mean_output(targets)
        return fold_linear(
            site,
            weight,
            bias,
            quantizer,
            groups,
            moments=moments,
            output_mean=mean if self.config.bias_correction else None,
            use_gptq=self.config.gptq,
            sweeps=self.config.sweeps,
        )

    def token_weights(self, codes: Tensor) -> Tensor:
        """How much each token of [..., K] counts, [...]: those that the classifier reads count more."""
        weight = torch.ones(codes.shape[:-1], device=codes.device)
        if codes.dim() == 3:
            weight[:, : self.parts.read_tokens] = self.config.class_token_weight
        return weight

    @staticmethod
    def real_linear(
        folded: FoldedLinear, quantize_input: QuantizeInput | None, centre: Tensor | None = None
    ) -> QuantLinear:
        """A linear to float, less ``centre`` [N], from float or, without a quantizer, from codes."""
        return QuantLinear(
            folded.weight,
            folded.multiplier(),
            folded.bias_q(centre),
            "real",
            input_bits=folded.input_bits,
            quantize_input=quantize_input,
        )

    def branch_end(
        self,
        site: str,
        module: nn.Linear,
        quantizer: AffineQuantizer,
        codes: Stream,
        stream: Stream,
        wanted: Sequence[tuple[Tensor | None, Tensor]],
        norm: FloatNorm | None,
        layer_scale: Tensor | None,
        shift: Tensor | None = None,
    ) -> QuantLinear:
        """The linear at the end of a branch; the stream moves on behind the branch.

        It adds to the residual stream or, with a norm behind it, is to real numbers.

        Args:
            site, module, quantizer, layer_scale, shift: as of ``fold``.
            codes: that enter it.
            stream: the residual stream that the branch is added to.
            wanted: of the float model, what the linear puts out (read where there is a norm) and the stream behind it.
            norm: what stands between the linear and the stream; then there is no layer scale.
        """
        if norm is None:
            # What the residual stream lacks, the errors of the blocks before included.
            targets = [after - x for (_, after), x in zip(wanted, stream, strict=bool(wanted))]
        else:
            targets = [out for out, _ in wanted if out is not None]
        folded = self.fold(site, module, quantizer, codes, targets=targets, layer_scale=layer_scale, shift=shift)
        if norm is not None:
            linear = self.real_linear(folded, None)
            stream[:] = [x + norm(linear(c)).to(x.dtype) for c, x in zip(codes, stream, strict=True)]
            return linear
        linear = QuantLinear(
            folded.weight, folded.multiplier(), folded.bias_q(), "residual", input_bits=folded.input_bits
        )
        stream[:] = map(linear, codes, stream)
        return linear

    def norm(
        self, norm: nn.Module | None, site: str, kind: SiteKind
    ) -> tuple[QuantLayerNorm | QuantRmsNorm | QuantizeInput, AffineQuantizer]:
        """A norm that writes the codes of ``site``: channel-wise scales cost nothing, the site's columns carry them.

        Without a norm, what writes the codes alone.
        """
        q = self.quantizer(site, kind)
        if norm is None:
            return QuantizeInput(q.inv_scale, q.zero_point, q.bits), q
        if not isinstance(norm, nn.LayerNorm):
            return QuantRmsNorm(float_norm(norm), QuantizeInput(q.inv_scale, q.zero_point, q.bits)), q
        gamma = torch.ones_like(q.scale) if norm.weight is None else norm.weight.detach().float()
        beta = torch.zeros_like(q.scale) if norm.bias is None else norm.bias.detach().float()
        offset = beta.double() / q.scale.double() + q.zero_point
        return QuantLayerNorm((gamma.double() / q.scale.double()).float(), offset.float(), norm.eps, q.bits), q


def float_norm(norm: nn.Module) -> FloatNorm:
    """A LayerNorm or RMSNorm with numbers of its own in float32."""
    weight, bias = (None if t is None else t.detach().float() for t in (norm.weight, getattr(norm, "bias", None)))
    return FloatNorm("layer" if isinstance(norm, nn.LayerNorm) else "rms", weight, bias, norm.eps)
