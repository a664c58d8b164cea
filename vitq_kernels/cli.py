"""The ``vitq`` command. Each verb reads files, calls the library, and prints what came out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import vitq_kernels as vitq
from vitq_kernels import cli_options as options
from vitq_kernels.cli_allocate import allocate
from vitq_kernels.cli_bench import bench
from vitq_kernels.cli_compare import compare
from vitq_kernels.cli_eval import evaluate
from vitq_kernels.cli_inputs import parsed, scores_for
from vitq_kernels.cli_output import console, finish, one_voice, shown, wrote
from vitq_kernels.cli_quantize import quantize
from vitq_kernels.cli_quantized import facts
from vitq_kernels.cli_score import score
from vitq_kernels.cli_tune import tune_tiles
from vitq_kernels.demo import run_demo
from vitq_kernels.doctor import examine
from vitq_kernels.ops import BackendUnavailableError
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


app.command()(score)
app.command()(allocate)
app.command()(quantize)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(bench)
app.command(name="tune")(tune_tiles)


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
