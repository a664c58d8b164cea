"""What the command line names, as objects: models, weights, images, budgets, files of other verbs. Errors name it."""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitq_kernels.costs import check_candidates
from vitq_kernels.images import eval_transform, load_folder
from vitq_kernels.latency import KernelTimes
from vitq_kernels.models import model_parts, model_sites
from vitq_kernels.planning import check_plan
from vitq_kernels.relevance import Relevance
from vitq_kernels.sensitivity import Sensitivity
from vitq_kernels.spec import BitAllocation, Budget, Site
from vitq_kernels.strategies import BY_SENSITIVITY

T = TypeVar("T")


def float_model(name: str, checkpoint: Path | None, pretrained: bool) -> nn.Module:
    """A timm model with its float weights, in eval mode."""
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        raise ValueError(
            f"MODEL must be a timm model name, got {name!r}" + (f"; similar: {', '.join(similar)}" if similar else "")
        )
    if (checkpoint is None) == (not pretrained):
        raise ValueError("give the float weights with exactly one of --checkpoint FILE and --pretrained")
    if checkpoint is None:
        return _created(name, pretrained=True)
    state = float_weights(checkpoint)
    head = state.get("head.weight", state.get("head.fc.weight"))
    net = _created(name) if head is None else _created(name, num_classes=len(head))
    if wrong := _difference(net.state_dict(), state):
        raise ValueError(f"--checkpoint {checkpoint} does not fit {name}: {wrong}")
    net.load_state_dict(state, strict=True)
    return net


def _created(name: str, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, **arguments).eval()
    except Exception as error:  # what timm, the Hub and the network raise has no common class
        weights = "with --pretrained weights " if arguments.get("pretrained") else ""
        raise ValueError(f"MODEL {name} cannot be made {weights}here: {_first_line(error)}") from error


