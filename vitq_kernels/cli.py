"""The ``vitq`` command. Each verb reads files, calls the library, and prints what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

import vitq_kernels as vitq
from vitq_kernels.cli_inputs import (
    budget,
    calibration_images,
    float_model,
    numbers,
    overrides,
    read_text,
    sizes,
)
from vitq_kernels.demo import run_demo
from vitq_kernels.doctor import examine
from vitq_kernels.files import write_text
from vitq_kernels.images import ImageFolder, eval_transform
from vitq_kernels.report import write_report
from vitq_kernels.summary import report_of

app = typer.Typer(
    name="vitq",
    help="Vision Transformers on low-bit integer arithmetic.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="timm model name, such as vit_tiny_patch16_224")]
Quantized = Annotated[Path, typer.Argument(help="a file that `vitq quantize` wrote")]
Checkpoint = Annotated[Path | None, typer.Option(help="local float weights: safetensors, or a weights-only pickle")]
Pretrained = Annotated[bool, typer.Option(help="let timm fetch the model's weights")]
Calibration = Annotated[Path, typer.Option(help="folder of calibration images")]
Images = Annotated[Path, typer.Option(help="folder of labelled images: class subfolders, or flat with labels.csv")]
Count = Annotated[int, typer.Option("--calibration-images", help="how many of them to use")]
Mean = Annotated[str | None, typer.Option(help="channel means, comma separated; default: the model's own")]
Std = Annotated[str | None, typer.Option(help="channel standard deviations, comma separated")]
Crop = Annotated[float | None, typer.Option(help="share of the resized short side that is kept")]
Seed = Annotated[int, typer.Option(help="of the choice of images and everything random")]
Json = Annotated[Path | None, typer.Option("--json", help="write the result here as JSON")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Batch = Annotated[int, typer.Option(help="images a forward")]
ActBits = Annotated[int, typer.Option(help="width of activations, 2..8")]
MeanBits = Annotated[float | None, typer.Option(help="budget: bits per weight over the linears of the blocks")]
SizeMb = Annotated[float | None, typer.Option(help="budget: packed weights in 10^6 bytes")]
BitOps = Annotated[float | None, typer.Option(help="budget: MACs * weight bits * activation bits, in 10^9 an image")]
Strategy = Annotated[str, typer.Option(help="relevance, lrp-qvit (as published, per layer) or random (the control)")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the report goes")] = Path("vitq-demo.html"),
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """The whole job on an embedded ViT and images: score, allocate, quantize, compare, report. Offline."""
    result = run_demo(out, device, progress=_status)
    _finish(result.table(), result.to_dict(), json_file)
    console.print(f"report: {out}")


@app.command()
def score(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option("--out", "-o", help="where the scores go")] = Path("scores.json"),
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    method: Annotated[str, typer.Option(help="attnlrp or chefer")] = "attnlrp",
    tokens: Annotated[str, typer.Option(help="tokens that count: all, image or class")] = "all",
    count: Count = 64,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    seed: Seed = 0,
    batch: Batch = 16,
    json_file: Json = None,
) -> None:
    """Layer-wise relevance of every site and output row."""
    net = float_model(model, checkpoint, pretrained)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with _bar("scoring", len(images)) as progress:
        scores = vitq.relevance(net, images, method=method, tokens=tokens, batch_size=batch, progress=progress)  # type: ignore[arg-type]
    write_text(out, scores.to_json())
    _finish(str(scores), json.loads(scores.to_json()), json_file)
    console.print(f"scores: {out}")


@app.command()
def allocate(
    model: Model,
    scores: Annotated[Path, typer.Option(help="file of `vitq score`")],
    out: Annotated[Path, typer.Option("--out", "-o", help="where the allocation goes")] = Path("bits.json"),
    mean_weight_bits: MeanBits = None,
    size_mb: SizeMb = None,
    bitops: BitOps = None,
    act_bits: ActBits = 8,
    allocation: Strategy = "relevance",
    calibration: Annotated[Path | None, typer.Option(help="images to measure what each width costs")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    count: Count = 64,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Bit widths under a budget, exactly solved."""
    limits = budget(mean_weight_bits, size_mb, bitops)
    relevance = vitq.Relevance.from_json(read_text(scores))
    net = float_model(model, checkpoint, pretrained)
    images = None
    if calibration is not None:
        images = calibration_images(net, calibration, count, mean, std, crop, seed)
    with _bar("measuring widths", None) as progress:
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
    sites = vitq.vit_sites(net)
    summary = f"mean weight bits {bits.mean_weight_bits(sites):.4g}, packed weights {bits.weight_bytes(sites):,} bytes"
    _finish(f"{bits}\n{summary}", json.loads(bits.to_json()), json_file)
    console.print(f"allocation: {out}")


