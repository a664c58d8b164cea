"""``vitq allocate``: bit widths under a budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import (
    BUDGETS,
    budget,
    calibration_images,
    check_budget,
    float_model,
    plan_of,
    scores_for,
)
from vitq_kernels.cli_output import Bar, finish, wrote
from vitq_kernels.files import write_text
from vitq_kernels.strategies import WITHOUT_SCORES

MOST = 3  # sites that a line of the summary names


def allocate(
    model: options.Model,
    scores: Annotated[
        Path | None,
        typer.Option(help=f"what `vitq score` wrote for this model; not for {' and '.join(WITHOUT_SCORES)}"),
    ] = None,
    out: Annotated[Path, options.output("allocation")] = Path("bits.json"),
    mean_weight_bits: options.MeanBits = None,
    size_mb: options.SizeMb = None,
    bitops: options.BitOps = None,
    mean_act_bits: options.MeanActBits = None,
    latency_ms: options.LatencyMs = None,
    kernel_times: options.KernelTimesFile = None,
    act_bits: options.ActBits = 8,
    act_candidates: options.ActCandidates = None,
    tied: options.Tied = False,
    candidates: options.Candidates = None,
    group_rows: options.GroupRows = None,
    allocation: options.Strategy = "relevance",
    sensitivity: options.Sensitivities = None,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of images, to measure what each width costs a row; better than without")
    ] = None,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    count: options.Count = 64,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    json_file: options.Json = None,
) -> None:
    """Bit widths of least cost under one or more budgets.

    Also says how good they are, and what one bit more or less would cost at each site.
    """
    limits = budget(mean_weight_bits, size_mb, bitops, mean_act_bits, latency_ms)
    if limits is None:
        raise ValueError(f"give a budget: one or more of {BUDGETS}")
    if scores is None and allocation not in WITHOUT_SCORES:
        raise ValueError(f"--allocation {allocation} needs --scores FILE, which `vitq score` writes")
    net = float_model(model, checkpoint, pretrained)
    sites = vitq.model_sites(net)
    plan = plan_of(allocation, act_bits, tied, candidates, act_candidates, group_rows, kernel_times, sensitivity)
    check_budget(sites, limits, plan)
    relevance = None if scores is None else scores_for(sites, scores)
    images = None
    if calibration is not None:
        images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with Bar("measuring widths", None) as progress:
        bits = vitq.allocate(net, relevance, limits, images=images, seed=seed, progress=progress, **plan)
    write_text(out, bits.to_json())
    summary = f"mean weight bits {bits.mean_weight_bits(sites):.4g}, packed weights {bits.weight_bytes(sites):,} bytes"
    finish(f"{bits}\n{summary}\n{solution(bits.solver)}", json.loads(bits.to_json()), json_file)
    wrote("allocation", out)


def solution(solver: Mapping[str, Any]) -> str:
    """A few lines on how good an allocation is, what the budget is worth, and where one bit matters least and most."""
    quality = solver["status"] if not solver["gap"] else f"{solver['status']}, gap {solver['gap']:.2g}"
    lines = [f"objective {solver['objective']:.4g}: {quality}"]
    for name, price in solver["prices"].items():
        limit = solver["budget"][name]
        lines.append(f"1 % more of {name} ({limit:.6g}) would save about {price * limit / 100:.3g}")
    changes: dict[str, list[tuple[float, str]]] = {}
    for site, moves in solver["moves"].items():
        for move, change in moves.items():
            changes.setdefault(move, []).append((change, site))
    for move, found in changes.items():
        least = ", ".join(f"{site} {change:+.3g}" for change, site in sorted(found)[:MOST])
        lines.append(f"one width {move}: {least}")
    return "\n".join(lines)
