"""What conversion makes of a site at a width, in float: rounded weights and fake quantizers of a simulated model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitq_kernels.calibration import calibrate, input_covariances
from vitq_kernels.config import LEVEL_BITS, QuantConfig
from vitq_kernels.levels import LevelHistogram, level_scale
from vitq_kernels.models import model_parts
from vitq_kernels.quantizers import AffineQuantizer, affine_quantizer, log2_levels, log2_steps, query_key_scales
from vitq_kernels.rounding import gptq, round_to_nearest, weight_scale
from vitq_kernels.sensitivity import Part
from vitq_kernels.spec import MAX_BITS, MIN_BITS, QuantFormat, Site


class FakeAffine(nn.Module):
    """``scale * (clamp(rint(x / scale + zero_point)) - zero_point)``; the zero point need not be an integer."""

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int) -> None:
        super().__init__()
        self.format = QuantFormat(bits)
        self.register_buffer("scale", scale)  # both broadcast against the input
        self.register_buffer("zero_point", zero_point.float())

    def forward(self, x: Tensor) -> Tensor:
        """Float, same shape."""
        codes = (x / self.scale).add_(self.zero_point).round_().clamp_(self.format.qmin, self.format.qmax)
        return codes.sub_(self.zero_point).mul_(self.scale)


class FakeLevels(nn.Module):
    """The nearest of a few integer levels, in units of ``scale`` by channel (semantics S2, gelu levels)."""

    def __init__(self, scale: Tensor, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)  # [K]
        self.register_buffer("levels", levels.float())  # [2^bits], ascending
        self.register_buffer("thresholds", (self.levels[1:] + self.levels[:-1]) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K], same shape."""
        return self.levels[torch.searchsorted(self.thresholds, x / self.scale, right=True)].to(x.dtype) * self.scale


class FakeLog2(nn.Module):
    """Semantics S4 on probabilities: log2 codes relative to a row's maximum, rows that add up to 1 again."""

    def __init__(self, bits: int, tau: Sequence[float], device: torch.device) -> None:
        super().__init__()
        levels = torch.stack([log2_levels(bits, step) for step in tau]).float()
        self.last = levels.shape[1] - 1
        self.register_buffer("levels", levels.flatten().to(device))  # [H * 2^bits]
        self.register_buffer("tau", torch.tensor(tau, device=device)[:, None, None])  # octaves a code, [H, 1, 1]
        self.register_buffer("start", (torch.arange(len(tau), device=device) << bits)[:, None, None])

    def forward(self, probability: Tensor) -> Tensor:
        """[B, H, S, S] in [0, 1] to [B, H, S, S]."""
        octaves = probability.amax(-1, keepdim=True).log2() - probability.log2()
        codes = octaves.div_(self.tau).round_().clamp_(max=self.last).long().add_(self.start)
        level = self.levels.to(probability.dtype).take(codes)
        return level.div_(level.sum(-1, keepdim=True))


@dataclass(frozen=True)
class SiteForm:
    """How a site computes at a width: what takes the place of its modules in a simulated model."""

    weight: Tensor | None  # of the site's module; None: the site has none
    quantizers: Mapping[str, nn.Module]  # by their paths in the simulated model

    def put(self, site: str, model: nn.Module) -> None:
        """Into a simulated model."""
        if self.weight is not None:
            model.get_submodule(site).weight = self.weight
        for path, quantizer in self.quantizers.items():
            model.set_submodule(path, quantizer)


