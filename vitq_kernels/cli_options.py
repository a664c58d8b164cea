"""The arguments and options that verbs share: names, help texts, and checks that end a bad call before work starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

from vitq_kernels.compare_plot import check_suffix
from vitq_kernels.planning import Strategy as StrategyName
from vitq_kernels.presets import PRESETS
from vitq_kernels.spec import MAX_BITS, MIN_BITS

Check = Callable[[typer.CallbackParam, Any], Any]


def whole(low: int, high: int | None = None) -> Check:
    """An integer in a range, or None."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and (value < low or (high is not None and value > high)):
            allowed = f"at least {low}" if high is None else f"in {low}..{high}"
            raise ValueError(f"{_name(param)} must be {allowed}, got {value}")
        return value

    return check


def one_of(names: Sequence[Any]) -> Check:
    """One of a few words or numbers, or None."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value is not None and value not in names:
            raise ValueError(f"{_name(param)} must be one of {', '.join(map(str, names))}, got {value!r}")
        return value

    return check


def writable(param: typer.CallbackParam, value: Any) -> Any:
    """A file in a directory that exists, or None: an hour of work must not end at a typo."""
    if value is not None and value.is_dir():
        raise ValueError(f"{_name(param)} must be a file, {value} is a directory")
    if value is not None and not value.parent.is_dir():
        raise ValueError(f"{_name(param)} {value}: directory {value.parent} does not exist")
    return value


def drawable(param: typer.CallbackParam, value: Any) -> Any:
    """A file in a directory that exists, of a kind that can be drawn, or None."""
    if value is not None:
        check_suffix(value)
    return writable(param, value)


def usable_device(param: typer.CallbackParam, value: Any) -> Any:
    """A torch device that holds numbers here."""
    try:
        torch.zeros(1, device=value).tolist()
    except (RuntimeError, AssertionError) as error:  # AssertionError: "Torch not compiled with CUDA enabled"
        raise ValueError(f"{_name(param)} {value} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


def whole_numbers(name: str, text: str) -> list[int]:
    """Numbers of at least 1, separated by commas, as an option has them."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ValueError(f"--{name} must be whole numbers of at least 1, separated by commas, got {text!r}")
    return [int(word) for word in words]


def _name(param: typer.CallbackParam) -> str:
    return max(param.opts, key=len)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm model name, such as vit_tiny_patch16_224")]
Quantized = Annotated[Path, typer.Argument(metavar="FILE", help="what `vitq quantize` wrote")]
Checkpoint = Annotated[Path | None, typer.Option(help="local float weights: safetensors, or a pickle of weights alone")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="let timm fetch the float weights")]
Calibration = Annotated[Path, typer.Option(help="folder of calibration images")]
Images = Annotated[Path, typer.Option(help="folder of images: class subfolders, or flat with labels.csv (file,label)")]
Count = Annotated[
    int, typer.Option("--calibration-images", callback=whole(1), help="images to use at most, chosen by --seed")
]
Limit = Annotated[int | None, typer.Option(callback=whole(1), help="images to use at most, chosen by --seed")]
Mean = Annotated[str | None, typer.Option(help="channel means, comma separated; default: the model's own")]
Std = Annotated[str | None, typer.Option(help="channel standard deviations, comma separated; default: the model's own")]
Crop = Annotated[
    float | None, typer.Option(help="share of the resized short side that is kept; default: the model's own")
]
Seed = Annotated[int, typer.Option(callback=whole(0, 2**63 - 1), help="of the choice of images and everything random")]
Json = Annotated[Path | None, typer.Option("--json", callback=writable, help="write the result here as JSON")]
Device = Annotated[str, typer.Option(callback=usable_device, help="cpu, cuda, ...")]
Batch = Annotated[int, typer.Option(callback=whole(1), help="images a forward")]
WeightBits = Annotated[
    int | None, typer.Option(callback=whole(MIN_BITS, MAX_BITS), help="one width for the linears of the blocks, 2..8")
]
ActBits = Annotated[
    int, typer.Option(callback=whole(MIN_BITS, MAX_BITS), help="width of the blocks' activations, 2..8")
]
MeanBits = Annotated[float | None, typer.Option(help="budget: mean bits of a weight over the linears of the blocks")]
SizeMb = Annotated[float | None, typer.Option(help="budget: packed weights, in 10^6 bytes")]
BitOps = Annotated[float | None, typer.Option(help="budget: MACs * weight bits * activation bits of an image, in 10^9")]
LatencyMs = Annotated[
    float | None, typer.Option(help="budget: milliseconds of all sites, by the times of --kernel-times")
]
MeanActBits = Annotated[
    float | None,
    typer.Option(
        help="budget: mean bits of an activation over the blocks' MACs; every site then has a width of its own"
    ),
]
KernelTimesFile = Annotated[
    Path | None, typer.Option("--kernel-times", help="JSON of measured kernel times (vitq_kernels/latency.py)")
]
Tied = Annotated[bool, typer.Option("--tied", help="a layer's weights and activations have one width")]
Candidates = Annotated[str | None, typer.Option(help="weight widths to choose from, such as 2,4,8; default: 2 to 8")]
ActCandidates = Annotated[
    str | None, typer.Option(help="activation widths to choose from, site by site; default: --act-bits alone")
]
GroupRows = Annotated[
    int | None,
    typer.Option(callback=one_of((16, 32, 64)), help="output rows that share a width: 16, 32, 64; default: 16"),
]
Strategy = Annotated[
    str,
    typer.Option(
        callback=one_of(get_args(StrategyName)),
        help="who gets the bits. By groups of rows: relevance, fisher, random (the control). By layer: lrp-qvit and "
        "mix-qvit (as published), sensitivity, combined, greedy",
    ),
]
Sensitivities = Annotated[
    list[Path] | None,
    typer.Option("--sensitivity", help="what `vitq score --sensitivity` measured; may repeat, one of each part"),
]
Method = Annotated[
    str | None,
    typer.Option(callback=one_of(tuple(PRESETS)), help=f"simulate a published method: {', '.join(PRESETS)}"),
]


def output(what: str) -> Any:
    """The --out option of a verb that writes ``what``."""
    return typer.Option("--out", "-o", callback=writable, help=f"file to write the {what} to")