@app.command()
def quantize(
    model: Model,
    calibration: Calibration,
    out: Annotated[Path, typer.Option("--out", "-o", help="where the quantized model goes")] = Path("q.safetensors"),
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    weight_bits: Annotated[int | None, typer.Option(help="one width for all linears of the blocks, 2..8")] = None,
    mean_weight_bits: MeanBits = None,
    size_mb: SizeMb = None,
    bitops: BitOps = None,
    bits: Annotated[Path | None, typer.Option(help="allocation file of `vitq allocate`")] = None,
    act_bits: ActBits = 8,
    allocation: Strategy = "relevance",
    strict: Annotated[bool, typer.Option(help="refuse models of which a part stays float")] = False,
    count: Count = 64,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    seed: Seed = 0,
    batch: Batch = 16,
    json_file: Json = None,
) -> None:
    """Calibrates, allocates if asked to, quantizes, and writes one safetensors file."""
    budgets = [mean_weight_bits, size_mb, bitops]
    mixed = any(b is not None for b in budgets)
    if sum((weight_bits is not None, mixed, bits is not None)) != 1:
        raise ValueError(
            "give exactly one of --weight-bits, --bits and a budget (--mean-weight-bits, --size-mb, --bitops)"
        )
    net = float_model(model, checkpoint, pretrained)
    sites = vitq.vit_sites(net)
    images = calibration_images(net, calibration, count, mean, std, crop, seed)
    if bits is not None:
        plan = vitq.BitAllocation.from_json(read_text(bits))
    elif weight_bits is not None:
        plan = vitq.BitAllocation.uniform(sites, weight_bits, act_bits)
    else:
        method = "chefer" if allocation == "lrp-qvit" else "attnlrp"
        with _bar("scoring", len(images)) as progress:
            scores = vitq.relevance(net, images, method=method, batch_size=batch, progress=progress)  # type: ignore[arg-type]
        with _bar("measuring widths", None) as progress:
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
    with _bar("quantizing", len(sites)) as progress:
        qmodel = vitq.quantize(net, images, plan, batch_size=batch, strict=strict, progress=progress)
    qmodel.pretrained_cfg = {**(net.pretrained_cfg or {}), **overrides(mean, std, crop)}
    vitq.save(qmodel, out)
    result = {"model": model, "out": str(out), "calibration_images": len(images), **sizes(qmodel)}
    _finish("\n".join(f"{key}: {value}" for key, value in result.items()), result, json_file)


@app.command(name="eval")
def evaluate(
    quantized: Quantized,
    images: Images,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    mean: Mean = None,
    std: Std = None,
    crop: Crop = None,
    limit: Annotated[int | None, typer.Option(help="use only this many images, chosen by --seed")] = None,
    seed: Seed = 0,
    batch: Batch = 16,
    device: Device = "cpu",
    json_file: Json = None,
) -> None:
    """Top-1 and speed of a quantized model; with the float weights also agreement and KL."""
    qmodel = vitq.load(quantized, device)
    transform = eval_transform(qmodel, mean=numbers("mean", mean), std=numbers("std", std), crop=crop)
    net = None
    if checkpoint is not None or pretrained:
        net = float_model(qmodel.pretrained_cfg.get("architecture", ""), checkpoint, pretrained).to(device)
    folder = ImageFolder.scan(images).sample(limit, seed)
    with _bar("evaluating", len(folder.files)) as progress:
        result = vitq.evaluate(
            qmodel,
            folder.batches(transform, batch),
            float_model=net,
            progress=lambda done: progress(done, len(folder.files)),
        )
    payload = {**result.to_dict(), **sizes(qmodel)}
    text = "\n".join(f"{k}: {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in payload.items())
    _finish(text, payload, json_file)


@app.command()
def report(
    quantized: Quantized,
    out: Annotated[Path, typer.Option("--out", "-o", help="where the HTML goes")] = Path("report.html"),
    scores: Annotated[Path | None, typer.Option(help="file of `vitq score`, for the relevance plots")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option("--eval", help="JSON of `vitq eval`; may repeat")] = None,
) -> None:
    """A self-contained HTML page: relevance, allocation, sizes and accuracy."""
    relevance = None if scores is None else vitq.Relevance.from_json(read_text(scores))
    results = {path.stem: json.loads(read_text(path)) for path in evaluation or []}
    write_report(report_of(vitq.load(quantized), quantized.name, relevance, results), out)
    console.print(f"report: {out}")


@app.command()
def doctor(json_file: Json = None) -> None:
    """What this machine can run, and why not where it cannot."""
    findings = examine()
    width = max(map(len, findings))
    _finish("\n".join(f"{key:{width}}  {value}" for key, value in findings.items()), findings, json_file)


def _finish(text: str, payload: dict[str, Any], json_file: Path | None) -> None:
    """Prints the result and writes it where --json says."""
    print(text)
    if json_file is not None:
        write_text(json_file, json.dumps(payload, indent=1))


def _status(text: str) -> None:
    console.print(f"[dim]{text}[/dim]")


class _bar:
    """A progress bar as a (done, total) callback; silent where stderr is no terminal."""

    def __init__(self, label: str, total: int | None) -> None:
        self.progress = Progress(console=console, transient=True, disable=not sys.stderr.isatty())
        self.task = self.progress.add_task(label, total=total)

    def __enter__(self) -> Callable[[int, int], None]:
        self.progress.start()
        return lambda done, total: self.progress.update(self.task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()


def main() -> None:
    """Entry point: bad input is one line on stderr and exit code 2, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, PermissionError) as error:
        console.print(f"[red]vitq: {type(error).__name__}:[/red] ", end="")
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
