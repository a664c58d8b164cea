"""The verb ``vitq bench``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vitq_kernels import cli_options as options
from vitq_kernels.checkpoint import load
from vitq_kernels.cli_output import Bar, finish, wrote
from vitq_kernels.images import image_shape
from vitq_kernels.kernel_profile import KernelProfile, profile_forward
from vitq_kernels.kernel_profile_plot import write_profile_plot
from vitq_kernels.model_bench import BUDGET_S, ROUNDS, bench_models
from vitq_kernels.model_candidates import AGAINST, OURS, Candidate, CannotRunError, with_random_weights
from vitq_kernels.models import build_model
from vitq_kernels.roofline import measured_peaks, peaks_of


def bench(
    quantized: options.Quantized,
    batches: Annotated[str, typer.Option("--batch", help="images a forward, comma separated")] = "1,8,64",
    against: Annotated[
        str | None,
        typer.Option(
            help="what to compare with, comma separated: float32, bfloat16, float16, ours, ours_fused (as by "
            "fuse_layernorm), each also with -compiled, -max-autotune, -captured; default on a CPU: "
            f"{', '.join(AGAINST['cpu'])}; on a GPU: all that deploys"
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(callback=options.whole(1), help="forwards of each at most")] = ROUNDS,
    seconds: Annotated[
        int, typer.Option(callback=options.whole(1), help="a batch size may take, beyond the fewest rounds")
    ] = int(BUDGET_S),
    profile: Annotated[
        Path | None,
        typer.Option(
            callback=options.drawable,
            help="draw where our time goes at the largest batch: each op's share and distance to the roofline; "
            ".png or .svg",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json_file: options.Json = None,
) -> None:
    """Latency, images/s and memory beside the float model.

    The float model has random weights of the same shape, in several precisions, eager and, on a GPU, compiled and
    captured in a CUDA graph. All run on random images in the same process and take turns.
    """
    sizes = options.whole_numbers("batch", batches)
    names = None if against is None else [name.strip() for name in against.split(",")]
    for name in names or ():
        _known(name)
    qmodel: Any = load(quantized)
    float_model = with_random_weights(build_model(qmodel.quantization.model_config), seed)
    image = image_shape(qmodel)
    assert image is not None  # a loaded ViT tells
    with Bar("measuring", len(sizes)) as progress:
        try:
            found = bench_models(
                qmodel,
                float_model,
                sizes,
                image,
                device=device,
                against=names,
                rounds=rounds,
                budget_s=seconds,
                seed=seed,
                progress=progress,
            )
        except CannotRunError as error:
            raise ValueError(f"the model does not run on {device}: {error}") from error
    text, payload = found.table(), found.to_dict()
    if profile is not None:
        where = profile_ours(qmodel, max(sizes), image, device, seed)
        write_profile_plot(where, profile)
        text, payload = f"{text}\n\n{where.table()}", {**payload, "profile": where.to_dict()}
    finish(text, payload, json_file)
    if profile is not None:
        wrote("profile", profile)


def profile_ours(qmodel: nn.Module, batch: int, image: tuple[int, int, int], device: str, seed: int) -> KernelProfile:
    """Of a quantized model on random images, in the precision that is measured too.

    Its roofline is the datasheet's, or what torch reaches here where that is not known.
    """
    dtype = Candidate(OURS).dtype(device)
    on_gpu = torch.device(device).type == "cuda"
    peaks = (peaks_of(torch.cuda.get_device_name(device)) if on_gpu else None) or measured_peaks(device, dtype)
    images = torch.randn(batch, *image, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return profile_forward(copy.deepcopy(qmodel).to(device, dtype).eval(), images, peaks, OURS)


def _known(name: str) -> None:
    try:
        Candidate.parse(name)
    except ValueError as error:
        raise ValueError(f"--against: {error}") from None
