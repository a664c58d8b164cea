"""Drop-in ``nn.Module``s over the ``vitq::`` ops."""

from vitq_kernels.nn.attention import QuantAttention
from vitq_kernels.nn.block import QuantBlock, fuse_layernorm
from vitq_kernels.nn.hidden import HiddenCodes
from vitq_kernels.nn.inner_norm import InnerNorm
from vitq_kernels.nn.layernorm import QuantLayerNorm
from vitq_kernels.nn.linear import DynamicQuantLinear, PackedLinear, QuantLinear, QuantPatchEmbed, flatten_patches
from vitq_kernels.nn.mlp import QuantMlp
from vitq_kernels.nn.module import IntegerModule, QuantizeInput
from vitq_kernels.nn.norm import FloatNorm, QuantRmsNorm
from vitq_kernels.nn.patch_merging import QuantPatchMerging
from vitq_kernels.nn.position_bias import PositionBias
from vitq_kernels.nn.post_norm import QuantPostNormBlock, QuantPostNormMerging
from vitq_kernels.nn.query_key import QueryKeyCodes
from vitq_kernels.nn.window_attention import QuantWindowAttention

__all__ = [
    "DynamicQuantLinear",
    "FloatNorm",
    "HiddenCodes",
    "InnerNorm",
    "IntegerModule",
    "PackedLinear",
    "PositionBias",
    "QuantAttention",
    "QuantBlock",
    "QuantLayerNorm",
    "QuantLinear",
    "QuantMlp",
    "QuantPatchEmbed",
    "QuantPatchMerging",
    "QuantPostNormBlock",
    "QuantPostNormMerging",
    "QuantRmsNorm",
    "QuantWindowAttention",
    "QuantizeInput",
    "QueryKeyCodes",
    "flatten_patches",
    "fuse_layernorm",
]
