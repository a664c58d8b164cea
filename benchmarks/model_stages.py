"""The stages of whole models in ``benchmarks.device_check``: where a forward's time goes, and ours beside FP16.

A job of ``whole_models`` is a run of ``bench_model`` at one batch size. What compiles comes after what does not, and
ViT-B first. A call goes on with the jobs that an earlier one left; the rows are also in the form of ``results/``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn

from benchmarks.bench_model import MODELS, SEED, quantized, rows_of
from benchmarks.ceilings import HEADLINE_PEAKS
from benchmarks.device_check import CheckFailed, NotRun, StageRun
from benchmarks.device_plots import candidates_plot
from benchmarks.kernel_backend import KernelBackend
from benchmarks.kernel_stages import kept_data, kernel_backends, need_gpu
from benchmarks.measured_case import setting_here
from benchmarks.microbench import Row, clocks, select, target
from benchmarks.result_rows import file_of, origin, record
from benchmarks.vit_shapes import CHANNELS_IN
from vitq_kernels.kernel_profile import profile_forward
from vitq_kernels.kernel_profile_plot import write_profile_plot
from vitq_kernels.model_bench import ROUNDS, ModelBench, bench_models
from vitq_kernels.model_candidates import OURS, Candidate
from vitq_kernels.ops import use_backend
from vitq_kernels.roofline import Peaks, measured_peaks, peaks_of

BITS = (8, 8)  # of weights and activations
CAPTURED, FUSED = "ours-captured", "ours_fused-captured"
# Names of candidates by what a job compiles; ours, eager, is always there.
KINDS = {
    "eager and captured": (CAPTURED, "float16", "bfloat16", "float16-captured"),
    "compiled": (CAPTURED, "float16", "float16-captured", "float16-compiled"),
    "max-autotune": (CAPTURED, "float16-captured", "float16-compiled", "float16-max-autotune"),
    "fused": (CAPTURED, FUSED),
}
# Of the first job of a kind.
GUESSED_S = {"eager and captured": 12.0, "compiled": 45.0, "max-autotune": 90.0, "fused": 6.0}
FUSED_MODELS, FUSED_BATCH = ("ViT-B", "ViT-L"), 8  # where one launch is expected to win, backend cuda's on Hopper
FIRST_BATCHES = (64, 8, 1, 256)  # the most valuable first
OTHERS = ("ViT-S", "ViT-T", "ViT-L")
BUDGET_S, RESERVE_S = 3.0, 5.0
FLOOR_OVER_FP16 = {1: 1.15, 8: 1.4, 64: 1.6, 256: 1.7}  # kernels.md 5.4, ViT-B over FP16 compiled and in a graph
PROFILED_BATCHES = (64, 1)
TINY = "tiny"  # of a dry run
TINY_SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}


@dataclass(frozen=True)
class Job:
    """A model at a batch size, with one of our backends, beside the candidates of a kind."""

    model: str
    batch: int
    backend: str
    kind: str

    @property
    def key(self) -> dict[str, Any]:
        """Columns of its rows."""
        return {"model": self.model, "batch": self.batch, "backend": self.backend, "kind": self.kind}


def plan(backends: Sequence[str]) -> list[Job]:
    """The most valuable first: ViT-B at batch 64, at the others, with the other backends, tuned, the other models."""
    first, *others = backends
    eager, compiled, tuned, fused = KINDS
    jobs = [Job("ViT-B", FIRST_BATCHES[0], first, kind) for kind in (eager, compiled)]
    jobs += [Job("ViT-B", batch, first, kind) for kind in (eager, compiled) for batch in FIRST_BATCHES[1:]]
    jobs += [Job("ViT-B", batch, other, eager) for other in others for batch in FIRST_BATCHES]
    jobs += [Job("ViT-B", batch, first, tuned) for batch in FIRST_BATCHES]
    jobs += [Job(model, FUSED_BATCH, first, fused) for model in FUSED_MODELS if first == "cuda"]
    kinds = (eager, compiled, tuned)
    return jobs + [Job(model, batch, first, kind) for model in OTHERS for kind in kinds for batch in FIRST_BATCHES]


@dataclass
class Pairs:
    """Float models and their quantized forms, the last one kept."""

    made: dict[str, tuple[nn.Module, nn.Module]] = field(default_factory=dict)

    def get(self, name: str) -> tuple[nn.Module, nn.Module]:
        """(quantized, float) of a name of ``MODELS``, or of TINY.

        One block is quantized, and copies of it stand for the others: as much work and memory, in a tenth of the time.
        """
        if name not in self.made:
            model, one = float_vit(name), quantized(float_vit(name, depth=1), *BITS)
            one.blocks = nn.Sequential(*(copy.deepcopy(one.blocks[0]) for _ in model.blocks))
            self.made = {name: (one, model)}
        return self.made[name]


def float_vit(name: str, **arguments: Any) -> nn.Module:
    """timm's model with random weights; ``arguments`` are timm's."""
    torch.manual_seed(SEED)
    timm_name, given = (MODELS["ViT-T"], TINY_SIZES | arguments) if name == TINY else (MODELS[name], arguments)
    model: nn.Module = timm.create_model(timm_name, **given).eval()
    return model


def whole_models(run: StageRun) -> None:
    """Ours eager and captured beside FP16 and BF16, eager, compiled and captured."""
    need_gpu(run)
    backends = [backend.name for backend in kernel_backends(run)]
    if not backends:
        raise NotRun("neither backend of our kernels runs on this GPU")
    jobs = plan(backends)
    run.keep(backends=", ".join(backends), clocks_before=clocks())
    if run.dry_run:
        run.keep(on_a_gpu=f"{len(jobs)} jobs, the first: {jobs[0].key}; candidates: {KINDS}")
        jobs = [Job(TINY, batch, backends[0], "eager and captured") for batch in (2, 1)]
    try:
        Comparison(run, "cpu" if run.dry_run else "cuda").measure(jobs)
    finally:
        run.keep(clocks_after=clocks())


class Comparison:
    """One run of the jobs; rows are kept as they come."""

    def __init__(self, run: StageRun, device: str) -> None:
        self.run, self.device, self.pairs = run, device, Pairs()
        earlier = kept_data(run, "whole_models")
        self.rows: list[Row] = [] if run.dry_run else earlier.get("rows", [])
        self.skipped: list[Row] = [] if run.dry_run else earlier.get("skipped", [])
        self.seconds: dict[str, list[float]] = {}

    def measure(self, jobs: Sequence[Job]) -> None:
        """Runs the jobs that have no rows yet, as far as time goes.

        Raises:
            CheckFailed: a job failed, or time ran out before some.
        """
        failed: list[Row] = []
        left_out: list[str] = []
        self.keep(failed, left_out)  # what an earlier call measured
        for job in (job for job in jobs if not select(self.rows, **job.key)):
            if self.run.left_s < RESERVE_S + max(self.seconds.get(job.kind, [GUESSED_S[job.kind]])):
                left_out.append(" ".join(map(str, job.key.values())))
                continue
            start = time.monotonic()
            try:
                self.job(job)
            except Exception as error:  # such as too little memory: the others are measured all the same
                failed.append({**job.key, "why": f"{type(error).__name__}: {error}"[:300]})
            self.seconds.setdefault(job.kind, []).append(time.monotonic() - start)
            self.keep(failed, left_out)
        self.keep(failed, left_out)
        reasons = [f"failed: {', '.join(str(row['why']) for row in failed)}"] if failed else []
        if left_out:
            reasons.append(f"time ran out before {len(left_out)} of {len(jobs)} jobs: {', '.join(left_out)}")
        if reasons:
            raise CheckFailed("; ".join(reasons))

    def job(self, job: Job) -> None:
        """Measures one, and adds its rows here and to the results file beside ``device.json``."""
        qmodel, model = self.pairs.get(job.model)
        image = (CHANNELS_IN, *model.patch_embed.img_size)
        with use_backend(job.backend):
            found = bench_models(
                qmodel,
                model,
                [job.batch],
                image,
                device=self.device,
                against=KINDS[job.kind],
                rounds=1 if self.run.dry_run else ROUNDS,
                budget_s=BUDGET_S,
                seed=SEED,
            )
        self.rows += rows_of_job(job, found)
        self.skipped += [{**job.key, "candidate": name, "why": why} for name, why in found.skipped.items()]
        setting = setting_here()
        record(
            self.run.path.parent / file_of(setting.name),
            rows_of(job.model, found, BITS, setting.name, origin(setting.driver)),
            overwrite=True,
        )

    def keep(self, failed: Sequence[Row], left_out: Sequence[str]) -> None:
        """Keeps the rows and what follows from them."""
        targets = over_fp16(self.rows)
        measured = [row for row in targets if row["measured"]]
        text = ", ".join(f"{row['target']} {row['measured']:.2f}x ({row['result']})" for row in measured)
        plots = [candidates_plot(self.rows, self.run.path.parent)] if self.rows else []
        self.run.keep(
            headline=text or f"{len(self.rows)} rows",
            plots=plots,
            targets=targets,
            rows=self.rows,
            skipped=self.skipped,
            failed=list(failed),
            left_out=list(left_out),
        )


def rows_of_job(job: Job, found: ModelBench) -> list[Row]:
    """A row a candidate; ``over_...``: its time over that of ours, above 1 ours is faster."""
    rows = []
    for row in found.to_dict()["rows"]:
        over = row["over_x"]
        numbers = {name: row[name] for name in ("candidate", "p50_ms", "p95_ms", "images_per_s")}
        ratios = {"over_ours_x": over.get(OURS), "over_captured_x": over.get(CAPTURED)}
        rows.append({**job.key, **numbers, "peak_mb": row["peak_bytes"] / 1e6, **ratios})
    return rows


def over_fp16(rows: Sequence[Row]) -> list[Row]:
    """The floors of ViT-B: ours captured over the fastest FP16 of a run that had it compiled."""
    found = []
    for batch, bound in FLOOR_OVER_FP16.items():
        ratios = []
        for kind in ("compiled", "max-autotune"):
            runs = [row for row in select(rows, model="ViT-B", batch=batch, kind=kind) if row["over_captured_x"]]
            fp16 = [row["over_captured_x"] for row in runs if row["candidate"].startswith("float16")]
            ratios += [min(fp16)] if fp16 else []
        value = ratios[-1] if ratios else None  # the run with the most candidates
        found.append(target(f"ViT-B batch {batch} over the fastest FP16", value, bound, at_least=True))
    return found


def kernel_profiles(run: StageRun) -> None:
    """Each kernel's share of a forward of ViT-B and its distance to the roofline, for ours and for FP16."""
    need_gpu(run)
    device = "cpu" if run.dry_run else "cuda"
    dtype = Candidate(OURS).dtype(device)
    peaks = peaks_here(run, device, dtype)
    of = TINY if run.dry_run else "ViT-B"
    qmodel, model = Pairs().get(of)
    rows: list[Row] = []
    plots: list[str] = []
    headlines: list[str] = []
    run.keep(roofline=str(peaks), **({"on_a_gpu": f"ViT-B at batch {PROFILED_BATCHES}"} if run.dry_run else {}))
    backends: list[KernelBackend | None] = [*kernel_backends(run), None]
    for batch in PROFILED_BATCHES[1:] if run.dry_run else PROFILED_BATCHES:
        images = torch.randn(batch, CHANNELS_IN, *model.patch_embed.img_size).to(device, dtype)
        for backend in backends:
            name = backend.name if backend else str(dtype).removeprefix("torch.")
            with use_backend(backend.name) if backend else nullcontext():
                moved = (qmodel if backend else model).to(device, dtype).eval()
                found = profile_forward(moved, images, peaks, f"{of}, {name}")
            plots.append(f"profile-{name}-{batch}.png")
            write_profile_plot(found, run.path.parent / plots[-1])
            print(found.table(), flush=True)
            what = {"model": name, "batch": batch}
            rows += [{**what, **op} for op in found.to_dict()["ops"]]
            first = found.ops[0]
            headlines.append(
                f"{name} batch {batch}: {found.busy_us:.0f} us in kernels of {found.wall_us:.0f}, most in {first.op} "
                f"({found.share(first):.0f} %, {first.pct_of_roofline:.0f} % of the roofline)"
            )
            run.keep(headline="; ".join(headlines), plots=plots, rows=rows)


def peaks_here(run: StageRun, device: str, dtype: torch.dtype) -> Peaks:
    """What stage ``ceilings`` measured, else the datasheet's, else what torch reaches."""
    kept = kept_data(run, "ceilings")
    rates = [kept.get(name) for name in HEADLINE_PEAKS]
    if not run.dry_run and all(rates):
        return Peaks(*rates)
    known = peaks_of(torch.cuda.get_device_name()) if device == "cuda" else None
    return known or measured_peaks(device, dtype)
