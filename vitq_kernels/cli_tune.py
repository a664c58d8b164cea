"""The verb ``vitq tune``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vitq_kernels import cli_options as options
from vitq_kernels.checkpoint import load
from vitq_kernels.cli_output import Bar, finish, wrote
from vitq_kernels.images import image_shape
from vitq_kernels.ops.tuning import explain, require_gpu, tiles_path, tune


def tune_tiles(
    quantized: options.Quantized,
    batches: Annotated[str, typer.Option("--batch", help="images a call, comma separated")] = "1,8,64",
    most: Annotated[int, typer.Option(callback=options.whole(1), help="tiles to measure a layer")] = 12,
    dry_run: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="measure nothing: print what the cost model thinks for A100, H100, ..."),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Measures the linear kernels' tiles on this GPU.

    The fastest for each layer of the model go into a file that later runs read. Without it a cost model chooses.
    """
    sizes = options.whole_numbers("batch", batches)
    if not dry_run:
        require_gpu()
    # A residual stream of float16, as a deployed model has it.
    qmodel: Any = load(quantized, "cpu") if dry_run else load(quantized, "cuda").half()
    image = image_shape(qmodel)
    assert image is not None  # a loaded ViT tells
    device = next(qmodel.buffers()).device

    def run() -> None:
        for size in sizes:
            qmodel(torch.randn(size, *image, device=device, dtype=torch.float32 if dry_run else torch.float16))

    if dry_run:
        with torch.no_grad():
            text = explain(run, dry_run, min(most, 5))
        finish("\n".join(text), {"gpu": dry_run, "layers": text}, json_file)
        return
    with Bar("tuning", None) as progress:
        found = tune(run, most, progress=progress)
    lines = [f"{t.problem:36} {t.us:8.1f} us  {t.speedup_x:5.2f}x the model's choice  {t.tile}" for t in found]
    rows = [{**asdict(t), "speedup_x": t.speedup_x} for t in found]
    finish("\n".join(lines), {"tiles": rows, "file": tiles_path()}, json_file)
    wrote("tiles", Path(tiles_path()))