class SiteQuantizers:
    """Makes the form of any site at any width from a few images of calibration."""

    def __init__(self, model: nn.Module, batches: list[Tensor], part: Part, config: QuantConfig) -> None:
        self.parts = model_parts(model, strict=True)
        self.blocks = {block.name: block for block in self.parts.blocks}
        self.modules = {self.parts.patch_name: self.parts.patch_proj, **self.parts.linears, **self.parts.heads}
        self.part = part
        self.config = config
        self.stats = calibrate(model, batches)
        self.covariances = {} if part == "activation" else input_covariances(model, batches)
        self.histograms: dict[str, LevelHistogram] = {}
        if part != "weight" and config.gelu_levels:
            self._watch_gelu(batches)

    def form(self, site: Site, bits: int | None) -> SiteForm:
        """Of the part that is looked at; ``bits`` None for float. The other part stays as it is in float."""
        weight = None
        quantizers: dict[str, nn.Module] = {}
        if self.part != "activation" and site.has_weight:
            module = self.modules[site.name]
            weight = module.weight.detach() if bits is None else self.weight(site, module, bits)
        if self.part != "weight":
            if site.has_weight:
                quantizers = {f"{site.name}.input": nn.Identity() if bits is None else self.input(site, bits)}
            else:
                attention = site.name.rpartition(".")[0]
                names = ("query", "key", "value") if site.kind == "qk" else ("probability",)
                quantizers = {f"{attention}.{name}": nn.Identity() for name in names}
                if bits is not None:
                    made = self.codes(attention, bits) if site.kind == "qk" else [self.log2(attention, bits)]
                    quantizers = dict(zip(quantizers, made, strict=True))
        return SiteForm(weight, quantizers)

    def input_quantizer(self, site: Site, bits: int) -> AffineQuantizer:
        """Of a linear's input, per channel."""
        config = self.config
        exponent = config.exponent(site.kind, bits)
        return affine_quantizer(*self.stats.inputs[site.name].choose(bits, config), bits, exponent)

    def _watch_gelu(self, batches: list[Tensor]) -> None:
        """Histograms of what enters every fc2, as conversion makes them of its own stream."""
        handles = []
        for block in self.parts.blocks:
            if block.mlp.gelu is None:
                continue
            site = f"{block.name}.mlp.fc2"
            histogram, scale = self.histograms.setdefault(site, LevelHistogram()), self.level_scale(site)
            channels = (block.mlp.fc2.weight.detach().float() * scale).square().sum(0)

            def hook(
                _: nn.Module,
                args: tuple[Tensor, ...],
                histogram: LevelHistogram = histogram,
                scale: Tensor = scale,
                channels: Tensor = channels,
            ) -> None:
                tokens = torch.ones(args[0].shape[:-1], device=args[0].device)
                tokens[:, : self.parts.read_tokens] = self.config.class_token_weight
                histogram.add(args[0].float() / scale, tokens[..., None] * channels)

            handles.append(block.mlp.fc2.register_forward_pre_hook(hook))
        try:
            with torch.no_grad():
                for batch in batches:
                    self.parts.model(batch)
        finally:
            for handle in handles:
                handle.remove()

    def level_scale(self, site: str) -> Tensor:
        """Of an fc2's inputs, [K]."""
        return level_scale(self.stats.inputs[site].low[-1], self.stats.inputs[site].high[-1])

    def input(self, site: Site, bits: int) -> nn.Module:
        """What conversion makes of a linear's input: levels for few bits after GELU, else ``input_quantizer``."""
        if bits <= LEVEL_BITS and site.name in self.histograms:
            scale = self.level_scale(site.name)
            return FakeLevels(scale, self.histograms[site.name].best_levels(1 << bits).to(scale.device))
        quantizer = self.input_quantizer(site, bits)
        shape = (-1, 1, 1) if site.kind == "patch_embed" else (-1,)
        return FakeAffine(quantizer.scale.view(shape), quantizer.zero_point.view(shape), bits)

    def weight(self, site: Site, module: nn.Module, bits: int) -> Tensor:
        """Symmetric codes per row times their scale, in the shape and dtype of the float weight.

        As in conversion the columns carry the scales of the input, here of the one at 8 bits, while they are rounded:
        in the blocks against the covariance of the float input (GPTQ), elsewhere to nearest.
        """
        columns = self.input_quantizer(site, MAX_BITS).scale
        columns = columns.repeat_interleave(site.cols // columns.numel())
        folded = module.weight.detach().flatten(1).float() * columns
        row_bits = torch.full((site.rows,), bits, device=folded.device)
        scale = weight_scale(folded, row_bits)
        if self.config.gptq and site.name in self.covariances:
            inverse = 1.0 / columns.double()
            moment = self.covariances[site.name] * torch.outer(inverse, inverse)
            codes = gptq(folded, scale, row_bits, moment)
        else:
            codes = round_to_nearest(folded, scale, row_bits)
        return (codes.float() * scale[:, None] / columns).view(module.weight.shape).to(module.weight.dtype)

    def codes(self, attention: str, bits: int) -> list[FakeAffine]:
        """Of q, k and v: symmetric, k about its mean, v about the middle of its range; q and k equalised."""
        block = self.blocks[attention.rpartition(".")[0]]
        low, high = self.stats.qkv[f"{attention}.qkv"].choose(bits, self.config)
        _, key_mean, _ = self.stats.mean_of_qkv(f"{attention}.qkv").chunk(3)
        middle = ((low + high) / 2).chunk(3)[2]
        centres = (torch.zeros_like(middle), key_mean, middle)
        radii = torch.maximum((low - torch.cat(centres)).abs(), (high - torch.cat(centres)).abs()).chunk(3)
        q_scale, k_scale, _ = query_key_scales(radii[0], radii[1], block.attn.num_heads, bits)
        v_scale = affine_quantizer(-radii[2], radii[2], bits).scale
        shape = (block.attn.num_heads, 1, block.attn.head_dim)
        return [
            FakeAffine(scale.view(shape), (-centre / scale).view(shape), bits)
            for scale, centre in zip((q_scale, k_scale, v_scale), centres, strict=True)
        ]

    def log2(self, attention: str, bits: int) -> FakeLog2:
        """Of the probabilities, with the step per head that changes the calibrated outputs least."""
        errors = self.stats.tau_error[f"{attention}.av"][bits - MIN_BITS]
        tau = [log2_steps(bits)[index] for index in errors.argmin(0).tolist()]
        return FakeLog2(bits, tau, self.parts.patch_proj.weight.device)
