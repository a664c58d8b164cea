"""FQ-ViT: power-of-two factors before LayerNorm, log-int-softmax, min-max ranges everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitq_kernels.presets.capture import inputs_of
from vitq_kernels.presets.float_stream import MATMUL_PARTS, parts_of
from vitq_kernels.presets.norm import NormWithInput
from vitq_kernels.presets.preset import Preset, Progress, Widths
from vitq_kernels.presets.quantizers import FakeQuantizer, Uniform
from vitq_kernels.presets.ranges import SCALE_FLOOR

FACTORS = (1, 2, 4, 8)
SOFTMAX_BITS = 4  # as published, however wide the other activations are
POLYNOMIAL = (0.35815147, 0.96963238, 1.0)  # of exp on [-ln 2, 0], from I-BERT
LN2 = 0.6931
LARGEST_SHIFT = 30


class LogIntSoftmax(FakeQuantizer):
    """Probabilities as ``2^-q``, from integer scores: q is the rounded logarithm of (sum of exp) / exp.

    Scores are integers times ``scale``; exp is I-BERT's polynomial in integers and a shift. q >= 2^bits becomes an
    exact zero, which makes 2^bits + 1 levels. Here the scores come back from the probabilities: ``log(p / max p)`` is
    their difference from the row's maximum, and that difference is rounded. Source: Lin et al., IJCAI 2022,
    arXiv:2111.13824; models/ptq/layers.py (methods.md 3.9).
    """

    numbers = ("bits",)

    def __init__(self, scale: Tensor, bits: int) -> None:
        """Takes the scale [] of the scores."""
        super().__init__()
        self.register_buffer("scale", scale)
        self.bits = bits

    @property
    def levels(self) -> int:
        """2^bits codes and a masked zero."""
        return (1 << self.bits) + 1

    def exponentials(self, codes: Tensor) -> Tensor:
        """Integer scores below their maximum, at most 0, to integers proportional to their exp; all float64."""
        scale = self.scale.double()
        a, b, c = POLYNOMIAL
        linear, constant = torch.floor(b / a / scale), torch.floor(c / a / scale.square())
        octave = torch.floor(-LN2 / scale)  # negative: ln 2 in units of the scale
        codes = torch.maximum(codes, LARGEST_SHIFT * octave)
        shift = torch.floor(codes / octave)
        rest = codes - octave * shift
        value = rest * (rest + linear) + constant
        return torch.floor(value * torch.exp2(LARGEST_SHIFT - shift)).clamp_min(0)

    def forward(self, x: Tensor) -> Tensor:
        """Rows of probabilities."""
        p = x.double()
        exponentials = self.exponentials(((p / p.amax(-1, keepdim=True)).log() / self.scale).round())
        # A scale so coarse that the polynomial vanishes leaves zeros; the released code divides by them.
        ratio = (exponentials.sum(-1, keepdim=True) / exponentials.clamp_min(1)).round().clamp_min(1)
        octave = ratio.log2().floor()
        code = octave + (ratio >= 1.5 * octave.exp2())
        kept = (code < 1 << self.bits) & (exponentials > 0)
        return torch.where(kept, (-code).exp2(), 0.0).to(x.dtype)


def min_max(tensors: Sequence[Tensor], bits: int) -> Uniform:
    """Asymmetric codes 0..2^bits - 1 over the whole range of some tensors, with one scale."""
    low, high = (torch.stack([f(t) for t in tensors]) for f in (torch.amin, torch.amax))
    top = (1 << bits) - 1
    scale = ((high.max() - low.min()) / top).clamp_min(SCALE_FLOOR)
    return Uniform(scale, (-low.min() / scale).round().clamp(0, top), 0, top)


def power_of_two_factors(x: Tensor, bits: int) -> Uniform:
    """One scale for the tensor [..., C], each channel's 1, 2, 4 or 8 eighths of it, by the channel's squared error."""
    x = x.flatten(0, -2)
    whole = min_max([x], bits)
    scales = [whole.scale * (factor / FACTORS[-1]) for factor in FACTORS]
    errors = [(Uniform(s, whole.zero_point, 0, whole.qmax)(x) - x).square().sum(0) for s in scales]
    scale = torch.stack(scales)[torch.stack(errors).argmin(0)]
    return Uniform(scale, whole.zero_point, 0, whole.qmax)


def rounded_rows(weight: Tensor, row_bits: Tensor) -> Tensor:
    """Codes -2^(b-1)..2^(b-1) - 1 a row [N, ...], scale ``absmax / (2^(b-1) - 0.5)``, dequantized."""
    rows, half = weight.flatten(1), (2.0 ** (row_bits.to(weight.device) - 1))[:, None]
    scale = (rows.abs().amax(1, keepdim=True) / (half - 0.5)).clamp_min(SCALE_FLOOR)
    codes = torch.minimum((rows / scale).round().maximum(-half), half - 1)
    return (codes * scale).view_as(weight)


def apply(
    model: nn.Module, batches: list[Tensor], widths: Widths, generator: torch.Generator, progress: Progress
) -> None:
    """Every range is that of the float stream, as the released code's observers see it."""
    found: dict[str, nn.Module] = {}
    parts = parts_of(widths)
    for done, places in enumerate(parts.values(), start=1):
        # Where tensors enter the residual stream, and where LayerNorms read it; each as wide as the linear next to it.
        branches = {branch: place for place in places if (branch := _branch_of(place))}
        norms = {norm: place for place in places if (norm := _norm_before(model, widths, place))}
        seen = inputs_of(model, {*places, *branches, *norms}, batches)
        for place in [*places, *branches]:
            site, _, part = place.rpartition(".")
            bits = widths.activations[branches.get(place, place)]
            if part in MATMUL_PARTS[:3]:  # q, k and v are one tensor here
                found[place] = min_max([seen[f"{site}.{p}"] for p in MATMUL_PARTS[:3]], bits)
            elif part == "probability":
                attention = model.get_submodule(site)
                scores = seen[f"{site}.query"] @ seen[f"{site}.key"].mT * attention.softmax_scale
                scale = min_max([scores], widths.activations[f"{site}.query"]).scale
                found[place] = LogIntSoftmax(scale, min(SOFTMAX_BITS, bits))
            else:
                found[place] = min_max([seen[place]], bits)
        for norm, place in norms.items():
            found[f"{norm}.input"] = power_of_two_factors(seen[norm], widths.activations[place])
        progress(done, len(parts))
    for name in widths.linears:
        linear = model.get_submodule(name)
        linear.weight = rounded_rows(linear.weight, widths.weight(name))
    for place, quantizer in found.items():
        norm = place.removesuffix(".input")
        if isinstance(model.get_submodule(norm), nn.LayerNorm):
            model.set_submodule(norm, NormWithInput(model.get_submodule(norm)))
        model.set_submodule(place, quantizer)


