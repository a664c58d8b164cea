"""``vitq quantize``: from a float model and calibration images to a quantized file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import (
    allocation_for,
    budget,
    calibration_images,
    check_budget,
    float_model,
    integer_sites,
    overrides,
)
from vitq_kernels.cli_output import Bar, finish, shown
from vitq_kernels.cli_quantized import facts, write_quantized
from vitq_kernels.presets import simulate


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
    bits: Annotated[Path | None, typer.Option(help="what `vitq allocate` wrote for this model")] = None,
    act_bits: options.ActBits = 8,
    allocation: options.Strategy = "relevance",
    count: options.Count = 64,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    method: options.Method = None,
    json_file: options.Json = None,
) -> None:
    """Calibrates, allocates if asked to, and quantizes.

    Widths come from exactly one of --weight-bits, --bits and a budget (--mean-weight-bits, --size-mb, --bitops).
    With --method the result is that method's model in float simulation, not integers; --weight-bits is then the width
    of patch embedding and head too, as published.
    """
    budgets = [mean_weight_bits, size_mb, bitops]
    mixed = any(b is not None for b in budgets)
    if sum((weight_bits is not None, mixed, bits is not None)) != 1:
        raise ValueError(
            "give exactly one of --weight-bits, --bits and a budget (--mean-weight-bits, --size-mb, --bitops)"
        )
    net = float_model(model, checkpoint, pretrained)
    sites = integer_sites(net)
    if bits is not None:
        plan = allocation_for(sites, bits)
    elif weight_bits is not None:
        plan = vitq.BitAllocation.uniform(sites, weight_bits, act_bits)
    else:
        check_budget(sites, budget(*budgets), act_bits)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    if mixed:
        rules = "chefer" if allocation == "lrp-qvit" else "attnlrp"
        with Bar("scoring", len(images)) as progress:
            scores = vitq.relevance(net, images, method=rules, batch_size=batch, progress=progress)  # type: ignore[arg-type]
        with Bar("measuring widths", None) as progress:
            plan = vitq.allocate(
                net,
                scores,
                budget(*budgets),
                activation_bits=act_bits,
                images=images,
                strategy=allocation,  # type: ignore[arg-type]
                seed=seed,
                progress=progress,
            )
    with Bar("quantizing", len(sites)) as progress:
        if method is None:
            qmodel = vitq.quantize(net, images, plan, batch_size=batch, progress=progress)
        elif weight_bits is None:
            qmodel = simulate(net, images, method, allocation=plan, seed=seed, batch_size=batch, progress=progress)
        else:
            qmodel = simulate(
                net, images, method, weight_bits, act_bits, seed=seed, batch_size=batch, progress=progress
            )
    # MODEL with its tag, so that `vitq eval --pretrained` fetches the same weights.
    qmodel.pretrained_cfg = {**(net.pretrained_cfg or {}), "architecture": model, **overrides(mean, std, crop)}
    write_quantized(qmodel, out)
    result = {"model": model, "out": str(out), "calibration_images": len(images), **facts(qmodel)}
    finish(shown(result), result, json_file)
