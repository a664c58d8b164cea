"""AdaLog: logarithms of a searched base after softmax and GELU, asymmetric codes elsewhere, scales by FPCS."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitq_kernels.presets.affine_search import search_channels, search_heads, search_rows, search_tensor, tensor_grid
from vitq_kernels.presets.float_stream import MATMUL_PARTS, linears_and_matmuls, parts_of
from vitq_kernels.presets.output_error import ProductError, in_chunks
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.progressive_search import Grid, progressive_search
from vitq_kernels.presets.quantizers import FakeQuantizer
from vitq_kernels.presets.reparameterization import fold_channel_scales
from vitq_kernels.presets.token_sample import sample_tokens

DENOMINATOR = 37  # of the exponent's step, base / 37 octaves
FIRST_BASE = 10
GELU_SHIFT = 0.16997124254703522  # minus the minimum of GELU
SMALLEST = 1e-15  # numbers below it count as it
BASES = 128
KEPT_BASES, SCALES, KEPT_PAIRS = 8, 16, 32  # of FPCS over scale and base together


@dataclass(frozen=True)
class Effort:
    """What the search costs.

    ``EFFORT`` is what runs here. On four linears of ViT-Tiny at W4A4, 6 steps or 3 rounds changed the output error by
    less than 1 %.
    """

    steps: int  # of FPCS
    rounds: int  # weights and activations in turn
    tokens: int | None  # on which output errors of activations are measured; None: all


PUBLISHED = Effort(steps=6, rounds=3, tokens=None)
EFFORT = Effort(steps=4, rounds=1, tokens=512)


def log_levels(bits: int, bases: Tensor) -> Tensor:
    """``2^-floor(k q / 37) * T[k q mod 37]`` for codes k < 2^bits, then the exact zero: float [P, 2^bits + 1].

    ``T[j] = rint(2^(-j / 37) t) / t`` with ``t = 2^(bits + 1) - 2`` is the table that hardware holds.

    Args:
        bits: 2..8.
        bases: q, positive integers [P] in any dtype.
    """
    octaves = torch.arange(1 << bits, device=bases.device) * bases.long()[:, None]
    top = float((2 << bits) - 2)
    table = (torch.exp2(-(octaves % DENOMINATOR).double() / DENOMINATOR) * top).round() / top
    levels = torch.exp2(-(octaves // DENOMINATOR).double()) * table
    return nn.functional.pad(levels, (0, 1)).float()


def log_codes(logarithm: Tensor, bits: int, base: Tensor | int) -> Tensor:
    """``rint(-logarithm * 37 / q)``, at least 0 and at most 2^bits, which stands for zero: int64."""
    return (logarithm * (-DENOMINATOR / base)).round().clamp(0, 1 << bits).long()


class AdaLog(FakeQuantizer):
    """``scale * levels[k]`` with ``k = rint(-log2((x + shift) / scale) * 37 / base)``, zero from k = 2^bits on.

    The shift is not taken off again: the linear's bias carries it. Source: Wu et al., ECCV 2024, arXiv:2407.12951,
    and its code's quantizers/logarithm.py (methods.md 3.2).
    """

    numbers = ("bits", "base", "shift")

    def __init__(self, scale: Tensor, bits: int, base: int, shift: float = 0.0) -> None:
        """Takes the largest level []; numbers above it become it."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.bits, self.base, self.shift = bits, base, shift

    @property
    def levels(self) -> int:
        """2^bits codes and a masked zero, less what the rounded table makes equal and what lies below 1e-15."""
        last = log_codes(torch.tensor(math.log2(SMALLEST)), self.bits, self.base)
        return len(log_levels(self.bits, torch.tensor([self.base]))[0, : int(last) + 1].unique())

    def forward(self, x: Tensor) -> Tensor:
        """x >= -shift."""
        logarithm = ((x + self.shift) / self.scale).clamp(SMALLEST, 1.0).log2()
        levels = log_levels(self.bits, torch.tensor([self.base], device=x.device))[0]
        return levels[log_codes(logarithm, self.bits, self.base)] * self.scale


def _levels_of(logarithm: Tensor, bits: int, bases: Tensor) -> Tensor:
    """Levels for every base [P] of logarithms that broadcast to [P, ...]: float [P, ...]."""
    base = bases.view(-1, *[1] * (logarithm.dim() - 1))
    codes = log_codes(logarithm, bits, base)
    table = log_levels(bits, bases)
    start = torch.arange(len(bases), device=codes.device).view_as(base) * table.shape[1]
    return table.flatten().index_select(0, codes.add_(start).flatten()).view_as(codes)  # the fastest gather on a CPU


