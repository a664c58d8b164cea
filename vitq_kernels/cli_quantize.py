"""``vitq quantize``: from a float model and calibration images to a quantized file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import (
    BUDGETS,
    allocation_for,
    budget,
    calibration_images,
    check_budget,
    float_model,
    integer_sites,
    overrides,
    plan_of,
)
from vitq_kernels.cli_output import Bar, finish, shown
from vitq_kernels.cli_quantized import facts, write_quantized
from vitq_kernels.costs import CANDIDATES
from vitq_kernels.planning import choose_activations
from vitq_kernels.presets import simulate
from vitq_kernels.rotation import rotate
from vitq_kernels.sensitivity_runs import sensitivity as measure_sensitivity
from vitq_kernels.strategies import BY_SENSITIVITY, WITHOUT_SCORES, parts_of, rules_of

PAIR_WIDTHS = (2, 3, 4)  # where pairs of sites are measured: two sites interact most at narrow widths


def quantize(
    model: options.Model,
    calibration: options.Calibration,
    out: Annotated[Path, options.output("quantized model")] = Path("q.safetensors"),
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    weight_bits: options.WeightBits = None,
    mean_weight_bits: options.MeanBits = None,
    size_mb: options.SizeMb = None,
    bitops: options.BitOps = None,
    mean_act_bits: options.MeanActBits = None,
    latency_ms: options.LatencyMs = None,
    kernel_times: options.KernelTimesFile = None,
    bits: Annotated[Path | None, typer.Option(help="what `vitq allocate` wrote for this model")] = None,
    act_bits: options.ActBits = 8,
    act_candidates: options.ActCandidates = None,
    tied: options.Tied = False,
    candidates: options.Candidates = None,
    group_rows: options.GroupRows = None,
    allocation: options.Strategy = "relevance",
    sensitivity: options.Sensitivities = None,
    count: options.Count = 64,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    method: options.Method = None,
    rotated: Annotated[
        bool, typer.Option("--rotate", help="rotate the residual stream first, so that no channel stands out")
    ] = False,
    reconstruct: Annotated[
        int, typer.Option(callback=options.whole(0), help="iterations that fit each block's scales and biases; 0: none")
    ] = 0,
    json_file: options.Json = None,
) -> None:
    """Calibrates, allocates if asked to, and quantizes.

    Widths come from exactly one of --weight-bits, --bits and a budget (--mean-weight-bits, --size-mb, --bitops,
    --mean-act-bits, --latency-ms). Scores, and a sensitivity that --allocation needs and --sensitivity does not give,
    are measured on the calibration images.
    With --method the result is that method's model in float simulation, not integers; --weight-bits is then the width
    of patch embedding and head too, as published.
    """
    limits = budget(mean_weight_bits, size_mb, bitops, mean_act_bits, latency_ms)
    if sum((weight_bits is not None, limits is not None, bits is not None)) != 1:
        raise ValueError(f"give exactly one of --weight-bits, --bits and a budget ({BUDGETS})")
    if method is not None and reconstruct:
        raise ValueError("--reconstruct fits integer blocks, --method makes none")
    net = float_model(model, checkpoint, pretrained)
    sites = integer_sites(net)
    if rotated:
        net = rotate(net, seed)
    if bits is not None:
        widths = allocation_for(sites, bits)
    elif weight_bits is not None:
        widths = vitq.BitAllocation.uniform(sites, weight_bits, act_bits)
    else:
        plan = plan_of(allocation, act_bits, tied, candidates, act_candidates, group_rows, kernel_times, sensitivity)
        check_budget(sites, limits, plan)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    if limits is not None:
        widths = allocated(net, images, limits, plan, seed, batch)
    with Bar("quantizing", len(sites)) as progress:
        if method is None:
            config = vitq.QuantConfig(reconstruction=reconstruct)
            qmodel = vitq.quantize(net, images, widths, config=config, batch_size=batch, progress=progress)
        elif weight_bits is None:
            qmodel = simulate(net, images, method, allocation=widths, seed=seed, batch_size=batch, progress=progress)
        else:
            qmodel = simulate(
                net, images, method, weight_bits, act_bits, seed=seed, batch_size=batch, progress=progress
            )
    # MODEL with its tag, so that `vitq eval --pretrained` fetches the same weights.
    qmodel.pretrained_cfg = {**(net.pretrained_cfg or {}), "architecture": model, **overrides(mean, std, crop)}
    write_quantized(qmodel, out)
    result = {"model": model, "out": str(out), "calibration_images": len(images), **facts(qmodel)}
    finish(shown(result), result, json_file)


def allocated(
    net: nn.Module, images: Tensor, limits: vitq.Budget, plan: dict[str, Any], seed: int, batch: int
) -> vitq.BitAllocation:
    """Widths under a budget, after measuring what the strategy needs."""
    strategy, scores = plan["strategy"], None
    if strategy not in WITHOUT_SCORES:
        with Bar("scoring", len(images)) as progress:
            scores = vitq.relevance(net, images, method=rules_of(strategy), batch_size=batch, progress=progress)
    measured = list(plan["sensitivity"])
    if strategy in BY_SENSITIVITY:
        chosen = choose_activations(limits, plan["tied"], plan["activation_candidates"])
        for part in parts_of(plan["tied"], chosen):
            if part not in [one.part for one in measured]:
                widths = plan["activation_candidates" if part == "activation" else "candidates"] or CANDIDATES
                with Bar(f"measuring the {part} sensitivity", None) as progress:
                    measured.append(
                        measure_sensitivity(
                            net,
                            images,
                            part=part,
                            candidates=widths,
                            pairs=strategy == "mix-qvit",
                            pair_candidates=[b for b in PAIR_WIDTHS if b in widths] or widths[:1],
                            batch_size=batch,
                            progress=progress,
                        )
                    )
    with Bar("measuring widths", None) as progress:
        return vitq.allocate(
            net, scores, limits, images=images, seed=seed, progress=progress, **plan | {"sensitivity": measured}
        )
