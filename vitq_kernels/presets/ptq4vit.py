"""PTQ4ViT: twin uniform codes after softmax and GELU, symmetric scales by a Hessian-weighted output error."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.adalog import GELU_SHIFT
from vitq_kernels.presets.gradients import LinearView, MatmulView, observe
from vitq_kernels.presets.output_error import ProductError, in_chunks
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import Uniform
from vitq_kernels.presets.ranges import SCALE_FLOOR
from vitq_kernels.presets.twin_quantizers import TwinSign, TwinSoftmax

MULTIPLES = tuple(0.01 + 0.0119 * i for i in range(100))  # of the scale that clips nothing
SPLITS = tuple(2.0**-i for i in range(20))
ROUNDS = 3
TOKENS = 512  # of each linear, on which output errors are measured
ATTENTION_IMAGES = 8  # on which those of matmuls are

Errors = Callable[[Tensor], Tensor]  # scales [P, G] to errors [P, G]


def best_multiple(widest: Tensor, errors: Errors, elements: int) -> Tensor:
    """Among the multiples of scales [G] those of least error, group by group: [G]."""
    scales = torch.tensor(MULTIPLES, device=widest.device)[:, None] * widest
    best = in_chunks(errors, elements, scales).argmin(0, keepdim=True)
    return scales.gather(0, best)[0]


def search_weight(weight: Tensor, groups: Tensor, row_bits: Tensor, product: ProductError) -> Tensor:
    """Weights [N, K] rounded with one scale a group of rows, dequantized.

    Args:
        weight: float [N, K].
        groups: which of the groups 0..G-1 a row lies in, int64 [N]; rows of a group have one width.
        row_bits: int64 [N].
        product: of the weight with the layer's inputs.
    """
    half = (1 << (row_bits - 1)).to(weight.dtype)
    count = int(groups.max()) + 1
    widest = torch.zeros(count, device=weight.device)
    widest.scatter_reduce_(0, groups, weight.abs().amax(1) / (half - 0.5), "amax")
    lowest, highest = -half[:, None], half[:, None] - 1

    def rounded(scale: Tensor) -> Tensor:
        of_rows = scale[..., groups, None]
        return (weight / of_rows).round_().clamp_(lowest, highest).mul_(of_rows)

    def errors(scale: Tensor) -> Tensor:
        of_rows = product(rounded(scale))
        return of_rows.new_zeros(len(scale), count).index_add_(1, groups, of_rows)

    return rounded(best_multiple(widest.clamp_min(SCALE_FLOOR), errors, product.elements))


def search_input(
    view: LinearView, weight: Tensor, rounded: Tensor, quantizer: Callable[[Tensor], nn.Module], widest: Tensor
) -> nn.Module:
    """The quantizer of a whole tensor whose scale gives the least output error."""
    product = ProductError(view.x, weight, rounded, view.importance)

    def errors(scale: Tensor) -> Tensor:
        return product(quantizer(scale[..., None])(view.x)).sum(-1, keepdim=True)

    return quantizer(best_multiple(widest.view(1), errors, product.elements)[0])


def search_heads(own: Tensor, widest: Tensor, bits: int, product: ProductError) -> Uniform:
    """A symmetric scale for every head of a matmul's operand [B, H, T, K]; widest: [H]."""

    def errors(scale: Tensor) -> Tensor:
        return product(signed(scale[:, None, :, None, None], bits)(own)).sum((1, 3))

    return signed(best_multiple(widest, errors, product.elements)[:, None, None], bits)


def search_split(view: MatmulView, bits: int) -> TwinSoftmax:
    """The border between the two grids after softmax; values count as float here, as in the released code."""
    product = ProductError(view.first, view.second, view.second, view.importance)
    splits = torch.tensor(SPLITS, device=view.first.device)
    errors = torch.stack([product(TwinSoftmax(split, bits)(view.first)[None]).sum() for split in splits])
    return TwinSoftmax(splits[errors.argmin()], bits)


def signed(scale: Tensor, bits: int) -> Uniform:
    """Codes -2^(bits-1)..2^(bits-1) - 1."""
    half = 1 << (bits - 1)
    return Uniform(scale, torch.zeros_like(scale), -half, half - 1)


def after_gelu(scale: Tensor, bits: int) -> TwinSign:
    """Negative numbers end at -0.17, so their scale is fixed."""
    return TwinSign(scale, torch.full_like(scale, GELU_SHIFT / (1 << (bits - 1))), bits)


