"""What is remembered of an activation: candidate ranges per channel, and first and second moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitq_kernels.config import MINMAX_BITS, QuantConfig
from vitq_kernels.quantizers import log2_levels, log2_steps, quantization_error
from vitq_kernels.spec import MAX_BITS, MIN_BITS

# Candidate ranges: RepQ-ViT's percentiles; below .999 hurt end to end at W4A4 (methods.md 3).
PERCENTILES = (0.999, 0.9999, 1.0)
WIDTHS = tuple(range(MIN_BITS, MAX_BITS + 1))
ERROR_TOKENS = 2048  # tokens of the sample on which squared errors are measured


@dataclass(frozen=True)
class RangeStats:
    """Candidate ranges of one tensor, per channel, and what each would cost."""

    low: Tensor  # float32 [P, C], quantile 1 - p for each of PERCENTILES
    high: Tensor  # float32 [P, C], quantile p
    error: Tensor  # float32 [len(WIDTHS), P, C], mean squared error of quantizing over that range at that width

    def choose(self, bits: int, config: QuantConfig) -> tuple[Tensor, Tensor]:
        """The range [low, high], each [C], that the configured observer takes at a width."""
        observer = config.observer or ("minmax" if bits >= MINMAX_BITS else "mse")
        if observer == "mse":
            index = self.error[bits - MIN_BITS].argmin(0)
        else:
            wanted = 1.0 if observer == "minmax" else config.percentile
            nearest = min(range(len(PERCENTILES)), key=lambda i: abs(PERCENTILES[i] - wanted))
            index = torch.full_like(self.low[0], nearest, dtype=torch.long)
        return self.low.gather(0, index[None])[0], self.high.gather(0, index[None])[0]


@dataclass
class ChannelSample:
    """Running extremes and sum of a tensor's channels, and a sample of its tokens."""

    low: Tensor  # [C]
    high: Tensor  # [C]
    total: Tensor  # float64 [C]
    count: int = 0
    tokens: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> ChannelSample:
        """A sample of nothing."""
        infinite = torch.full((channels,), torch.inf, device=device)
        return cls(infinite, -infinite, torch.zeros(channels, dtype=torch.float64, device=device))

    def add(self, x: Tensor, keep: int, generator: torch.Generator) -> None:
        """Adds x [T, C] and keeps at most ``keep`` of its tokens; raises ValueError for NaN or Inf."""
        total = x.double().sum(0)
        if not bool(torch.isfinite(total).all()):
            raise ValueError("calibration: activations must be finite, got NaN or Inf; check weights and images")
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        self.total = self.total + total
        self.count += x.shape[0]
        if x.shape[0] > keep:
            x = x[torch.randperm(x.shape[0], generator=generator)[:keep].to(x.device)]
        self.tokens.append(x.clone())

    @property
    def mean(self) -> Tensor:
        """Mean over all tokens, float32 [C]."""
        return (self.total / self.count).float()

    def ranges(self) -> RangeStats:
        """Per-channel candidate ranges; the widest is the true minimum and maximum."""
        x = torch.cat(self.tokens)
        channels, last = x.t().contiguous(), x.shape[0] - 1
        low_places = [round((1 - p) * last) for p in PERCENTILES]
        high_places = [last - round(p * last) for p in PERCENTILES]
        # Only the outer thousandths are asked for; a full sort took a sixth of a conversion's time.
        smallest = channels.topk(max(low_places) + 1, largest=False).values
        largest = channels.topk(max(high_places) + 1).values
        both = zip(PERCENTILES, low_places, high_places, strict=True)
        bounds = [(self.low, self.high) if p == 1.0 else (smallest[:, i], largest[:, j]) for p, i, j in both]
        low, high = (torch.stack(bound) for bound in zip(*bounds, strict=True))
        probe = x[:: max(1, x.shape[0] // ERROR_TOKENS)]
        error = [[quantization_error(probe, a, b, bits) for a, b in zip(low, high, strict=True)] for bits in WIDTHS]
        return RangeStats(low, high, torch.stack([torch.stack(e) for e in error]))


@dataclass
class InputMoments:
    """Mean and second moment of a linear's input, token by token weighted.

    Sums run over ``x - origin``: far from zero the squares would drown the variance in float32's rounding.
    """

    origin: Tensor  # float32 [K], mean of the first batch
    total: Tensor  # float64 [K], sum of x - origin
    square: Tensor  # float64 [K, K], sum of w * (x - origin) (x - origin)^T
    weighted: Tensor  # float64 [K], sum of w * (x - origin)
    count: int = 0
    mass: float = 0.0  # sum of w

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> InputMoments:
        """Moments of nothing."""
        zero = torch.zeros(channels, dtype=torch.float64, device=device)
        return cls(zero.float(), zero, zero.diag(), zero)

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Adds x float32 [T, K], token t counting ``weight[t]`` times in the second moment."""
        if not self.count:
            self.origin = x.double().mean(0).float()
        weight = torch.ones(x.shape[0], device=x.device) if weight is None else weight
        x = x - self.origin
        scaled = x * weight[:, None]
        self.square = self.square + (scaled.t() @ x).double()
        self.weighted = self.weighted + scaled.double().sum(0)
        self.total = self.total + x.double().sum(0)
        self.count += x.shape[0]
        self.mass += float(weight.double().sum())

    @property
    def mean(self) -> Tensor:
        """Unweighted mean, float64 [K]."""
        return self.origin.double() + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Weighted second moment about the unweighted mean, float64 [K, K]: what a bias cannot make good."""
        mean, drift = self.total / self.count, self.weighted / self.mass
        cross = torch.outer(mean, drift)
        return self.square / self.mass - cross - cross.t() + torch.outer(mean, mean)


def tau_errors(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | Tensor, bias: Tensor | None = None) -> Tensor:
    """Squared error of the attention output for every width and step of the log2 code (semantics S4).

    Args:
        q, k, v: float32 [..., H, S, D].
        softmax_scale: factor of the scores; [H, 1, 1] where every head has its own.
        bias: added to the logits, broadcasts to [..., H, S, S]; or None.

    Returns:
        float32 [len(WIDTHS), 5, H]; infinite where a width has fewer than 5 steps (quantizers.log2_steps).
    """
    octaves = (q @ k.transpose(-2, -1)) * (softmax_scale * math.log2(math.e))
    if bias is not None:
        octaves = octaves + bias * math.log2(math.e)
    distance = octaves.amax(-1, keepdim=True) - octaves
    exact = torch.softmax(octaves * math.log(2), -1) @ v
    result = torch.full((len(WIDTHS), 5, q.shape[-3]), torch.inf)
    for i, bits in enumerate(WIDTHS):
        for j, tau in enumerate(log2_steps(bits)):
            levels = log2_levels(bits, tau).to(v)
            codes = (distance / tau).round_().clamp_(max=levels.numel() - 1).int()
            probability = levels[codes]
            out = (probability @ v) / probability.sum(-1, keepdim=True)
            result[i, j] = (out - exact).square().movedim(-3, 0).flatten(1).mean(1)
    return result
