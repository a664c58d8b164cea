"""The verb ``vitq compare``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitq_kernels import cli_options as options
from vitq_kernels.cli_inputs import calibration_images, float_model, integer_sites, numbers
from vitq_kernels.cli_output import console, finish, wrote
from vitq_kernels.compare import compare as compare_methods
from vitq_kernels.compare_jobs import METHODS, plan_jobs
from vitq_kernels.compare_plot import write_plot
from vitq_kernels.compare_rows import Comparison
from vitq_kernels.files import write_text
from vitq_kernels.images import ImageFolder, eval_transform
from vitq_kernels.spec import check_bits

PAIRS, MEANS = "4/8,4/4,3/8", "3,4"


def compare(
    model: options.Model,
    calibration: options.Calibration,
    images: options.Images,
    bits: Annotated[
        str | None,
        typer.Option(help=f"weight/activation widths of uniform and presets; without --mean-bits: {PAIRS}"),
    ] = None,
    mean_bits: Annotated[
        str | None,
        typer.Option(help=f"mean weight widths, whose bytes allocations may take; without --bits: {MEANS}"),
    ] = None,
    act_bits: options.ActBits = 8,
    methods: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(METHODS)}; a method brings its controls along")
    ] = "all",
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    limit: options.Limit = None,
    count: options.Count = 64,
    cache: Annotated[
        Path | None,
        typer.Option(callback=options.writable, help="file that keeps each measured sensitivity, to go on from"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(callback=options.drawable, help="draw the result here: .png or .svg")
    ] = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    device: options.Device = "cpu",
    json_file: options.Json = None,
) -> None:
    """Methods side by side on your model and images.

    Uniform and the published presets at the widths of --bits, allocations at the bytes of --mean-bits, each against its
    control: uniform, and for row groups random permutations of the relevance. lrp-qvit and mix-qvit are both an
    allocation and a preset. --json is written after every row. Under torchrun processes share the evaluation.
    """
    if bits is None and mean_bits is None:
        bits, mean_bits = PAIRS, MEANS
    pairs, means = _pairs(bits), _means(mean_bits)
    names = None if methods == "all" else [word.strip() for word in methods.split(",")]
    plan_jobs(names, pairs, means, act_bits, seed)  # a mistake ends the run before anything is loaded
    net = float_model(model, checkpoint, pretrained)
    integer_sites(net)
    transform = eval_transform(net, mean=numbers("mean", mean), std=numbers("std", std), crop=crop)
    folder = ImageFolder.scan(images).sample(limit, seed)
    calibrating = calibration_images(net, calibration, count, mean, std, crop, seed)

    def keep(result: Comparison) -> None:
        if json_file is not None:
            write_text(json_file, result.to_json())

    result = compare_methods(
        net.to(device),
        calibrating,
        folder.batches(transform, batch),
        pairs=pairs,
        means=means,
        methods=names,
        activation_bits=act_bits,
        seed=seed,
        batch_size=batch,
        cache=cache,
        progress=lambda text: console.print(text, style="dim", highlight=False),
        on_row=keep,
    )
    finish(result.table(), json.loads(result.to_json()), json_file)
    if plot is not None:
        write_plot(result, plot)
        wrote("plot", plot)


def _pairs(text: str | None) -> list[tuple[int, int]]:
    try:
        words = [word.split("/") for word in text.split(",")] if text is not None else []
        return [(check_bits(int(weight), "weights"), check_bits(int(act), "activations")) for weight, act in words]
    except ValueError as error:
        raise ValueError(f"--bits must be weight/activation widths in 2..8, such as {PAIRS}, got {text!r}") from error


def _means(text: str | None) -> list[float]:
    try:
        return [float(word) for word in text.split(",")] if text is not None else []
    except ValueError as error:
        raise ValueError(f"--mean-bits must be numbers separated by commas, such as {MEANS}, got {text!r}") from error
