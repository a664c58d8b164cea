"""Methods side by side on one model and its images, each against its control at the same bytes.

A method that does not beat its control is of no use here, whatever its paper says. Allocations and presets are judged
against the uniform model of their width; relevance and Fisher rows also against the same relevance handed to other rows
(three permutations, their mean). Both models answer the same images, so the difference in KL is taken image by image,
and it counts where it is beyond two standard errors of its mean (methods.md 11 judges so).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vitq_kernels.calibration import calibrate
from vitq_kernels.compare_jobs import Job, plan_jobs
from vitq_kernels.compare_rows import Comparison, ComparisonRow, Verdict, image_kl, standard_error
from vitq_kernels.convert import quantize
from vitq_kernels.distributed import from_first, in_order
from vitq_kernels.models import UnsupportedModelError, answer, model_sites
from vitq_kernels.planning import allocate, measure_errors
from vitq_kernels.presets import simulate
from vitq_kernels.relevance import relevance
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.sensitivity_runs import sensitivity
from vitq_kernels.spec import BitAllocation, Budget, Site
from vitq_kernels.strategies import BY_ROW, BY_SENSITIVITY, WITHOUT_SCORES, rules_of

T = TypeVar("T")
Batches = Sequence[tuple[Tensor, Tensor | None]]


def compare(
    model: nn.Module,
    calibration: Tensor,
    batches: Batches,
    *,
    pairs: Sequence[tuple[int, int]] = (),
    means: Sequence[float] = (),
    methods: Sequence[str] | None = None,
    activation_bits: int = 8,
    seed: int = 0,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    on_row: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Makes and measures a model by every method at every width.

    Ranges, relevance, row errors, sensitivity and the float model's answers are measured once for all rows. A method
    that fails has a row with its reason, and the others go on.

    Allocations may take the bytes of the uniform model of their mean, row orders included. Presets have the widths of
    the uniform model too: patch embedding and head at 8 bits, which the papers narrow as well, so no method is worse
    here than published for that reason.

    Args:
        model: a timm VisionTransformer, all of whose parts have sites; on the device to work on. Put in eval mode.
        calibration: images float [n, C, H, W], normalised as the model expects.
        batches: (images, labels int64 [b] or None) to evaluate on, at least 2 images; gone through once a row. In an
            initialised process group they are shared between the processes (distributed.py).
        pairs: widths of weights and activations for uniform models and presets.
        means: mean widths of weights for allocations.
        methods: names of ``compare_jobs.METHODS``, None for all; controls come with what they control.
        activation_bits: of the allocations.
        seed: of the methods' random numbers; the permutations have ``seed``, ``seed + 1``, ``seed + 2``.
        batch_size: images a forward of calibration.
        cache: file of measured sensitivities, to go on from.
        progress: called with what is being done.
        on_row: called after every row with the comparison so far.

    Raises:
        ValueError: an argument is not as above, or the float model cannot answer the images.
    """
    jobs = plan_jobs(methods, pairs, means, activation_bits, seed)
    progress("float answers")
    bench = _Bench(model, calibration, batches, batch_size, cache)
    float_bytes = 4 * sum(site.rows * site.cols for site in bench.sites)
    result = Comparison(len(bench.reference), len(calibration), seed, bench.top1(bench.reference), float_bytes)
    kls: dict[tuple[str, tuple[float, int]], list[Tensor]] = {}  # by method and widths; one of every permutation
    permutations: list[ComparisonRow] = []
    for index, job in enumerate(jobs):
        row = ComparisonRow(job.label, job.weight_bits, job.activation_bits, job.executes)
        progress(f"{index + 1} of {len(jobs)}: {row.widths} {row.method}")
        controls = {name: torch.stack(found).mean(0) for name in job.controls if (found := kls.get((name, job.widths)))}
        try:
            row, kl = bench.measured(job, row, controls)
            kls.setdefault((job.method, job.widths), []).append(kl)
        except Exception as error:  # whatever ails one method must not cost the user the others
            row = replace(row, failure=" ".join(f"{type(error).__name__}: {error}".split()))
        rows = [row]
        if job.method == "random":
            permutations += [row] if row.failure is None else []
            last = ("random", job.widths) not in [(later.method, later.widths) for later in jobs[index + 1 :]]
            if last and permutations:
                kl = torch.stack(kls["random", job.widths]).mean(0)
                rows.append(_mean_row(permutations, kl, controls))
                permutations = []
        result = replace(result, rows=(*result.rows, *rows))
        on_row(result)
    return result


def _mean_row(rows: Sequence[ComparisonRow], kl: Tensor, controls: dict[str, Tensor]) -> ComparisonRow:
    """The mean of permutations, of their KL float64 [n] image by image."""

    def mean(name: str) -> Any:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values) / len(values)

    numbers = ("top1", "drop", "agreement", "mean_weight_bits", "seconds")
    return replace(
        rows[0],
        method=f"random allocation, mean of {len(rows)}",
        **{name: mean(name) for name in numbers},
        weight_bytes=round(mean("weight_bytes")),
        kl=float(kl.mean()),
        kl_error=standard_error(kl),
        verdicts=_verdicts(kl, controls),
    )


def _verdicts(kl: Tensor, controls: dict[str, Tensor]) -> tuple[Verdict, ...]:
    return tuple(Verdict.of(kl, of_control, name) for name, of_control in controls.items())


