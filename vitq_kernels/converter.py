"""Float modules to integer modules, one step of the model after another on the stream of the steps before it."""

from __future__ import annotations

import math

from torch import nn

from vitq_kernels.attention_converter import convert_attention
from vitq_kernels.calibration import CalibrationStats
from vitq_kernels.compensation import Stream, float_block
from vitq_kernels.config import QuantConfig
from vitq_kernels.mlp_converter import convert_mlp
from vitq_kernels.models import BlockParts, MergingParts, ModelParts, UnsupportedModelError
from vitq_kernels.nn import (
    QuantBlock,
    QuantizeInput,
    QuantLinear,
    QuantPatchEmbed,
    QuantPatchMerging,
    QuantPostNormBlock,
    QuantPostNormMerging,
    flatten_patches,
)
from vitq_kernels.quantizers import AffineQuantizer
from vitq_kernels.reconstruction import reconstruct
from vitq_kernels.site_converter import SiteConverter, float_norm
from vitq_kernels.spec import BitAllocation
from vitq_kernels.windows import merged_patches


class Converter(SiteConverter):
    """Turns the parts of one model into integer modules in forward order, each on the stream of those before it."""

    def __init__(
        self, parts: ModelParts, stats: CalibrationStats, allocation: BitAllocation, config: QuantConfig, images: Stream
    ) -> None:
        super().__init__(parts, stats, allocation, config)
        self.images = images
        self.float_stream: Stream = []  # what the float model has where the quantized one has its stream

    def patch_embed(self) -> QuantPatchEmbed:
        """The patch convolution; its input quantizer is per image channel."""
        conv, site = self.parts.patch_proj, self.parts.patch_name
        q = self.quantizer(site, "patch_embed")
        area = math.prod(conv.kernel_size)
        q = AffineQuantizer(q.scale.repeat_interleave(area), q.zero_point.repeat_interleave(area), q.bits)
        quantize_input = QuantizeInput(q.inv_scale, q.zero_point, q.bits)
        pixels = [self.parts.pixels(x) for x in self.images]
        patches = [quantize_input(flatten_patches(x, conv.kernel_size)).flatten(0, 2) for x in pixels]
        return QuantPatchEmbed(self.real_linear(self.fold(site, conv, q, patches), quantize_input), conv.kernel_size)

    def head(self, name: str, module: nn.Linear, features: Stream) -> QuantLinear:
        """A classifier on float features [B, C]."""
        q = self.quantizer(name, "head")
        quantize_input = QuantizeInput(q.inv_scale, q.zero_point, q.bits)
        return self.real_linear(self.fold(name, module, q, [quantize_input(x) for x in features]), quantize_input)

    def block(self, block: BlockParts, stream: Stream) -> QuantBlock | QuantPostNormBlock:
        """A transformer block, given the residual stream that enters it; the stream comes out behind the block."""
        wanted, entering = [float_block(block, x) for x in self.float_stream], list(stream)
        behind1, behind2 = (None if norm is None else float_norm(norm) for norm in block.behind)
        codes1, q1 = self.norm(block.before[0], f"{block.name}.attn.qkv", "qkv")
        attn = convert_attention(self, block, q1, [codes1(x) for x in stream], stream, wanted, behind1)
        codes2, q2 = self.norm(block.before[1], f"{block.name}.mlp.fc1", "fc1")
        mlp = convert_mlp(self, block, q2, [codes2(x) for x in stream], stream, wanted, behind2)
        self.float_stream = [block.out for block in wanted]
        if behind1 is not None and behind2 is not None:
            result = QuantPostNormBlock(codes1, attn, behind1, codes2, mlp, behind2)
        else:
            result = QuantBlock(codes1, attn, codes2, mlp)
        if entering and self.config.reconstruction:
            if not block.plain:
                raise UnsupportedModelError(f"reconstruction: {block.name} must be a block as of ViT, with LayerNorms")
            weights = [self.token_weights(x) for x in entering]
            reconstruct(result, entering, self.float_stream, weights, self.config.reconstruction)
            stream[:] = [result(x, **block.arguments) for x in entering]
        return result

    def merging(self, merging: MergingParts, stream: Stream) -> QuantPatchMerging | QuantPostNormMerging:
        """A patch merging, given the stream that enters it; the stream comes out behind it."""
        patches = [merged_patches(x) for x in self.float_stream]
        name, linear = next(iter(merging.linears.items()))
        before, behind = (None, merging.norm) if merging.post_norm else (merging.norm, None)
        wanted = [linear(x if before is None else before(x)) for x in patches]
        codes, quantizer = self.norm(before, name, "reduction")
        folded = self.fold(name, linear, quantizer, [codes(merged_patches(x)) for x in stream], targets=wanted)
        reduction = self.real_linear(folded, None)
        if behind is None:
            result = QuantPatchMerging(codes, reduction)
        else:
            result = QuantPostNormMerging(codes, reduction, float_norm(behind))
            wanted = [behind(y) for y in wanted]
        self.float_stream = wanted
        stream[:] = map(result, stream)
        return result
