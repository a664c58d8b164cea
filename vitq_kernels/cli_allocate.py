"""``vitq allocate``: bit widths under a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import budget, calibration_images, check_budget, float_model, scores_for
from vitq_kernels.cli_output import Bar, finish, wrote
from vitq_kernels.files import write_text


def allocate(
    model: options.Model,
    scores: Annotated[Path, typer.Option(help="what `vitq score` wrote for this model")],
    out: Annotated[Path, options.output("allocation")] = Path("bits.json"),
    mean_weight_bits: options.MeanBits = None,
    size_mb: options.SizeMb = None,
    bitops: options.BitOps = None,
    act_bits: options.ActBits = 8,
    allocation: options.Strategy = "relevance",
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
    """Bit widths of least cost under one or more budgets."""
    limits = budget(mean_weight_bits, size_mb, bitops)
    net = float_model(model, checkpoint, pretrained)
    sites = vitq.vit_sites(net)
    check_budget(sites, limits, act_bits)
    relevance = scores_for(sites, scores)
    images = None
    if calibration is not None:
        images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with Bar("measuring widths", None) as progress:
        bits = vitq.allocate(
            net,
            relevance,
            limits,
            activation_bits=act_bits,
            images=images,
            strategy=allocation,  # type: ignore[arg-type]
            seed=seed,
            progress=progress,
        )
    write_text(out, bits.to_json())
    summary = f"mean weight bits {bits.mean_weight_bits(sites):.4g}, packed weights {bits.weight_bytes(sites):,} bytes"
    finish(f"{bits}\n{summary}", json.loads(bits.to_json()), json_file)
    wrote("allocation", out)
