"""Drop-in ``nn.Module``s over the ``vitq::`` ops."""

from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.block import QuantBlock
from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.linear import DynamicQuantLinear, PackedLinear, QuantLinear, QuantPatchEmbed, flatten_patches
from vitq_kernels.nn.mlp import QuantMlp
from vitq_kernels.nn.module import IntegerModule, QuantizeInput
from vitq_kernels.nn.patch_merging import QuantPatchMerging
from vitq_kernels.nn.window_attention import QuantWindowAttention

__all__ = [
    "DynamicQuantLinear",
    "IntegerModule",
    "PackedLinear",
    "QuantAttention",
    "QuantBlock",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantMlp",
    "QuantPatchEmbed",
    "QuantPatchMerging",
    "QuantWindowAttention",
    "QuantizeInput",
    "flatten_patches",
]