class _Bench:
    """The float model with its answers, and what methods share: each measured when a row first asks for it."""

    def __init__(
        self, model: nn.Module, calibration: Tensor, batches: Batches, batch_size: int, cache: Path | None
    ) -> None:
        self.model, self.images, self.batches = model, calibration, batches
        self.batch_size = batch_size
        self._folder = TemporaryDirectory()
        self.cache = cache or Path(self._folder.name) / "sensitivity.jsonl"
        self.sites: tuple[Site, ...] = model_sites(model)
        if not any(site.kind == "head" for site in self.sites):
            raise UnsupportedModelError(
                "compare: model must have a classifier, whose decisions are what is compared; "
                "evaluate(..., features=True) compares the features of models without one"
            )
        self.device = next(model.parameters()).device
        self.reference, self.labels = self._answers(model)
        if len(self.reference) < 2:  # a standard error needs them
            raise ValueError(f"batches must hold at least 2 images, got {len(self.reference)}")
        if self.labels is not None and int(self.labels.max()) >= self.reference.shape[1]:
            raise ValueError(f"labels must be classes below {self.reference.shape[1]}, got {int(self.labels.max())}")
        self._kept: dict[Any, tuple[Any, float]] = {}
        self._spared = 0.0  # seconds of what the row at hand found ready

    def measured(self, job: Job, row: ComparisonRow, controls: dict[str, Tensor]) -> tuple[ComparisonRow, Tensor]:
        """The row with its numbers, and the KL of every image, float64 [n]."""
        self._spared, start = 0.0, time.perf_counter()
        allocation = self.allocation(job)
        if job.kind == "preset":
            qmodel = simulate(
                self.model, self.images, job.method, allocation=allocation, seed=job.seed, batch_size=self.batch_size
            )
        else:
            stats = self._once("stats", lambda: calibrate(self.model, self.images, batch_size=self.batch_size))
            qmodel = quantize(self.model, self.images, allocation, stats=stats, batch_size=self.batch_size, strict=True)
        seconds = time.perf_counter() - start + self._spared
        logits, _ = self._answers(qmodel.to(self.device))
        kl, top1, float_top1 = image_kl(logits, self.reference), self.top1(logits), self.top1(self.reference)
        row = replace(
            row,
            top1=top1,
            drop=None if top1 is None or float_top1 is None else float_top1 - top1,
            agreement=_percent(logits.argmax(-1) == self.reference.argmax(-1)),
            kl=float(kl.mean()),
            kl_error=standard_error(kl),
            weight_bytes=allocation.weight_bytes(self.sites),
            mean_weight_bits=allocation.mean_weight_bits(self.sites),
            seconds=seconds,
            verdicts=_verdicts(kl, controls),
        )
        return row, kl

    def allocation(self, job: Job) -> BitAllocation:
        """Widths of every site."""
        if job.kind != "allocation":
            return BitAllocation.uniform(self.sites, int(job.weight_bits), job.activation_bits)
        scores = None
        if job.method not in WITHOUT_SCORES:
            rules = rules_of(job.method)  # type: ignore[arg-type]
            scores = self._once(
                rules,
                lambda: relevance(self.model, self.images, method=rules, batch_size=self.batch_size),  # type: ignore[arg-type]
            )
        errors = None
        if job.method in BY_ROW:
            bits = job.activation_bits
            errors = self._once(
                f"errors at A{bits}", lambda: measure_errors(self.model, self.images, activation_bits=bits)
            )
        solve = partial(
            allocate,
            self.model,
            scores,
            Budget(size_mb=equal_bytes(self.sites, job.weight_bits) / 1e6),
            activation_bits=job.activation_bits,
            errors=errors,
            strategy=job.method,  # type: ignore[arg-type]
            sensitivity=[self._sensitivity(pairs=job.method == "mix-qvit")] if job.method in BY_SENSITIVITY else (),
            seed=job.seed,
        )
        return from_first(solve)  # by one process: under a time limit others might find others

    def _sensitivity(self, pairs: bool) -> Sensitivity:
        """Of the weights. Pairs go on from the file of the sites alone."""
        measure = partial(sensitivity, self.model, self.images, batch_size=self.batch_size, cache=self.cache)
        alone = self._once("sensitivity", measure)
        return self._once("pairs", lambda: measure(pairs=True)) if pairs else alone

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name in self._kept:
            value, seconds = self._kept[name]
            self._spared += seconds
            return value
        start = time.perf_counter()
        value = make()
        self._kept[name] = value, time.perf_counter() - start
        return value

    @torch.inference_mode()
    def _answers(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Logits float32 [n, classes] on the CPU, and labels int64 [n] where all images have one."""
        model.eval()

        def logits_of(batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            return answer(model, batch[0].to(self.device)).float().cpu(), batch[1]

        logits, labels = zip(*in_order(self.batches, logits_of), strict=True)
        result = torch.cat(logits)
        if not bool(torch.isfinite(result).all()):
            raise ValueError("the model answers NaN or Inf")
        return result, None if any(label is None for label in labels) else torch.cat(labels)

    def top1(self, logits: Tensor) -> float | None:
        """Percent of the labels, None without."""
        return None if self.labels is None else _percent(logits.argmax(-1) == self.labels)


def equal_bytes(sites: Sequence[Site], mean: float) -> int:
    """Bytes of the uniform model of a width, or in proportion between those of the two whole widths around a mean.

    What an allocation spends on row orders it has to spare elsewhere.
    """
    low, high = (BitAllocation.uniform(sites, bits).weight_bytes(sites) for bits in (int(mean), math.ceil(mean)))
    return low + int((high - low) * (mean - int(mean)))


def _percent(hits: Tensor) -> float:
    return 100.0 * int(hits.sum()) / len(hits)
