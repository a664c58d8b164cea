"""Float modules to integer modules, one transformer block after another on the stream of the blocks before it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.calibration import CalibrationStats
from vitq_kernels.compensation import BlockOutputs, compensated, float_block, mean_output
from vitq_kernels.config import LEVEL_BITS, MINMAX_BITS, QuantConfig
from vitq_kernels.folding import FoldedLinear, fold_linear
from vitq_kernels.levels import LevelHistogram, level_scale
from vitq_kernels.models import BlockParts, VitParts
from vitq_kernels.nn import (
    QuantAttention,
    QuantBlock,
    QuantizeInput,
    QuantLayerNorm,
    QuantLinear,
    QuantMlp,
    QuantPatchEmbed,
    flatten_patches,
)
from vitq_kernels.observers import InputMoments
from vitq_kernels.quantizers import (
    AffineQuantizer,
    affine_quantizer,
    log2_levels,
    log2_steps,
    query_key_scales,
)
from vitq_kernels.reconstruction import reconstruct
from vitq_kernels.spec import MAX_BITS, MIN_BITS, BitAllocation, SiteKind

# Channels of the last MLP and of the pooled features answer to single classes, and a few dozen images do not show most
# classes: new images leave the calibrated ranges. ViT-Tiny, only the last fc2 input at 8 bits: KL .0019 with the ranges
# as calibrated, .0003 with twice as wide ones. Below 6 bits there is no resolution to spare.
CLASS_MARGIN = 2.0

Stream = list[Tensor]  # one tensor a batch: codes or the residual stream of the model as far as it is converted


class Converter:
    """Turns the parts of one model into integer modules in forward order, each on the stream of those before it."""

    def __init__(
        self, parts: VitParts, stats: CalibrationStats, allocation: BitAllocation, config: QuantConfig, images: Stream
    ) -> None:
        self.parts = parts
        self.stats = stats
        self.bits = allocation.sites
        self.config = config
        self.images = images
        self.float_stream: Stream = []  # what the float model has where the quantized one has its stream
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

    def patch_embed(self) -> QuantPatchEmbed:
        """The patch convolution; its input quantizer is per image channel."""
        conv, site = self.parts.patch_proj, "patch_embed.proj"
        q = self.quantizer(site, "patch_embed")
        area = math.prod(conv.kernel_size)
        q = AffineQuantizer(q.scale.repeat_interleave(area), q.zero_point.repeat_interleave(area), q.bits)
        quantize_input = QuantizeInput(q.inv_scale, q.zero_point, q.bits)
        pixels = [self.parts.pixels(x) for x in self.images]
        patches = [quantize_input(flatten_patches(x, conv.kernel_size)).flatten(0, 2) for x in pixels]
        return QuantPatchEmbed(self.real_linear(self.fold(site, conv, q, patches), quantize_input), conv.kernel_size)

    @staticmethod
    def real_linear(folded: FoldedLinear, quantize_input: QuantizeInput | None) -> QuantLinear:
        """A linear to float, from float or, without a quantizer, from codes."""
        return QuantLinear(
            folded.weight,
            folded.multiplier(),
            folded.bias_q(),
            "real",
            input_bits=folded.input_bits,
            quantize_input=quantize_input,
        )

    def head(self, name: str, module: nn.Linear, features: Stream) -> QuantLinear:
        """A classifier on float features [B, C]."""
        q = self.quantizer(name, "head")
        quantize_input = QuantizeInput(q.inv_scale, q.zero_point, q.bits)
        return self.real_linear(self.fold(name, module, q, [quantize_input(x) for x in features]), quantize_input)

    def block(self, block: BlockParts, stream: Stream) -> QuantBlock:
        """A transformer block, given the residual stream that enters it; the stream comes out behind the block."""
        wanted, entering = [float_block(block, x) for x in self.float_stream], list(stream)
        norm1, q1 = self.layernorm(block.norm1, f"{block.name}.attn.qkv", "qkv")
        attn = self.attention(block, q1, [norm1(x) for x in stream], stream, wanted)
        norm2, q2 = self.layernorm(block.norm2, f"{block.name}.mlp.fc1", "fc1")
        mlp = self.mlp(block, q2, [norm2(x) for x in stream], stream, wanted)
        self.float_stream = [block.out for block in wanted]
        result = QuantBlock(norm1, attn, norm2, mlp)
        if entering and self.config.reconstruction:
            weights = [self.token_weights(x) for x in entering]
            reconstruct(result, entering, self.float_stream, weights, self.config.reconstruction)
            stream[:] = map(result, entering)
        return result

    def layernorm(self, norm: nn.LayerNorm, site: str, kind: SiteKind) -> tuple[QuantLayerNorm, AffineQuantizer]:
        """S3 for the input of ``site``: channel-wise scales cost nothing, the site's columns carry them."""
        q = self.quantizer(site, kind)
        gamma = torch.ones_like(q.scale) if norm.weight is None else norm.weight.detach().float()
        beta = torch.zeros_like(q.scale) if norm.bias is None else norm.bias.detach().float()
        offset = beta.double() / q.scale.double() + q.zero_point
        return QuantLayerNorm((gamma.double() / q.scale.double()).float(), offset.float(), norm.eps, q.bits), q

    def attention(
        self, block: BlockParts, quantizer: AffineQuantizer, inputs: Stream, stream: Stream, wanted: list[BlockOutputs]
    ) -> QuantAttention:
        """qkv, integer attention and proj (semantics S4).

        Keys are centred by their mean, which softmax does not see; values by the middle of their range, which comes
        back through proj's bias.
        """
        qkv_site, qk, av, proj_site = (f"{block.name}.attn.{s}" for s in ("qkv", "qk", "av", "proj"))
        stats, heads, dim = self.stats, block.num_heads, block.head_dim
        code_bits, av_bits = self.bits[qk].activation, self.bits[av].activation
        low, high = stats.qkv[qkv_site].choose(code_bits, self.config)
        _, key_mean, _ = stats.output_mean[qkv_site].chunk(3)
        middle = ((low + high) / 2).chunk(3)[2]
        centre = torch.cat((torch.zeros_like(middle), key_mean, middle))
        radius = torch.maximum((low - centre).abs(), (high - centre).abs())
        q_scale, k_scale, score_scale = query_key_scales(*radius.chunk(3)[:2], heads, code_bits)
        v_scale = affine_quantizer(-radius.chunk(3)[2], radius.chunk(3)[2], code_bits).scale

        folded = self.fold(qkv_site, block.qkv, quantizer, inputs, targets=[w.qkv for w in wanted])
        out_scale = torch.cat((q_scale, k_scale, v_scale))
        qkv = QuantLinear(
            folded.weight,
            folded.multiplier(out_scale),
            folded.bias_q(centre),
            "codes",
            zero_point=torch.zeros_like(folded.zero_sum, dtype=torch.int32),
            out_bits=code_bits,
            input_bits=folded.input_bits,
        )
        tau_index = stats.tau_error[av][av_bits - MIN_BITS].argmin(0)
        tau = [log2_steps(av_bits)[i] for i in tau_index.tolist()]
        octaves = block.softmax_scale * math.log2(math.e)
        kappa = score_scale.double() * octaves / torch.tensor(tau, dtype=torch.float64, device=score_scale.device)
        out = self.quantizer(proj_site, "proj", shift=middle)
        shape = (heads, dim)
        attn = QuantAttention(
            qkv,
            qkv,  # replaced below, once the codes that enter proj exist
            kappa.float(),
            torch.stack([log2_levels(av_bits, t) for t in tau]).to(kappa.device),
            (v_scale.double() / out.scale.double()).float().view(shape),
            out.zero_point.view(shape),
            out.bits,
        )
        codes = [attn.attend(x) for x in inputs]
        # What the residual stream lacks, the errors of the blocks before included.
        targets = [w.middle - x for w, x in zip(wanted, stream, strict=bool(wanted))]
        scale = block.layer_scale1
        proj = self.fold(proj_site, block.proj, out, codes, targets=targets, layer_scale=scale, shift=middle)
        attn.proj = QuantLinear(proj.weight, proj.multiplier(), proj.bias_q(), "residual", input_bits=proj.input_bits)
        stream[:] = map(attn.proj, codes, stream)
        return attn

    def mlp(
        self, block: BlockParts, quantizer: AffineQuantizer, inputs: Stream, stream: Stream, wanted: list[BlockOutputs]
    ) -> QuantMlp:
        """fc1 with GELU and channel-wise requantization in its epilogue, fc2 with the residual in its own."""
        site1, site2 = f"{block.name}.mlp.fc1", f"{block.name}.mlp.fc2"
        folded = self.fold(site1, block.fc1, quantizer, inputs, targets=[w.fc1 for w in wanted])
        if inputs and self.config.gelu_levels and self.bits[site2].activation <= LEVEL_BITS:
            fc1, hidden = self.gelu_levels(block, folded, inputs)
        else:
            hidden = self.quantizer(site2, "fc2")
            fc1 = QuantLinear(
                folded.weight,
                folded.multiplier(),
                folded.bias_q(),
                "gelu",
                zero_point=hidden.zero_point,
                inv_scale=hidden.inv_scale,
                out_bits=hidden.bits,
                gelu=block.gelu,
                input_bits=folded.input_bits,
            )
        codes = [fc1(x) for x in inputs]
        targets = [w.out - x for w, x in zip(wanted, stream, strict=bool(wanted))]
        folded = self.fold(site2, block.fc2, hidden, codes, targets=targets, layer_scale=block.layer_scale2)
        fc2 = QuantLinear(folded.weight, folded.multiplier(), folded.bias_q(), "residual", input_bits=folded.input_bits)
        stream[:] = map(fc2, codes, stream)
        return QuantMlp(fc1, fc2)

    def gelu_levels(
        self, block: BlockParts, folded: FoldedLinear, inputs: Stream
    ) -> tuple[QuantLinear, AffineQuantizer]:
        """fc1 whose codes choose among 2^b levels of the block's own, those of least error at fc2's output.

        Channels keep their ranges (scale s_n = absmax / 127); an error of channel n counts ``(s_n |fc2[:, n]|)^2``.
        """
        site = f"{block.name}.mlp.fc2"
        ranges = self.stats.inputs[site]
        scale = level_scale(ranges.low[-1], ranges.high[-1])
        hidden = AffineQuantizer(scale, torch.zeros_like(scale, dtype=torch.int32), MAX_BITS)
        channel_weight = (block.fc2.weight.detach().float() * scale).square().sum(0)
        real = self.real_linear(folded, None)
        histogram = LevelHistogram()
        for x in inputs:
            units = F.gelu(real(x), approximate=block.gelu) / scale
            histogram.add(units, self.token_weights(x)[..., None] * channel_weight)
        levels = histogram.best_levels(1 << self.bits[site].activation).to(scale.device)
        fc1 = QuantLinear(
            folded.weight,
            folded.multiplier(),
            folded.bias_q(),
            "gelu levels",
            inv_scale=hidden.inv_scale,
            levels=levels,
            gelu=block.gelu,
            input_bits=folded.input_bits,
        )
        return fc1, hidden
