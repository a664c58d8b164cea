"""The verb ``vitq score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import calibration_images, float_model
from vitq_kernels.cli_output import Bar, finish, wrote
from vitq_kernels.files import write_text
from vitq_kernels.relevance import Method
from vitq_kernels.relevance_target import Target
from vitq_kernels.sensitivity import Part
from vitq_kernels.sensitivity_runs import sensitivity as measure
from vitq_kernels.spec import MAX_BITS, MIN_BITS

WIDTHS = tuple(str(bits) for bits in range(MIN_BITS, MAX_BITS + 1))


def score(
    model: options.Model,
    calibration: options.Calibration,
    out: Annotated[Path, options.output("scores")] = Path("scores.json"),
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    method: Annotated[
        str, typer.Option(callback=options.one_of(get_args(Method)), help="rules of LRP, attnlrp or chefer, or fisher")
    ] = "attnlrp",
    tokens: Annotated[
        str,
        typer.Option(callback=options.one_of(("all", "image", "class")), help="tokens that count: all, image, class"),
    ] = "all",
    target: Annotated[
        str,
        typer.Option(
            callback=options.one_of(get_args(Target)),
            help="what is explained: logit or, for models without classes too, feature_norm or similarity",
        ),
    ] = "logit",
    sensitivity: Annotated[
        str | None,
        typer.Option(
            callback=options.one_of(get_args(Part)),
            help="also measure what one site at another width costs: weight, activation or both widths of it",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--sensitivity-baseline",
            callback=options.one_of((*WIDTHS, "float")),
            help="width of the other sites meanwhile: 2..8 or float; default: 8",
        ),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--sensitivity-pairs", help="measure pairs of sites in a block too, at 2, 3 and 4 bits")
    ] = False,
    sensitivity_out: Annotated[
        Path | None,
        typer.Option(callback=options.writable, help="default: sensitivity.json beside the scores"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(callback=options.writable, help="file that keeps each measured sensitivity, to go on from"),
    ] = None,
    count: options.Count = 64,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    device: options.Device = "cpu",
    json_file: options.Json = None,
) -> None:
    """Layer-wise relevance of every site and output row.

    With --sensitivity also the measured cost of each width at each site. Under torchrun processes share the work.
    """
    needing = {"baseline": baseline, "pairs": pairs, "out": sensitivity_out}
    given = [f"--sensitivity-{name}" for name, value in needing.items() if value] + ["--cache"] * (cache is not None)
    if given and sensitivity is None:
        raise ValueError(f"{given[0]} is for --sensitivity, which is missing")
    net = float_model(model, checkpoint, pretrained).to(device)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with Bar("scoring", len(images)) as progress:
        scores = vitq.relevance(
            net,
            images,
            method=method,  # type: ignore[arg-type]
            tokens=tokens,  # type: ignore[arg-type]
            target=target,  # type: ignore[arg-type]
            batch_size=batch,
            progress=progress,
        )
    write_text(out, scores.to_json())
    text, payload = str(scores), json.loads(scores.to_json())
    wrote("scores", out)
    if sensitivity is not None:
        with Bar("measuring sensitivity", None) as progress:
            measured = measure(
                net,
                images,
                part=sensitivity,  # type: ignore[arg-type]
                baseline=None if baseline == "float" else int(baseline or MAX_BITS),
                pairs=pairs,
                batch_size=batch,
                cache=cache,
                progress=progress,
            )
        sensitivity_out = sensitivity_out or out.with_name("sensitivity.json")
        write_text(sensitivity_out, measured.to_json())
        text, payload = f"{text}\n\n{measured}", {**payload, "sensitivity": json.loads(measured.to_json())}
        wrote("sensitivity", sensitivity_out)
    finish(text, payload, json_file)
