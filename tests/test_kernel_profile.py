"""Where the time of a forward goes: what an op must do, whose kernels are counted where, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from tests.command_line import invoke, make_files
from tests.command_line import run as vitq
from tests.small_vits import small_vit, variant_quantized
from vitq_kernels import kernel_profile, roofline
from vitq_kernels.kernel_profile import RANGE, KernelProfile, ProfiledOp, profile_forward
from vitq_kernels.kernel_profile_plot import write_profile_plot
from vitq_kernels.packing import pack_weight
from vitq_kernels.roofline import Peaks, Work, measured_peaks
from vitq_kernels.spec import RowGroups

PEAKS = Peaks(2.0, 1.0, 10.0)
IMAGES = (2, 3, 32, 32)
PROFILE = KernelProfile(
    "ours",
    "NVIDIA H200",
    8,
    250.0,
    PEAKS,
    (
        ProfiledOp("linear_codes 2304x768", 12, 120.0, 60.0, ("gemm_sm90", "reduce")),
        ProfiledOp("layernorm", 24, 79.0, 100.0, ("rows",)),
        ProfiledOp("aten.cat", 1, 0.6, 0.3),
        ProfiledOp("aten.add", 1, 0.4, 0.2),
    ),
)


def linear_arguments(op: str) -> tuple[Any, ...]:
    """Of 5 tokens, K = 16 and N = 24, with a weight of 4 bits, as the reference has it: unpacked."""
    groups = RowGroups.uniform(24, 4)
    weight = pack_weight(torch.zeros(24, 16, dtype=torch.int8), groups)
    from vitq_kernels.ops import prepare_weight, use_backend

    with use_backend("cpu"):
        layout, tensors = prepare_weight(weight)
    ones, zeros = torch.ones(24), torch.zeros(24, dtype=torch.int32)
    residual = (torch.zeros(5, 24),)
    tail = {
        "linear_codes": (zeros, 8),
        "linear_residual": residual,
        "linear_residual_layernorm": (*residual, ones, ones, 1e-6, 8),
    }[op]
    return (torch.zeros(5, 16, dtype=torch.int8), tensors, layout, ones, zeros, *tail)


def seen(function: Any, *arguments: Any) -> list[tuple[str, Work]]:
    """The ops of a call, views left out."""
    with torch.no_grad(), kernel_profile._Ranges(0) as ranges:
        function(*arguments)
    return [(call.label, call.work) for call in ranges.calls if call.work != Work()]


@pytest.mark.parametrize(
    ("op", "vectors", "out_bytes"),
    [
        ("linear_codes", 3, 5 * 24),
        ("linear_residual", 2, 2 * 5 * 24 * 4),
        ("linear_residual_layernorm", 4, 5 * 24 * (2 * 4 + 1)),
    ],
)
def test_the_work_of_our_linear_layers(op: str, vectors: int, out_bytes: int) -> None:
    given = linear_arguments(op)
    weight_bytes = sum(t.numel() * t.element_size() for t in given[1])
    ((label, work),) = seen(getattr(torch.ops.vitq, op), *given)
    assert label == f"{op} 24x16"
    assert work == Work(int8_ops=2 * 5 * 24 * 16, bytes=5 * 16 + weight_bytes + vectors * 24 * 4 + out_bytes)


def test_the_work_of_our_attention() -> None:
    b, h, s, d = 2, 3, 5, 8
    q, k, v = torch.zeros(b, s, 3, h, d, dtype=torch.int8).permute(2, 0, 3, 1, 4).unbind(0)
    tables = (torch.ones(h), torch.zeros(h, 16, dtype=torch.uint8), torch.ones(h, d), torch.zeros(h, d).int())
    ((label, work),) = seen(torch.ops.vitq.attention, q, k, v, *tables, None, None, 8)
    products = 2 * b * h * s * s * d
    moved = 4 * b * h * s * d + h * 4 + h * 16 + 2 * h * d * 4
    assert (label, work) == ("attention 3x5x8", Work(int8_ops=products, f16_ops=products, bytes=moved))


@pytest.mark.parametrize("by_name", [False, True], ids=["in place", "by name"])
def test_the_work_of_our_attention_inside_windows(by_name: bool) -> None:
    b, h, windows, s, d = 2, 3, 4, 5, 8
    q, k, v = torch.zeros(b, windows * s, 3, h, d, dtype=torch.int8).permute(2, 0, 3, 1, 4).unbind(0)
    tables = (torch.ones(h), torch.zeros(h, 16, dtype=torch.uint8), torch.ones(h, d), torch.zeros(h, d).int())
    bias, places = torch.zeros(2, h, s, s).int(), torch.arange(windows * s).int().view(windows, s)
    arguments = {"windows": places, "pattern": torch.zeros(windows).int()}
    given = (q, k, v, *tables, bias, None, 8)
    attention = torch.ops.vitq.attention
    calls = seen(partial(attention, **arguments), *given) if by_name else seen(attention, *given, *arguments.values())
    ((label, work),) = calls
    products = 2 * b * h * windows * s * s * d
    moved = 4 * b * h * windows * s * d + h * 4 + h * 16 + 2 * h * d * 4 + 2 * h * s * s * 4 + windows * (s + 1) * 4
    assert (label, work) == ("attention 3x4x5x8", Work(int8_ops=products, f16_ops=products, bytes=moved))


@pytest.mark.parametrize(
    ("function", "shapes", "label", "ops", "numbers"),
    [
        (F.linear, ((5, 16), (24, 16), (24,)), "aten.addmm 24x16", 2 * 5 * 24 * 16, 5 * 16 + 24 * 16 + 24 + 5 * 24),
        (torch.add, ((5, 16), (5, 16)), "aten.add", 0, 3 * 5 * 16),
        (lambda x: x + x[:1].expand(5, 16), ((5, 16),), "aten.add", 0, 3 * 5 * 16),
    ],
    ids=["linear", "add", "broadcast of a view"],
)
def test_the_work_of_float_ops(function: Any, shapes: Any, label: str, ops: int, numbers: int) -> None:
    assert seen(function, *(torch.zeros(shape) for shape in shapes)) == [(label, Work(f16_ops=ops, bytes=4 * numbers))]


def test_what_is_broadcast_is_moved_once() -> None:
    ((_, work),) = seen(torch.add, torch.zeros(50, 16), torch.zeros(16).expand(50, 16))
    assert work.bytes == 4 * (50 * 16 + 16 + 50 * 16)


def test_a_patch_embedding_and_attention_in_float() -> None:
    ((label, work),) = seen(nn.Conv2d(3, 7, 4, 4, bias=False), torch.zeros(2, 3, 8, 8))
    assert (label, work.f16_ops) == ("aten.convolution 7x48", 2 * 2 * 4 * 7 * 48)
    q = torch.zeros(2, 3, 5, 8)
    found = seen(F.scaled_dot_product_attention, q, q, q)
    assert [work.f16_ops for label, work in found if label.endswith(" 3x5x8")] == [4 * 2 * 3 * 5 * 5 * 8]


@pytest.fixture(scope="module")
def profiled() -> KernelProfile:
    return profile_forward(variant_quantized("class-token"), torch.zeros(IMAGES), PEAKS, "ours", rounds=2)


def test_every_op_of_the_model_is_counted(profiled: KernelProfile) -> None:
    calls = {op.op: op.calls for op in profiled.ops if "." not in op.op}
    assert calls == {
        "attention 2x17x16": 2,
        "layernorm": 4,
        "linear_codes 96x32": 2,
        "linear_gelu_codes 128x32": 2,
        "linear_residual 32x128": 2,
        "linear_real 32x192": 1,
        "linear_residual 32x32": 2,
        "linear_real 10x32": 1,
        "quantize": 1,
        "quantize_patches": 1,
    }


def test_shares_and_distances_follow_from_the_times(profiled: KernelProfile) -> None:
    assert sum(profiled.share(op) for op in profiled.ops) == pytest.approx(100)
    assert [op.us for op in profiled.ops] == sorted((op.us for op in profiled.ops), reverse=True)
    assert profiled.wall_us > 0
    linear = next(op for op in profiled.ops if op.op == "linear_codes 96x32")
    ops_us = 2 * (2 * 34 * 96 * 32) / PEAKS.int8_tops / 1e6
    assert linear.floor_us >= ops_us
    assert linear.pct_of_roofline == 100 * linear.floor_us / linear.us


def test_a_float_model_is_profiled_as_well() -> None:
    found = profile_forward(small_vit(), torch.zeros(IMAGES), PEAKS, rounds=1)
    assert {"aten.addmm 96x32", "aten.convolution 32x192", "aten.native_layer_norm"} <= {op.op for op in found.ops}


def test_a_forward_must_repeat_itself() -> None:
    class Wandering(nn.Module):
        count = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + 1 if self.count % 2 else (x + 1) * 2

    with pytest.raises(RuntimeError, match=r"^model: the ops of a forward must be the same each time"):
        profile_forward(Wandering(), torch.zeros(1, 3), PEAKS, rounds=2)
    with pytest.raises(ValueError, match=r"^rounds must be at least 1, got 0$"):
        profile_forward(Wandering(), torch.zeros(1, 3), PEAKS, rounds=0)


def kernel(name: str, us: float) -> Any:
    return SimpleNamespace(name=name, duration=us)


def event(name: str, kernels: list[Any], *children: Any, device: DeviceType = DeviceType.CPU) -> Any:
    return SimpleNamespace(name=name, kernels=kernels, cpu_children=children, device_type=device, cpu_time_total=99.0)


def test_kernels_count_at_the_op_that_launched_them() -> None:
    launched = event(f"{RANGE}0#0", [kernel("gemm", 3.0)], event("vitq::linear", [kernel("reduce", 1.0)]))
    assert kernel_profile._Timed.of(launched, "cuda") == kernel_profile._Timed(4.0, (("gemm", 3.0), ("reduce", 1.0)))
    assert kernel_profile._Timed.of(launched, "cpu").us == 99.0
    again = replace_device(launched)
    assert list(kernel_profile._ranges_of([launched, again, event("aten::add", [])])) == [launched]
    assert not kernel_profile._is_kernel(again)
    assert kernel_profile._is_kernel(event("gemm", [], device=DeviceType.CUDA))


def replace_device(given: Any) -> Any:
    return event(given.name, [], device=DeviceType.CUDA)


def test_calls_of_one_label_are_one_row() -> None:
    call = kernel_profile._OpCall("linear_codes 24x16", Work(int8_ops=4e6))
    view = kernel_profile._OpCall("aten.view", Work())
    timed = [
        [kernel_profile._Timed(us, (("gemm", us), ("reduce", us / 4))) for us in rounds]
        for rounds in ((2.0, 8.0, 3.0), (5.0, 4.0, 6.0))
    ]
    nothing = [kernel_profile._Timed(0.0, ())] * 3
    (row,) = kernel_profile._grouped([call, view, call], [timed[0], nothing, timed[1]], PEAKS)
    assert row == ProfiledOp("linear_codes 24x16", 2, 3.0 + 5.0, 2 * 2.0, ("gemm", "reduce"))
    assert row.pct_of_roofline == 50.0


def test_the_table() -> None:
    lines = PROFILE.table().splitlines()
    assert lines[0] == "ours, batch 8, NVIDIA H200: 200 us in ops of 250 us a forward, eager"
    assert lines[2].split(None, 4) == ["60.0", "120.0", "12", "50", "linear_codes 2304x768  [gemm_sm90, reduce]"]
    assert lines[3].split()[3:5] == ["127", "layernorm"]
    assert lines[4].split() == ["0.5", "1.0", "2", "50", "2", "others"]
    assert lines[5] == "roofline: 2 int8 TOPS, 1 float, 10 GB/s"
    left = replace(PROFILE, unattributed_us=50.0)
    assert left.table().splitlines()[-2].split() == ["20.0", "50.0", "kernels", "of", "no", "op"]
    assert left.share(left.ops[0]) == 48.0


def test_it_is_json() -> None:
    found = json.loads(json.dumps(PROFILE.to_dict()))
    assert found["ops"][0] == {
        "op": "linear_codes 2304x768",
        "calls": 12,
        "us": 120.0,
        "share_pct": 60.0,
        "roofline_us": 60.0,
        "pct_of_roofline": 50.0,
        "kernels": ["gemm_sm90", "reduce"],
    }
    assert found["peaks"] == {"int8_tops": 2.0, "f16_tops": 1.0, "gbps": 10.0}


@pytest.mark.parametrize("name", ["a.png", "a.svg"])
def test_a_drawing(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_profile_plot(PROFILE, path)
    first = path.read_bytes()
    write_profile_plot(PROFILE, path)
    assert path.read_bytes() == first
    assert len(first) > 5000
    if name == "a.svg":
        text = first.decode()
        assert all(word in text for word in ("linear_codes 2304x768 (12x)", "60.0 %, 50 % of the roofline", "2 others"))
    with pytest.raises(ValueError, match=r"^plot must be a \.png or \.svg file, got a\.pdf$"):
        write_profile_plot(PROFILE, tmp_path / "a.pdf")


def test_measured_peaks_are_those_of_the_fastest_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(calls: Any, *_: Any) -> list[list[float]]:
        for call in calls:
            call()
        return [[9.0, 2.0], [4.0, 8.0], [1.0, 3.0]]

    monkeypatch.setattr(roofline, "wall_times_us", fake)
    ops = 2 * 768**3 / 1e6
    assert measured_peaks("cpu", torch.float32) == Peaks(
        pytest.approx(ops / 2), pytest.approx(ops / 4), pytest.approx(2 * (1 << 26) / 1e3)
    )


def test_vitq_bench_draws_its_profile(tmp_path: Path) -> None:
    work, plot = make_files(tmp_path), tmp_path / "where.svg"
    words = ("bench", work / "q.safetensors", "--batch", "1,2", "--against", "float32", "--rounds", 1)
    done = vitq(*words, "--profile", plot, "--json", tmp_path / "b.json")
    profile = json.loads((tmp_path / "b.json").read_text())["profile"]
    assert (profile["model"], profile["batch"]) == ("ours", 2)
    assert sum(op["share_pct"] for op in profile["ops"]) == pytest.approx(100)
    assert "% of roofline  op" in done.out
    assert "attention 2x17x16" in plot.read_text()
    refused = invoke(*words, "--profile", tmp_path / "where.pdf")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "plot must be a .png or .svg file, got where.pdf" in refused.err
