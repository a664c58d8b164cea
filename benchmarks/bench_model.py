"""Whole ViTs with random weights, quantized, beside float ones: latency p50 and p95, images/s, peak memory.

    python -m benchmarks.bench_model [--models ViT-T,ViT-B] [--batch 1,8,64,256] [--record]

A run of ``vitq_kernels.model_bench`` a model and batch size, so all candidates take turns. Rows go to the same files as
those of ``bench_*.py``: op ``model``, the case names which of ours (``ours``, ``ours-captured``).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vitq_kernels as vitq
from benchmarks.measured_case import setting_here
from benchmarks.result_rows import KEY, Row, as_text, beside, file_of, origin, read_rows, record, spread_of
from benchmarks.vit_shapes import BATCHES, CHANNELS_IN
from vitq_kernels.model_bench import BUDGET_S, ROUNDS, ModelBench, bench_models
from vitq_kernels.model_candidates import Candidate

MODELS = {
    "ViT-T": "vit_tiny_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "ViT-B": "vit_base_patch16_224",
    "ViT-L": "vit_large_patch16_224",
}
RESULTS = Path(__file__).parent / "results"
SEED = 0
# What the integers are does not matter here: no fit, no search. They are as many, and as spread, as those of a fit.
FAST = vitq.QuantConfig(gptq=False, bias_correction=False, compensation=None)
CALIBRATION_IMAGES = 2


def random_vit(timm_name: str) -> nn.Module:
    """A model with timm's random weights."""
    torch.manual_seed(SEED)
    model: nn.Module = timm.create_model(timm_name).eval()
    return model


def quantized(model: nn.Module, weight_bits: int, activation_bits: int) -> nn.Module:
    """The same on integers, calibrated on random images."""
    images = torch.randn(CALIBRATION_IMAGES, CHANNELS_IN, *_size(model), generator=torch.Generator().manual_seed(SEED))
    plan = vitq.BitAllocation.uniform(vitq.model_sites(model), weight_bits, activation_bits)
    return vitq.quantize(model, images, plan, config=FAST)


def _size(model: Any) -> tuple[int, int]:
    height, width = model.patch_embed.img_size
    return height, width


def rows_of(model: str, found: ModelBench, bits: tuple[int, int], device_name: str, by: Mapping[str, str]) -> list[Row]:
    """Of each of ours: time and memory beside every float candidate of the same batch, and images/s."""
    rows = []
    for ours in (row for row in found.rows if row.candidate in found.ours):
        others = [row for row in found.rows if row.batch == ours.batch and row.candidate not in found.ours]
        what = {"op": "model", "backend": found.backend, "model": model, "case": ours.candidate, "batch": ours.batch}
        what |= {"bits_w": bits[0], "bits_a": bits[1], "data": "random", "cache": "hot", "gpu": device_name}
        spread = spread_of(ours.samples_us)
        time = {**what, **spread, "metric": "time", "unit": "us"}
        held = {**what, **spread_of([ours.peak_bytes]), "metric": "memory", "unit": "bytes"}
        rates = {name: ours.batch / us * 1e6 for name, us in spread.items()}
        rows.append({**what, **rates, "metric": "rate", "unit": "images/s"})
        rows += [{**time, **beside(other.candidate, other.samples_us, spread["p50"])} for other in others] or [time]
        rows += [{**held, **beside(o.candidate, [o.peak_bytes], ours.peak_bytes)} for o in others] or [held]
    return [as_text({**row, **by}) for row in rows]


def is_recorded(path: Path, model: str, batch: int, bits: tuple[int, int]) -> bool:
    """Whether a results file, if there is one, has rows of this model and batch."""
    wanted = {"op": "model", "model": model, "batch": str(batch), "bits_w": str(bits[0]), "bits_a": str(bits[1])}
    assert wanted.keys() <= set(KEY)
    return path.exists() and any(wanted.items() <= row.items() for row in read_rows(path))


def run(args: argparse.Namespace) -> None:
    """Measures, shows and, if asked to, records every model and batch size; what was recorded survives what follows."""
    setting = setting_here()
    by, path = origin(setting.driver), args.results / file_of(setting.name)
    bits = (args.weight_bits, args.activation_bits)
    for name in args.models:
        wanted = [b for b in args.batch if args.overwrite or not (args.record and is_recorded(path, name, b, bits))]
        if not wanted:
            print(f"{name}: recorded already, --overwrite measures it again")
            continue
        model = random_vit(MODELS[name])
        qmodel, image = quantized(model, *bits), (CHANNELS_IN, *_size(model))
        for batch in wanted:
            found = bench_models(
                qmodel,
                model,
                [batch],
                image,
                device=setting.device,
                against=args.against,
                rounds=args.rounds,
                budget_s=args.budget_s,
                seed=SEED,
            )
            print(f"{name} W{bits[0]}A{bits[1]}, {found.table()}", flush=True)
            if args.record:
                record(path, rows_of(name, found, bits, setting.name, by), args.overwrite)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options, checked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_model", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}, comma separated")
    parser.add_argument("--batch", default=",".join(map(str, BATCHES)), help="images a forward, comma separated")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--against", help="candidates, comma separated, as of `vitq bench`")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="forwards of each at most")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds a batch size, or the fewest rounds")
    parser.add_argument("--record", action="store_true", help="add the rows to the device's results file")
    parser.add_argument("--overwrite", action="store_true", help="with --record: replace rows that are there already")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results files")
    args = parser.parse_args(arguments)
    args.models, args.batch = args.models.split(","), args.batch.split(",")
    args.against = args.against and args.against.split(",")
    if unknown := [name for name in args.models if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if not all(word.isdecimal() and int(word) for word in args.batch):
        parser.error(f"--batch must be whole numbers of at least 1, got {','.join(args.batch)}")
    args.batch = [int(word) for word in args.batch]
    if args.overwrite and not args.record:
        parser.error("--overwrite needs --record")
    if not args.results.is_dir():
        parser.error(f"--results must be a folder, got {args.results}")
    try:
        for name in args.against or ():
            Candidate.parse(name)
    except ValueError as error:
        parser.error(f"--against: {error}")
    return args


if __name__ == "__main__":
    run(parsed(None))
