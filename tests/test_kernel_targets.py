"""What ``benchmarks.kernel_targets`` says of rows: which target, met or not, and means of ratios."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import predictions
from benchmarks.kernel_targets import (
    CUBLAS,
    CUDNN,
    FLASH,
    FOUR_BIT,
    INT_MM,
    TORCH_LAYERNORM,
    UNFUSED,
    cuda_targets,
    four_bit,
    over_triton,
    tile_choice,
    triton_targets,
)
from benchmarks.microbench import geometric_mean, speedups
from vitq_kernels.ops.cuda.gpus import Gpu

H100, A100 = Gpu(90, 132), Gpu(80, 108)


def row(case: str, bits: str, us: float, **given: Any) -> dict[str, Any]:
    base = {"op": "linear_codes", "batch": 64, "N": 8, "data": "uniform", "cache": "cold", "baseline": CUBLAS}
    return {**base, "case": case, "bits_w": bits, "us": us, "speedup_x": 12.0 / us, "pct_of_peak": None, **given}


def found(targets: list[dict[str, Any]]) -> dict[str, Any]:
    return {r["target"].removeprefix("floor: "): (r["bound"], r["measured"], r["result"]) for r in targets}


def test_targets_of_triton() -> None:
    rows = [row("qkv", "8", 6.0), row("fc2", "8", 24.0), row("qkv", "6", 10.0), row("qkv", "3/4/6", 10.6)]
    assert found(triton_targets([*rows, row("qkv", "8", 1, cache="hot")], None)) == {
        f"W8 over {CUBLAS} at batch 64": (">= 1.2", pytest.approx(1.0), "not met"),
        f"W6 over {CUBLAS} at batch 64": (">= 1.2", pytest.approx(1.2), "met"),
        f"W3/4/6 over {CUBLAS} at batch 64": (">= 1.2", pytest.approx(12 / 10.6), "not met"),
        "time of mixed widths over that of the widest alone, batch 64": ("<= 1.05", pytest.approx(1.06), "not met"),
    }
    (means,) = speedups(rows)
    assert means["cold_x"] == pytest.approx(geometric_mean([2.0, 0.5, 1.2, 12 / 10.6]))
    assert (means["cases"], means["hot_x"]) == (4, None)


def test_the_cost_of_the_model_s_choice() -> None:
    rows = [
        {"case": "qkv", "batch": 1, "bits_w": "4", "tile": t, "rank": i, "us": us}
        for i, t, us in ((1, "a", 6.0), (2, "b", 4.0))
    ]
    assert tile_choice(rows)[0]["cost_of_choice_x"] == 1.5
    assert tile_choice(rows[1:])[0]["cost_of_choice_x"] is None


def test_floors_of_cuda_at_batch_64() -> None:
    rows = [
        row("qkv", "8", 6.0, pct_of_peak=60.0),
        row("qkv", "8", 6.0, baseline=INT_MM, speedup_x=0.9),
        row("qkv", "8", 6.0, baseline=UNFUSED, speedup_x=1.7),
        row("qkv", "4", 6.0, pct_of_peak=60.0),
        row("qkv", "6", 8.0),
        row("qkv", "3/4/6", 8.4),
        row("qkv", "8", 1.0, data="gaussian"),
    ]
    wanted = {
        f"W8 over {CUBLAS} at batch 64": (">= 1.5", pytest.approx(2.0), "met"),
        f"W8 over {INT_MM} at batch 64": (">= 1.0", pytest.approx(0.9), "not met"),
        f"W8 over {UNFUSED} at batch 64": (">= 1.7", pytest.approx(1.7), "met"),
        "speed of W4 over W8 at batch 64": (">= 0.95", pytest.approx(1.0), "met"),
        "speed of W6 over W8 at batch 64": (">= 0.85", pytest.approx(0.75), "not met"),
        "time of mixed widths over that of the widest alone, batch 64": ("<= 1.05", pytest.approx(1.05), "met"),
    }
    assert found(cuda_targets(rows, A100)) == wanted
    hopper = found(cuda_targets(rows, H100))
    assert hopper.pop("W8, % of the int8 peak at batch 64") == (">= 51.0", pytest.approx(60.0), "met")
    assert hopper.pop("layernorm, GB/s from L2 at batch 64") == (">= 3440.0", None, "not measured")
    assert hopper == wanted


def test_floors_of_cuda_at_smaller_batches() -> None:
    layers = [row(case, "8", us, batch=1) for case, us in (("qkv", 4.0), ("fc2", 5.5))]
    eight = [row("qkv", "8", 9.0, batch=8, tops=729.0), row("fc2", "8", 9.0, batch=8, tops=374.0)]
    norm = {"op": "layernorm", "batch": 8, "baseline": TORCH_LAYERNORM, "N": None, "gbps": 3000.0}
    heads = {"op": "attention", "batch": 8, "N": None}
    rows = [
        *(*layers, row("qkv", "3", 3.0, batch=1), *eight),
        *(row("K=768", "", us, cache=cache, **norm) for cache, us in (("cold", 5.0), ("hot", 2.5))),
        row("S=197", "", 8.0, baseline=FLASH, **heads),
        row("S=197", "", 8.0, baseline=CUDNN, speedup_x=None, **heads),
    ]
    targets = found(cuda_targets(rows, H100))
    assert targets["W8, us of the slowest layer at batch 1"] == ("<= 5.0", 5.5, "not met")
    assert targets["speed of W3 over W8 at batch 1"] == (">= 0.95", pytest.approx(4 / 3), "met")
    assert targets[f"W8 over {CUBLAS} at batch 8"][0] == ">= 1.4"
    assert targets["W8, TOPS over those of the table at batch 8"] == (">= 0.75", pytest.approx(0.5**0.5), "not met")
    assert targets["layernorm, us at batch 8"] == ("<= 2.8", 2.5, "met")
    assert targets[f"layernorm over {TORCH_LAYERNORM} at batch 8"] == (">= 2.0", pytest.approx(2.4), "met")
    assert targets[f"attention S=197 over {FLASH} at batch 8"] == (">= 1.2", pytest.approx(1.5), "met")
    assert targets[f"attention S=197 over {CUDNN} at batch 8"] == (">= 1.0", None, "not measured")
    assert all(r["target"].startswith(("floor: ", "time of mixed")) for r in cuda_targets(rows, H100))
    assert not [name for name in found(cuda_targets(rows, A100)) if "us" in name or "TOPS" in name]


def test_speed_over_other_rows() -> None:
    rows = [row("qkv", "4", 6.0), row("qkv", "4", 6.0, baseline=INT_MM), row("fc2", "4", 10.0), row("fc2", "8", 1.0)]
    narrow = [row("qkv", "4", 3.0, data=FOUR_BIT), row("fc2", "4", 8.0, data=FOUR_BIT)]
    key = {"op": "linear_codes", "batch": 64, "bits_w": "4", "cases": 2}
    assert four_bit([*rows, *narrow]) == [key | {"w4a4_over_w4a8_x": pytest.approx((2 * 1.25) ** 0.5)}]
    assert four_bit(rows) == []
    triton = [row("qkv", "4", 12.0), row("fc2", "4", 5.0), row("fc2", "4", 1.0, cache="hot")]
    assert over_triton(rows, triton) == [key | {"over_triton_x": pytest.approx(1.0)}]
    assert over_triton(rows, []) == []


def test_the_committed_predictions_are_the_models() -> None:
    page = predictions.PAGE.read_text(encoding="utf-8")
    assert predictions.with_tables(page) == page
    assert page.count("| DeiT-B |") == 16 + 6 + 5
    assert page.count("| ViT-L |") == 16 + 3 + 5
