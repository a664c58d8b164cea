"""NoisyQuant: a fixed noise added to every linear's input before rounding, taken off again through the bias."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.capture import fit_in_forward_order
from vitq_kernels.presets.output_error import ProductError, in_chunks
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import FakeQuantizer, Uniform
from vitq_kernels.presets.ranges import SCALE_FLOOR
from vitq_kernels.presets.token_sample import sample_tokens
from vitq_kernels.presets.weights import symmetric_rows

CLIPS = 200  # fractions of the absolute maximum
MEANS = 80  # shifts in [-scale, scale)
STRENGTHS = 400  # multiples of the drawn noise in [0, 2)
TOKENS = 512  # of each linear, on which output errors are measured


class NoisyUniform(FakeQuantizer):
    """``scale * clamp(rint((x + noise) / scale), -2^(bits-1), 2^(bits-1) - 1)``: the bias of the linear has -W noise.

    Source: Liu et al., CVPR 2023, arXiv:2211.16056; fast_quant.py (methods.md 3.7).
    """

    numbers = ("bits",)

    def __init__(self, scale: Tensor, noise: Tensor, bits: int) -> None:
        """Takes the scale [] and a number for every channel [K]."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("noise", noise)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^bits."""
        return 1 << self.bits

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K]."""
        half = 1 << (self.bits - 1)
        return ((x + self.noise) / self.scale).round().clamp(-half, half - 1) * self.scale


def least(errors: Callable[[Tensor], Tensor], candidates: Tensor, elements: int) -> Tensor:
    """The first of the candidates [P, ...] of least error [P]."""
    return candidates[in_chunks(errors, elements, candidates).argmin()]


def search_clip(x: Tensor, weights: Tensor, product: ProductError, largest: Tensor, bits: int) -> Tensor:
    """The scale [] of symmetric codes whose clipping point gives the least output error; x [T, K], weights [T]."""
    half = 1 << (bits - 1)

    def errors(scale: Tensor) -> Tensor:
        scale = scale[:, None, None]
        codes = (x / scale).round_().clamp_(1 - half, half - 1)  # the search of the released code clips evenly
        return product(codes.mul_(scale)) @ weights

    fractions = torch.arange(CLIPS, 0, -1, device=x.device) / CLIPS
    return least(errors, fractions * (largest / (half - 1)).clamp_min(SCALE_FLOOR), x.numel())


def search_noise(x: Tensor, weights: Tensor, product: ProductError, scale: Tensor, drawn: Tensor, bits: int) -> Tensor:
    """The noise [K] of least output error: first one shift for all channels, then a multiple of the drawn noise on it.

    Args:
        x: float [T, K], some tokens.
        weights: how often each counts, [T].
        product: of x with the rounded weight.
        scale: of the codes, [].
        drawn: normal numbers of mean -1 and deviation 2, times the scale, [K].
        bits: of the codes.
    """

    def errors(noise: Tensor) -> Tensor:
        noise = noise[:, None]
        return product(NoisyUniform(scale, noise, bits)(x) - noise) @ weights

    means = torch.arange(-MEANS // 2, MEANS // 2, device=x.device)[:, None] * (2 / MEANS) * scale
    mean = least(errors, means.expand(-1, x.shape[-1]), x.numel())
    strengths = torch.arange(STRENGTHS, device=x.device)[:, None] * (2 / STRENGTHS)
    return least(errors, mean + strengths * drawn, x.numel())


def quantized_linears(names: Iterable[str]) -> list[str]:
    """The linears of the blocks: the released code leaves matmuls, the patch convolution and the head in float."""
    return [name for name in names if name.startswith("blocks.")]


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """Weights to nearest, then a forward that sets the clips and a forward that sets the noises, as the code does."""
    names = quantized_linears(widths.linears)
    for name in names:
        linear = model.get_submodule(name)
        linear.weight = symmetric_rows(linear.weight, widths.weight(name))
    scales: dict[str, Tensor] = {}

    def sampled(name: str, x: Tensor) -> tuple[Tensor, Tensor, ProductError]:
        flat, weight = x.flatten(0, -2), model.get_submodule(name).weight
        some = sample_tokens(flat, TOKENS, generator)
        return flat[some.rows], some.weights, ProductError(flat[some.rows], weight, weight)

    def clipped(x: Tensor, name: str) -> nn.Module:
        bits = widths.activation(name)
        scales[name] = search_clip(*sampled(name, x), x.abs().max(), bits)
        return Uniform(scales[name], torch.zeros_like(scales[name]), -(1 << (bits - 1)), (1 << (bits - 1)) - 1)

    def noisy(x: Tensor, name: str) -> nn.Module:
        linear, scale, bits = model.get_submodule(name), scales[name], widths.activation(name)
        drawn = (2 * torch.randn(x.shape[-1], generator=generator) - 1).to(x.device) * scale
        noise = search_noise(*sampled(name, x), scale, drawn, bits)
        fold = linear.weight @ noise  # the linear reads its bias after this input
        linear.bias = -fold if linear.bias is None else linear.bias - fold
        return NoisyUniform(scale, noise, bits)

    total = 2 * len(names)
    fit_in_forward_order(
        model,
        {f"{name}.input": partial(clipped, name=name) for name in names},
        batches,
        lambda done, _: progress(done, total),
    )
    fit_in_forward_order(
        model,
        {f"{name}.input": partial(noisy, name=name) for name in names},
        batches,
        lambda done, _: progress(len(names) + done, total),
    )


PRESET = Preset(
    "noisyquant",
    "Liu et al.: NoisyQuant, CVPR 2023, arXiv:2211.16056; official code kriskrisliu/NoisyQuant b074752 (MIT)",
    apply,
    calibration_images=256,
    levels="2^b, symmetric; only the linears of the blocks are quantized",
    why_simulated=(
        "q, k, v, the attention probabilities, pixels and head are float in the released code, and the kernels have no "
        "float matmul; the noise itself folds into LayerNorm, GELU's codes and biases"
    ),
    completed=(
        "search reduced: 200 of 1000 clips, 80 of 400 shifts, 400 of 2000 strengths, errors on 512 sampled tokens",
        "noise as the released code draws it (normal, mean -1, deviation 2, in scales); the paper has it uniform",
    ),
)