def search_base(x: Tensor, bits: int, product: ProductError) -> AdaLog:
    """The base of the logarithm of x [..., T, K] in [0, 1], scale 1."""
    bases = torch.arange(FIRST_BASE, FIRST_BASE + BASES, device=x.device)
    logarithm = x.clamp_min(SMALLEST).log2()[None]

    def errors(base: Tensor) -> Tensor:
        return product(_levels_of(logarithm, bits, base)).flatten(1).sum(1)

    best = in_chunks(errors, x.numel(), bases).argmin()
    return AdaLog(torch.ones((), device=x.device), bits, int(bases[best]))


def search_gelu(
    x: Tensor,
    weights: Tensor,
    bits: int,
    product: ProductError,
    ends: tuple[Tensor, Tensor],
    before: AdaLog,
    steps: int,
) -> AdaLog:
    """Scale and base after GELU: the best bases at the scale before, then FPCS over pairs.

    Args:
        x: float [T, K], some tokens.
        weights: how often each counts, [T].
        bits: of the codes.
        product: of x with the rounded weight.
        ends: between which scales are looked for.
        before: the quantizer so far.
        steps: of FPCS.
    """
    logarithm = (x + GELU_SHIFT).clamp_min(torch.finfo(x.dtype).tiny).log2()[None]

    def errors(scale: Tensor, base: Tensor) -> Tensor:
        scaled = (logarithm - scale[..., None].log2()).clamp(math.log2(SMALLEST), 0.0)
        values = _levels_of(scaled, bits, base[:, 0]) * scale[..., None] - GELU_SHIFT
        return (product(values) @ weights)[:, None]

    def chunked(scale: Tensor, base: Tensor) -> Tensor:
        return in_chunks(errors, x.numel(), scale, base)

    bases = torch.arange(FIRST_BASE, FIRST_BASE + BASES, device=x.device)[:, None]
    kept = chunked(before.scale.expand(BASES, 1), bases).topk(KEPT_BASES, dim=0, largest=False).indices
    scales = torch.lerp(*ends, torch.linspace(0, 1, SCALES, device=x.device))[:, None]
    grid = Grid(scales.repeat(KEPT_BASES, 1), bases[kept[:, 0]].repeat_interleave(SCALES, 0), scales[1] - scales[0])
    scale, base = progressive_search(grid, chunked, kept=KEPT_PAIRS, refined=BASES // KEPT_PAIRS, steps=steps)
    return AdaLog(scale[0], bits, int(base), GELU_SHIFT)


def gelu_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Between which numbers the largest level is looked for: the 0.9 quantile and the maximum of what is positive."""
    positive = x[x > 0].sort().values
    if not len(positive):
        return x.new_tensor(GELU_SHIFT / 2), x.new_tensor(GELU_SHIFT)
    return positive[math.ceil(0.9 * len(positive)) - 1] + GELU_SHIFT, positive[-1] + GELU_SHIFT


@dataclass
class _Search:
    """The model, float until ``finish``, and what was found for it so far."""

    model: nn.Module
    widths: Widths
    generator: torch.Generator
    effort: Effort
    quantizers: dict[str, nn.Module] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str, x: Tensor) -> None:
        """A linear with affine input codes of the tensor; x [T, K]."""
        weight, steps = self.model.get_submodule(name).weight, self.effort.steps
        rows, some = weight.flatten(1), sample_tokens(x, self.effort.tokens, self.generator)
        sample, grid = x[some.rows], tensor_grid(x, self.widths.activation(name))
        row_bits, bits = self.widths.weight(name).to(x.device), self.widths.activation(name)
        quantizer = search_tensor(sample, some.weights, bits, None, grid, steps)
        for _ in range(self.effort.rounds):
            rounded = search_rows(rows, row_bits, ProductError(rows, x, quantizer(x)), steps)
            product = ProductError(sample, rows, rounded)
            quantizer = search_tensor(sample, some.weights, bits, product, grid, steps)
        self.quantizers[f"{name}.input"], self.weights[name] = quantizer, rounded.view_as(weight)

    def after_norm(self, name: str, norm: str, x: Tensor) -> None:
        """A linear after a LayerNorm: channel scales into the norm, with rounded z~, then as any linear."""
        linear = self.model.get_submodule(name)
        some = sample_tokens(x, self.effort.tokens, self.generator)
        channels = search_channels(x[some.rows], some.weights, self.widths.activation(name), self.effort.steps)
        scale, zero = channels.scale.mean(), channels.zero_point.mean().round()
        fold_channel_scales(self.model.get_submodule(norm), linear, channels, scale, zero)
        linear.input = nn.Identity()
        self.linear(name, (x + channels.scale * (channels.zero_point - zero)) * (scale / channels.scale))

    def after_gelu(self, name: str, x: Tensor) -> None:
        """fc2, whose bias takes the shift back."""
        linear, steps = self.model.get_submodule(name), self.effort.steps
        some = sample_tokens(x, self.effort.tokens, self.generator)
        weight, sample, ends = linear.weight, x[some.rows], gelu_ends(x)
        row_bits, bits = self.widths.weight(name).to(x.device), self.widths.activation(name)
        rounded = search_rows(weight, row_bits, None, steps)
        quantizer = AdaLog(torch.lerp(*ends, (BASES - 2) / (BASES - 1)), bits, DENOMINATOR, GELU_SHIFT)
        for _ in range(self.effort.rounds):
            product = ProductError(sample, weight, rounded)
            quantizer = search_gelu(sample, some.weights, bits, product, ends, quantizer, steps)
            rounded = search_rows(weight, row_bits, ProductError(weight, x, quantizer(x) - GELU_SHIFT), steps)
        self.quantizers[f"{name}.input"], self.weights[name] = quantizer, rounded

    def attention(self, name: str, seen: dict[str, Tensor]) -> None:
        """The two matmuls, each operand per head; seen: query, key, value [B, H, S, D] and probability [B, H, S, S]."""
        images = self.effort.tokens and -(-self.effort.tokens // seen["query"].shape[2])
        query, key, value, probability = (seen[part][:images].contiguous() for part in MATMUL_PARTS)
        bits, steps = self.widths.activation(f"{name}.qk"), self.effort.steps
        found = {part: search_heads(x, bits, None, steps) for part, x in (("query", query), ("key", key))}
        for _ in range(self.effort.rounds):
            product = ProductError(query, key, found["key"](key))
            found["query"] = search_heads(query, bits, product, steps)
            found["key"] = search_heads(key, bits, ProductError(key, query, found["query"](query)), steps)
        columns = value.mT.contiguous()
        found["value"] = search_heads(columns, bits, None, steps)
        for _ in range(self.effort.rounds):
            product = ProductError(probability, columns, found["value"](columns))
            log = search_base(probability, self.widths.activation(f"{name}.av"), product)
            product = ProductError(columns, probability, log(probability))
            found["value"] = search_heads(columns, bits, product, steps)
        self.quantizers |= {f"{name}.{part}": quantizer for part, quantizer in found.items()}
        self.quantizers[f"{name}.probability"] = log

    def finish(self) -> None:
        """Puts weights and quantizers in place."""
        for name, weight in self.weights.items():
            self.model.get_submodule(name).weight = weight
        for place, quantizer in self.quantizers.items():
            self.model.set_submodule(place, quantizer)
            if isinstance(quantizer, AdaLog) and quantizer.shift:
                linear = self.model.get_submodule(place.removesuffix(".input"))
                shift = quantizer.shift * linear.weight.sum(1)
                linear.bias = -shift if linear.bias is None else linear.bias - shift


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """Calibration only, without the optional AdaRound, as the released code (75a57d2) does it."""
    search, total = _Search(model, widths, generator, EFFORT), len(parts_of(widths))
    # The model stays float until the end: the released code searches every site on the float stream.
    for done, site, seen in linears_and_matmuls(model, widths, batches):
        if "query" in seen:
            search.attention(site, seen)
        elif site in widths.post_norms:
            search.after_norm(site, widths.post_norms[site], seen["input"])
        elif site.endswith("mlp.fc2"):
            search.after_gelu(site, seen["input"])
        else:
            search.linear(site, seen["input"])
        progress(done, total)
    search.finish()


PRESET = Preset(
    "adalog",
    "Wu et al.: AdaLog, ECCV 2024, arXiv:2407.12951; official code GoatWu/AdaLog 75a57d2 (Apache-2.0)",
    apply,
    calibration_images=32,
    levels="2^b for the asymmetric codes; 2^b + 1 after softmax and GELU (codes and a masked zero)",
    why_simulated=(
        "2^b + 1 levels after GELU, and after softmax relative to 1 (the kernels' are relative to the row's maximum); "
        "a zero point for every weight row (the kernels' are symmetric); asymmetric q, k and v"
    ),
    completed=(
        "calibration only: the optional AdaRound on 1024 images is left out",
        "search reduced: 4 of FPCS's 6 steps, 1 of 3 rounds, errors of activations on 512 sampled tokens",
        "above 6 bits, which has no released setting: 32 zero points for weights",
        "reparameterization at any widths; the released code does it where weights are as wide as activations",
        "a channel or row of a single value has no scale in the paper; it is spanned with 0",
    ),
)
