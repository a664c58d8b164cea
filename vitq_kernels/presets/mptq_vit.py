"""MPTQ-ViT: SmoothQuant with a bias term after LayerNorm (SQ-b), regions of searched ratio after GELU (OPT-m)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.float_stream import MATMUL_PARTS, linears_and_matmuls, parts_of
from vitq_kernels.presets.output_error import ProductError
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.ptq4vit import best_multiple, search_weight, signed
from vitq_kernels.presets.quantizers import FakeQuantizer, Uniform
from vitq_kernels.presets.ranges import SCALE_FLOOR
from vitq_kernels.presets.reparameterization import fold_channel_scales
from vitq_kernels.presets.token_sample import sample_tokens
from vitq_kernels.presets.twin_quantizers import TwinSign

MIGRATION = 0.5  # SmoothQuant's alpha
RATIOS = range(8)  # exponents m of the ratio 2^m between two regions' scales
SPLITS = range(1, 16)  # exponents of the border between two regions after softmax
ELEMENTS = 1 << 15  # of a tensor, on which its own squared error is measured


class TwoRegions(FakeQuantizer):
    """Numbers in [0, 1]: up to ``split`` on a grid of ``split / q``, above it of ``1 / q``, ``q = 2^(bits-1) - 1``."""

    numbers = ("bits",)

    def __init__(self, split: Tensor, bits: int) -> None:
        """Takes the border [] in (0, 1)."""
        super().__init__()
        self.register_buffer("split", split)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^(bits-1) up to the split, and those of the coarse grid that numbers above it take."""
        top = (1 << (self.bits - 1)) - 1
        values = torch.arange(top + 1) / top
        fine = values * self.split.cpu()
        coarse = values[int((self.split * top).round()) :]
        return top + 1 + int((coarse[:, None] != fine).all(1).sum())

    def forward(self, x: Tensor) -> Tensor:
        """x in [0, 1]."""
        top = (1 << (self.bits - 1)) - 1
        scale = torch.where(x > self.split, 1.0, self.split) / top
        return (x / scale).round() * scale


def smoothed(linear: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """SQ-b: the middle of every channel and SmoothQuant's factor move into norm and linear; returns the new x [T, C].

    ``x' = (x - m) / r`` with ``m = (max + min) / 2`` and ``r = max|x - m|^a / max|W|^(1 - a)``: ``W' = W r``,
    ``b' = b + W m``. The function of the two is unchanged.
    """
    low, high = x.amin(0), x.amax(0)
    middle, radius = (high + low) / 2, ((high - low) / 2).clamp_min(SCALE_FLOOR)
    factor = radius**MIGRATION / linear.weight.abs().amax(0).clamp_min(SCALE_FLOOR) ** (1 - MIGRATION)
    one = torch.ones((), device=x.device)
    fold_channel_scales(norm, linear, Uniform(factor, -middle / factor, 0, 0), one, 0 * one)
    linear.input = nn.Identity()
    return (x - middle) / factor


def closest(x: Tensor, weights: Tensor, make: Callable[[Tensor], nn.Module], widest: Tensor) -> tuple[nn.Module, float]:
    """The quantizer whose scale, a multiple of ``widest`` [], changes x [N] least, and its weighted squared error."""

    def errors(scale: Tensor) -> Tensor:
        return ((make(scale)(x) - x).square() @ weights)[:, None]

    scale = best_multiple(widest.clamp_min(SCALE_FLOOR).view(1), errors, x.numel())
    return make(scale[0]), float(errors(scale[:, None]))


def opt_m(x: Tensor, weights: Tensor, bits: int) -> TwinSign:
    """The regions after GELU: the negative scale is ``2^-m`` of the positive one; both by squared error."""
    widest = x.max() / ((1 << (bits - 1)) - 1)
    found = [closest(x, weights, lambda s, m=m: TwinSign(s, s * 2.0**-m, bits), widest) for m in RATIOS]
    return min(found, key=lambda pair: pair[1])[0]


def two_regions(x: Tensor, bits: int) -> TwoRegions:
    """The border after softmax that changes x least."""
    candidates = [TwoRegions(x.new_tensor(2.0**-i), bits) for i in SPLITS]
    errors = [float((quantizer(x) - x).square().sum(dtype=torch.float64)) for quantizer in candidates]
    return candidates[errors.index(min(errors))]


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """SQ-b and OPT-m; ranges are those of the float stream."""
    quantizers: dict[str, nn.Module] = {}
    weights: dict[str, Tensor] = {}

    def some(x: Tensor) -> tuple[Tensor, Tensor]:
        sample = sample_tokens(x.reshape(-1, 1), ELEMENTS, generator)
        return x.flatten()[sample.rows], sample.weights

    def symmetric(x: Tensor, bits: int) -> nn.Module:
        return closest(*some(x), partial(signed, bits=bits), x.abs().max() / ((1 << (bits - 1)) - 0.5))[0]

    for done, site, seen in linears_and_matmuls(model, widths, batches):
        if "query" in seen:
            for part in MATMUL_PARTS:
                place = f"{site}.{part}"
                fit = two_regions if part == "probability" else symmetric
                quantizers[place] = fit(seen[part], widths.activations[place])
        else:
            linear, bits, x = model.get_submodule(site), widths.activation(site), seen["input"]
            if site in widths.post_norms:
                x = smoothed(linear, model.get_submodule(widths.post_norms[site]), x)
            gelu = site.endswith("mlp.fc2")
            quantizer = opt_m(*some(x), bits) if gelu else symmetric(x, bits)
            rows, row_bits = linear.weight.flatten(1), widths.weight(site).to(x.device)
            product = ProductError(rows, x, quantizer(x))
            rounded = search_weight(rows, torch.arange(len(rows), device=x.device), row_bits, product)
            quantizers[f"{site}.input"], weights[site] = quantizer, rounded.view_as(linear.weight)
        progress(done, len(parts_of(widths)))
    for site, weight in weights.items():
        model.get_submodule(site).weight = weight
    for place, quantizer in quantizers.items():
        model.set_submodule(place, quantizer)


PRESET = Preset(
    "mptq-vit",
    "Tai, Wu: MPTQ-ViT, 2024, arXiv:2401.14895; no code",
    apply,
    calibration_images=32,
    levels="2^b, symmetric; after softmax 2^b - 1 or fewer (two grids that meet at the split)",
    why_simulated="after GELU and softmax two scales in one tensor, the latter not relative to the row's maximum",
    completed=(
        "only the abstract could be read: the forms of SQ-b and OPT-m are derived from it (methods.md 3.8)",
        "SQ-b: mid-range as the bias term, SmoothQuant's factor with exponent 0.5, folded into LayerNorm and linear",
        "OPT-m: the positive scale and the exponent of the two regions' ratio by squared error; softmax likewise",
        "weights: one symmetric scale a row by output error; q, k, v and other inputs: one symmetric scale a tensor",
        "Greedy MP: widths come as an allocation (greedy search); number of calibration images taken from its peers",
    ),
)
