"""The ``vitq`` command. Each verb reads files, calls the library, and prints what came out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_eval import evaluate
from vitq_kernels.cli_inputs import (
    allocation_for,
    budget,
    calibration_images,
    check_budget,
    float_model,
    integer_sites,
    overrides,
    parsed,
    scores_for,
)
from vitq_kernels.cli_output import Bar, console, finish, one_voice, shown, wrote
from vitq_kernels.cli_quantized import facts, write_quantized
from vitq_kernels.demo import run_demo
from vitq_kernels.doctor import examine
from vitq_kernels.files import write_text
from vitq_kernels.ops import BackendUnavailableError
from vitq_kernels.presets import simulate
from vitq_kernels.report import write_report
from vitq_kernels.summary import report_of

app = typer.Typer(
    name="vitq",
    help="Vision Transformers on low-bit integer arithmetic.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables leave 23 columns for a help text
)


@app.command()
def demo(
    out: Annotated[Path, options.output("report")] = Path("vitq-demo.html"),
    device: options.Device = "cpu",
    json_file: options.Json = None,
) -> None:
    """The whole job on an embedded ViT, offline.

    Scores it, allocates a mean of 4 bits, quantizes, compares float, uniform and mixed widths, and writes a report.
    """
    result = run_demo(out, device, progress=lambda text: console.print(text, style="dim"))
    finish(result.table(), result.to_dict(), json_file)
    wrote("report", out)


@app.command()
def score(
    model: options.Model,
    calibration: options.Calibration,
    out: Annotated[Path, options.output("scores")] = Path("scores.json"),
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = False,
    method: Annotated[
        str, typer.Option(callback=options.one_of(("attnlrp", "chefer")), help="rules of LRP: attnlrp or chefer")
    ] = "attnlrp",
    tokens: Annotated[
        str,
        typer.Option(callback=options.one_of(("all", "image", "class")), help="tokens that count: all, image, class"),
    ] = "all",
    count: options.Count = 64,
    mean: options.Mean = None,
    std: options.Std = None,
    crop: options.Crop = None,
    seed: options.Seed = 0,
    batch: options.Batch = 16,
    json_file: options.Json = None,
) -> None:
    """Layer-wise relevance of every site and output row."""
    net = float_model(model, checkpoint, pretrained)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with Bar("scoring", len(images)) as progress:
        scores = vitq.relevance(net, images, method=method, tokens=tokens, batch_size=batch, progress=progress)  # type: ignore[arg-type]
    write_text(out, scores.to_json())
    finish(str(scores), json.loads(scores.to_json()), json_file)
    wrote("scores", out)


@app.command()
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


@app.command()
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


app.command(name="eval")(evaluate)


@app.command()
def report(
    quantized: options.Quantized,
    out: Annotated[Path, options.output("page")] = Path("report.html"),
    scores: Annotated[Path | None, typer.Option(help="what `vitq score` wrote, for the relevance plots")] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", help="what `vitq eval --json` wrote; may repeat, this model's last")
    ] = None,
    json_file: options.Json = None,
) -> None:
    """A self-contained HTML page about a quantized model.

    Relevance per layer, widths, bytes and accuracy, as plots and tables.
    """
    qmodel = vitq.load(quantized)
    relevance = None if scores is None else scores_for(qmodel.quantization.sites, scores)
    results = {path.stem: parsed(path, json.loads) for path in evaluation or []}
    data = report_of(qmodel, quantized.name, relevance, results)
    write_report(data, out)
    payload = {"out": str(out), **facts(qmodel), "measurements": [asdict(m) for m in data.measurements]}
    finish("", payload, json_file)
    wrote("report", out)


@app.command()
def doctor(json_file: options.Json = None) -> None:
    """What this machine can run, and why not where it cannot."""
    findings = examine()
    finish(shown(findings), findings, json_file)


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, not a traceback."""
    try:
        with one_voice():
            app()
    except (ValueError, OSError, BackendUnavailableError) as error:
        console.print("[red]vitq: error:[/red] ", end="")
        console.print(" ".join(str(error).splitlines()), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None


if __name__ == "__main__":  # torchrun -m vitq_kernels.cli
    main()