def row_groups(name: str, row_bits: Tensor) -> Tensor:
    """Rows that share a scale: those of q, of k, of v, of a patch channel, of a layer; and of one width."""
    rows = len(row_bits)
    parts = rows if name == "patch_embed.proj" else 3 if name.endswith("attn.qkv") else 1
    part = torch.arange(rows, device=row_bits.device) * parts // rows
    return (part * 16 + row_bits).unique(return_inverse=True)[1]


def calibrate_linear(linear: nn.Module, name: str, view: LinearView, row_bits: Tensor, bits: int) -> None:
    """Weight and input in turn; pixels stay float."""
    rows, groups = linear.weight.flatten(1), row_groups(name, row_bits)
    gelu, pixels = name.endswith("mlp.fc2"), name == "patch_embed.proj"
    widest = ((view.highest if gelu else view.largest) / ((1 << (bits - 1)) - 0.5)).clamp_min(SCALE_FLOOR)
    make = partial(after_gelu if gelu else signed, bits=bits)
    quantizer = nn.Identity() if pixels else make(widest)
    for _ in range(1 if pixels else ROUNDS):
        product = ProductError(rows, view.x, quantizer(view.x), view.importance.mT)
        rounded = search_weight(rows, groups, row_bits, product)
        if not pixels:
            quantizer = search_input(view, rows, rounded, make, widest)
    linear.weight, linear.input = rounded.view_as(linear.weight), quantizer


def calibrate_attention(attention: nn.Module, scores: MatmulView, outputs: MatmulView, bits: int, after: int) -> None:
    """The operands of both matmuls in turn; ``after`` is the width of softmax's output."""
    half = (1 << (bits - 1)) - 0.5
    widest = [
        (t / half).clamp_min(SCALE_FLOOR) for t in (scores.largest_first, scores.largest_second, outputs.largest_second)
    ]
    query, key = (signed(w[:, None, None], bits) for w in widest[:2])
    for _ in range(ROUNDS):
        product = ProductError(scores.first, scores.second, key(scores.second), scores.importance)
        query = search_heads(scores.first, widest[0], bits, product)
        product = ProductError(scores.second, scores.first, query(scores.first), scores.importance.mT)
        key = search_heads(scores.second, widest[1], bits, product)
    # The split does not depend on the values' scale, so one round does what the released code's three do.
    probability = search_split(outputs, after)
    product = ProductError(outputs.second, outputs.first, probability(outputs.first), outputs.importance.mT)
    value = search_heads(outputs.second, widest[2], bits, product)
    attention.query, attention.key, attention.value, attention.probability = query, key, value, probability


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """As the released code's parallel calibration: every site is searched on the float stream."""
    linears, scores, outputs = observe(
        model, widths, batches, generator, tokens=TOKENS, attention_images=ATTENTION_IMAGES
    )
    total = len(linears) + len(scores)
    for done, (name, view) in enumerate(linears.items(), start=1):
        row_bits = widths.weight(name).to(view.x.device)
        calibrate_linear(model.get_submodule(name), name, view, row_bits, widths.activation(name))
        progress(done, total)
    for done, name in enumerate(scores, start=len(linears) + 1):
        after, bits = widths.activation(f"{name}.av"), widths.activation(f"{name}.qk")
        calibrate_attention(model.get_submodule(name), scores[name], outputs[name], bits, after)
        progress(done, total)


PRESET = Preset(
    "ptq4vit",
    "Yuan et al.: PTQ4ViT, ECCV 2022, arXiv:2111.12293; official code hahnyuan/PTQ4ViT 07a75dc (no licence; only read)",
    apply,
    calibration_images=32,
    levels="2^b; after softmax 2^b - 1 or fewer (two grids that meet at the split); pixels are float",
    why_simulated=(
        "after softmax a number above the split comes out one split too large, as in the released code, and is no code "
        "relative to the row's maximum; after GELU two scales in one tensor"
    ),
    completed=(
        (
            "weights of errors: squared gradients of the log-likelihood of labels drawn from the prediction; the "
            "divergence from the own prediction, which the released code takes, has none there but float32's rounding"
        ),
        "search reduced: errors on 512 sampled tokens a linear and on 8 images a matmul, not on all",
    ),
)