def _branch_of(place: str) -> str | None:
    """Where the output of a place's linear has left its branch, before it joins the residual stream."""
    for end, branch in ((".attn.proj.input", ".drop_path1"), (".mlp.fc2.input", ".drop_path2")):
        if place.endswith(end):
            return place.removesuffix(end) + branch
    return None


def _norm_before(model: nn.Module, widths: Widths, place: str) -> str | None:
    """The LayerNorm whose output a place quantizes."""
    site = place.removesuffix(".input")
    if site == "head" and isinstance(model.get_submodule("norm"), nn.LayerNorm):
        return "norm"
    return widths.post_norms.get(site)


PRESET = Preset(
    "fq-vit",
    "Lin et al.: FQ-ViT, IJCAI 2022, arXiv:2111.13824; official code megvii-research/FQ-ViT 5bc4e4f (Apache-2.0)",
    apply,
    calibration_images=1000,
    levels="2^b; after softmax 2^4 + 1 at most (4-bit codes and a masked zero), whatever b is",
    why_simulated=(
        "quantized LayerNorm inputs and scores; one scale for q, k and v that is not symmetric; softmax's codes are "
        "logarithms of the normalised probability"
    ),
    completed=(
        "published at 8 bits; other widths are ours",
        "the skip connections stay float: LayerNorm's input and the two branches are quantized, not their sum",
        "LayerNorm computes in float between its quantized input and output, not with 8-bit multipliers",
        "left float: patch and position embeddings before their sum, and the logits",
        "scores are rounded as differences from their row's maximum, not one by one",
    ),
)
