"""Latency, images/s and peak memory of whole models against each other, in one run: candidates take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.model_candidates import AGAINST, OURS, Candidate, CannotRunError
from vitq_kernels.ops.backends import chosen_backend
from vitq_kernels.peak_memory import made_with_bytes, peak_bytes_of
from vitq_kernels.stopwatch import percentile, waiter, wall_times_us

ROUNDS, FEWEST_ROUNDS = 100, 5
BUDGET_S = 20.0  # of the rounds of one batch size, beyond the fewest


@dataclass(frozen=True)
class ModelTime:
    """A candidate at a batch size."""

    candidate: str
    batch: int
    samples_us: tuple[float, ...]  # wall time of a forward in each round, until the logits are there
    peak_bytes: int  # weights, static buffers and what a forward allocates

    @property
    def p50_ms(self) -> float:
        """Median."""
        return statistics.median(self.samples_us) / 1e3

    @property
    def p95_ms(self) -> float:
        """The time that 95 % of the forwards do not exceed."""
        return percentile(self.samples_us, 0.95) / 1e3

    @property
    def images_per_s(self) -> float:
        """At the median."""
        return self.batch / self.p50_ms * 1e3


@dataclass(frozen=True)
class ModelBench:
    """All that one run measured."""

    device: str
    backend: str  # that ran our ops
    rows: tuple[ModelTime, ...]
    skipped: dict[str, str] = field(default_factory=dict)  # candidate -> why it did not run

    def ratio(self, row: ModelTime, ours: str = OURS) -> float | None:
        """Time of a candidate over that of one of ours at the same batch: above 1 ours is faster."""
        found = (r for r in self.rows if (r.candidate, r.batch) == (ours, row.batch))
        return next((row.p50_ms / r.p50_ms for r in found), None)

    @property
    def ours(self) -> tuple[str, ...]:
        """Names of our own candidates."""
        return tuple(dict.fromkeys(r.candidate for r in self.rows if Candidate.parse(r.candidate).is_own))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready. ``over_x``: the candidate's time over that of each of our own."""
        return {
            "device": self.device,
            "backend": self.backend,
            "rows": [
                {
                    "candidate": row.candidate,
                    "batch": row.batch,
                    "p50_ms": row.p50_ms,
                    "p95_ms": row.p95_ms,
                    "images_per_s": row.images_per_s,
                    "peak_bytes": row.peak_bytes,
                    "rounds": len(row.samples_us),
                    "over_x": {name: self.ratio(row, name) for name in self.ours},
                }
                for row in self.rows
            ],
            "skipped": self.skipped,
        }

    def table(self) -> str:
        """For a reader."""
        head = f"{'batch':>5}  {'candidate':23} {'p50 ms':>9} {'p95 ms':>9} {'images/s':>9} {'peak MB':>8}"
        lines = [f"{self.device}, ours on {self.backend}", head + "".join(f"  x {name}" for name in self.ours)]
        for row in self.rows:
            numbers = f"{row.p50_ms:9.3f} {row.p95_ms:9.3f} {row.images_per_s:9.1f} {row.peak_bytes / 1e6:8.1f}"
            ratios = [(name, self.ratio(row, name)) for name in self.ours]
            over = "".join(f"  {'-' if x is None else format(x, '.2f'):>{len(name) + 2}}" for name, x in ratios)
            lines.append(f"{row.batch:5}  {row.candidate:23} {numbers}{over}")
        return "\n".join([*lines, *(f"not run: {name}: {why}" for name, why in self.skipped.items())])


@dataclass(frozen=True)
class _Ready:
    candidate: Candidate
    forward: Callable[[], Tensor]
    peak_bytes: int


def bench_models(
    qmodel: nn.Module,
    float_model: nn.Module,
    batches: Sequence[int],
    image: tuple[int, int, int],
    *,
    device: str = "cpu",
    against: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    budget_s: float = BUDGET_S,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ModelBench:
    """Times a quantized model and what it is compared with on random images.

    A round calls every candidate once, each first as often as the others; a time is a wall time from an idle device to
    the logits. All candidates of a batch size are in memory at once.

    Args:
        qmodel: from ``quantize`` or ``load``; it is copied to the device.
        float_model: of the same shape; its weights do not matter.
        batches: images a forward.
        image: C, H, W.
        device: where it runs.
        against: names as of ``Candidate.parse``; None: ``AGAINST`` of the device. Ours, eager, is always measured.
        rounds: forwards of each candidate at most; at least FEWEST_ROUNDS, fewer than ``rounds`` where ``budget_s``
            seconds a batch size do not allow more.
        budget_s: see rounds.
        seed: of the images.
        progress: called with batch sizes done and all.

    Raises:
        ValueError: no batches, one below 1, or a name that is no candidate.
        CannotRunError: ours does not run here.
    """
    kind = torch.device(device).type
    if not batches or min(batches) < 1 or rounds < 1:
        raise ValueError(f"batches and rounds must be at least 1, got {list(batches)} and {rounds}")
    names = AGAINST.get(kind, AGAINST["cpu"]) if against is None else against
    candidates = list(dict.fromkeys([Candidate(OURS), *map(Candidate.parse, names)]))
    generator, rows, skipped = torch.Generator().manual_seed(seed), [], {}
    for done, batch in enumerate(batches):
        if progress:
            progress(done, len(batches))
        images = torch.randn(batch, *image, generator=generator).to(device)
        ready = []
        for candidate in candidates:
            try:
                ready.append(_ready(candidate, qmodel, float_model, images))
            except CannotRunError as error:
                if candidate == Candidate(OURS):
                    raise
                skipped[str(candidate)] = str(error)
        rows += _timed(ready, batch, device, rounds, budget_s)
        del ready
        torch.compiler.reset()  # another batch size is another program
    return ModelBench(_device_name(device), chosen_backend("linear_codes", kind).name, tuple(rows), skipped)


def _ready(candidate: Candidate, qmodel: nn.Module, float_model: nn.Module, images: Tensor) -> _Ready:
    device = str(images.device)
    forward, held = made_with_bytes(lambda: candidate.build(qmodel, float_model, images), device)
    return _Ready(candidate, forward, held + peak_bytes_of(forward, device))


def _timed(ready: Sequence[_Ready], batch: int, device: str, rounds: int, budget_s: float) -> list[ModelTime]:
    calls = [one.forward for one in ready]
    wait = waiter(device)
    round_s = sum(samples[0] for samples in wall_times_us(calls, 1, wait)) / 1e6
    count = min(rounds, max(FEWEST_ROUNDS, int(budget_s / max(round_s, 1e-6))))
    times = wall_times_us(calls, count, wait)
    return [
        ModelTime(str(one.candidate), batch, tuple(samples), one.peak_bytes)
        for one, samples in zip(ready, times, strict=True)
    ]


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"