def _difference(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """What keeps weights from fitting, a few names of each kind; empty if they fit."""
    shapes = [
        f"{name} {list(got[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]
    found = {
        "it lacks": [name for name in expected if name not in got],
        "it has unknown": [name for name in got if name not in expected],
        "it has": shapes,
    }
    return "; ".join(
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in found.items()
        if names
    )


def float_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or a pickle; never executes code."""
    if not checkpoint.is_file():
        raise ValueError(f"--checkpoint {checkpoint} is not a file")
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(str(checkpoint))
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own text advises to load the file with code execution
        what = re.search(r"GLOBAL [\w.]+", str(error))
        raise ValueError(
            f"--checkpoint {checkpoint} is no pickle of weights alone{f' ({what[0]})' if what else ''}; "
            "nothing of it was run"
        ) from error
    except Exception as error:  # what a broken file makes torch raise has no common class: OSError, KeyError, ...
        raise ValueError(f"--checkpoint {checkpoint} cannot be read as weights: {_first_line(error)}") from error
    for key in ("state_dict", "model"):  # where training scripts put the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"--checkpoint {checkpoint} must hold tensors by name, got {_kind(state)}")
    return dict(state)


def _kind(state: Any) -> str:
    if not isinstance(state, dict):
        return type(state).__name__
    return next(f"{name!r}: {type(v).__name__}" for name, v in state.items() if not isinstance(v, Tensor))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def float_twin(qmodel: Any, checkpoint: Path | None, pretrained: bool) -> nn.Module | None:
    """The float model that a quantized one is compared with, or None where no weights are given."""
    if checkpoint is None and not pretrained:
        return None
    name = qmodel.pretrained_cfg.get("architecture")
    if name is None:
        raise ValueError("the quantized file does not say which timm model it was: no float model to compare with")
    return float_model(name, checkpoint, pretrained)


def integer_sites(net: nn.Module) -> tuple[Site, ...]:
    """Sites of a model; refuses one of which a part would stay float, since a file holds integer models alone."""
    model_parts(net, strict=True)
    return model_sites(net)


def calibration_images(
    net: nn.Module, folder: Path, count: int, mean: str | None, std: str | None, crop: float | None, seed: int
) -> Tensor:
    """Images of --calibration under the model's transform, [n, C, H, W]."""
    transform = eval_transform(net, mean=numbers("mean", mean), std=numbers("std", std), crop=crop)
    return load_folder(folder, transform, count, seed)[0]


def overrides(mean: str | None, std: str | None, crop: float | None) -> dict[str, Any]:
    """The given parts of timm's data config."""
    given = {"mean": numbers("mean", mean), "std": numbers("std", std), "crop_pct": crop}
    return {key: value for key, value in given.items() if value is not None}


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """One number a channel, or one for all."""
    if text is None:
        return None
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"--{name} must be numbers separated by commas, got {text!r}") from None
    return values * 3 if len(values) == 1 else values


BUDGETS = "--mean-weight-bits, --size-mb, --bitops, --mean-act-bits, --latency-ms"


def budget(
    mean_weight_bits: float | None,
    size_mb: float | None,
    bitops: float | None,
    mean_act_bits: float | None,
    latency_ms: float | None,
) -> Budget | None:
    """The limits that were given, None without any; --bitops counts 10^9."""
    limits = (mean_weight_bits, size_mb, None if bitops is None else bitops * 1e9, mean_act_bits, latency_ms)
    return None if all(limit is None for limit in limits) else Budget(*limits)


def plan_of(
    strategy: str,
    act_bits: int,
    tied: bool,
    candidates: str | None,
    act_candidates: str | None,
    group_rows: int | None,
    kernel_times: Path | None,
    sensitivity: Sequence[Path] | None,
) -> dict[str, Any]:
    """How to allocate, as ``planning.allocate`` takes it; widths that are not given are those of the sensitivity."""
    measured = [parsed(path, Sensitivity.from_json) for path in sensitivity or []]
    known = {one.part: one.candidates for one in measured} if strategy in BY_SENSITIVITY else {}
    return {
        "strategy": strategy,
        "activation_bits": act_bits,
        "tied": tied,
        "candidates": _widths("candidates", candidates) or known.get("both" if tied else "weight"),
        "activation_candidates": _widths("act-candidates", act_candidates),
        "group_rows": group_rows,
        "times": None if kernel_times is None else parsed(kernel_times, KernelTimes.from_json),
        "sensitivity": measured,
    }


def _widths(name: str, text: str | None) -> tuple[int, ...] | None:
    """Widths separated by commas."""
    if text is None:
        return None
    try:
        return check_candidates(f"--{name}", [int(word) for word in text.split(",")])
    except ValueError as error:
        raise ValueError(f"--{name} must be widths in 2..8, ascending, separated by commas, got {text!r}") from error


def check_budget(sites: Sequence[Site], limits: Budget, plan: Mapping[str, Any]) -> None:
    """Raises ValueError with the smallest budget that can be met, before anything is measured."""
    try:
        check_plan(sites, limits, **{name: value for name, value in plan.items() if name != "sensitivity"})
    except ValueError as error:
        unit = " (bitops in ones; --bitops counts 10^9)" if "bitops=" in str(error) else ""
        raise ValueError(f"{error}{unit}") from error


def allocation_for(sites: Sequence[Site], path: Path) -> BitAllocation:
    """A file of `vitq allocate` for a model of these sites."""

    def read(text: str) -> BitAllocation:
        allocation = BitAllocation.from_json(text)
        allocation.check(sites)
        return allocation

    return parsed(path, read)


def scores_for(sites: Sequence[Site], path: Path) -> Relevance:
    """A file of `vitq score` for a model of these sites."""
    scores = parsed(path, Relevance.from_json)
    rows = {site.name: site.rows for site in sites}
    got = {name: len(scores.row_flow.get(name, ())) for name in scores.flow}
    wrong = [name for name in {**rows, **got} if rows.get(name) != got.get(name)]
    if wrong:
        raise ValueError(
            f"{path}: scores must be of this model, got {got.get(wrong[0], 'no')} rows of {wrong[0]} "
            f"instead of {rows.get(wrong[0], 'none')}"
        )
    return scores


def parsed(path: Path, read: Callable[[str], T]) -> T:
    """What ``read`` makes of a file's text; ValueErrors name the file."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        return read(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
