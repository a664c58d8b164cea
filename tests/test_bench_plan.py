"""The shapes that are measured are those of real models, and every op of the library is among them."""

from __future__ import annotations

import inspect

import pytest
import timm
import torch
from timm.models.swin_transformer import window_partition

from benchmarks.baselines import CUBLAS_F16, SDPA, UNFUSED_PER_TOKEN, torch_patches, torch_per_token, unfused_per_token
from benchmarks.bench_plan import (
    BACKENDS_ON,
    DATA,
    WIDTHS,
    Planned,
    attention_plan,
    linear_layers,
    linear_plan,
    row_plan,
)
from benchmarks.built_case import why_wrong
from benchmarks.kernel_cases import AttentionCase, LinearCase
from benchmarks.kernel_targets import CUBLAS, INT_MM, UNFUSED
from benchmarks.vit_shapes import BATCHES, CLASSES, STAGES, SWINS, VITS, SwinShape, ViTShape
from benchmarks.window_cases import WINDOW_SDPA, WindowCase, shift_masks, swin_case
from tests.conformance import reference_call
from tests.op_cases import CASES, swin_windows
from vitq_kernels.models import model_parts
from vitq_kernels.ops import reference
from vitq_kernels.ops.backends import BACKENDS

ALL = [*linear_plan(), *attention_plan(), *row_plan()]
SMALL = ViTShape("tiny", "", channels=32, heads=2, depth=1, patch=8, image=16)  # 5 tokens


@pytest.mark.parametrize("vit", VITS, ids=lambda vit: vit.name)
def test_shapes_are_timms(vit: ViTShape) -> None:
    with torch.device("meta"):
        parts = model_parts(timm.create_model(vit.timm_name, num_classes=CLASSES))
    block, batch = parts.blocks[0], 2
    assert (len(parts.blocks), block.attn.num_heads, block.attn.head_dim) == (vit.depth, vit.heads, vit.head_dim)
    layers = {name.rpartition(".")[2]: layer for name, layer in block.linears.items()} | {"head": parts.heads["head"]}
    wanted = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
    wanted["patch_embed"] = (parts.patch_proj.weight.shape[0], parts.patch_proj.weight[0].numel())
    got = {name: (n, k) for name, _, _, n, k in linear_layers(vit, batch)}
    assert got == wanted
    rows = {name: m for name, _, m, _, _ in linear_layers(vit, batch)}
    assert rows["qkv"] == batch * ((224 // vit.patch) ** 2 + 1) == rows["patch_embed"] + batch
    assert rows["head"] == batch


@pytest.mark.parametrize("swin", SWINS, ids=lambda swin: swin.name)
def test_windows_are_timms(swin: SwinShape) -> None:
    with torch.device("meta"):
        model = timm.create_model(swin.timm_name)
    for stage in STAGES:
        block = model.layers[stage].blocks[1]  # every second one is shifted
        case = swin_case(swin, 2, stage)
        assert block.input_resolution == (case.grid, case.grid)
        assert (*block.window_size, *block.shift_size) == 2 * (swin.window,) + 2 * (swin.window // 2,)
        assert (block.attn.num_heads, block.dim // block.attn.num_heads) == (case.heads, case.head_dim)
        assert case.windows * case.s == case.grid**2


@pytest.mark.parametrize("swin", [swin for swin in SWINS if "V2" not in swin.name], ids=lambda swin: swin.name)
def test_windows_and_masks_are_timms(swin: SwinShape) -> None:
    """Which token sees which, of all windows: timm's mask, in the order in which it partitions the shifted image."""
    block = timm.create_model(swin.timm_name).layers[2].blocks[1]
    grid = swin.grid(2)
    windows, pattern = swin_windows(grid, grid, swin.window, swin.window // 2)
    tokens = torch.arange(grid * grid).view(1, grid, grid, 1).roll((-(swin.window // 2),) * 2, (1, 2))
    assert torch.equal(window_partition(tokens, block.window_size).flatten(1), windows.long())
    assert torch.equal(shift_masks(swin.window, swin.window // 2)[pattern.long()], block.attn_mask != 0)


def test_the_work_of_windows_is_that_of_sequences_and_their_biases() -> None:
    case = WindowCase(2, 49, 3, 32, grid=14)
    plain = AttentionCase(8, 49, 3, 32).work
    assert (case.work.int8_ops, case.work.f16_ops) == (plain.int8_ops, plain.f16_ops)
    assert case.work.bytes == plain.bytes + 4 * (4 * 3 * 49 * 49 + 196 + 4)


def test_the_baseline_of_windows_computes_the_same_attention() -> None:
    """The masked softmax in float, of the codes that it is given, put back: as ours but for quantization."""
    case = WindowCase(2, 16, 2, 32, grid=8)
    built = case.build("cpu")
    ((_, (_, q, k, v, mask)),) = case.baselines(built).values()
    assert mask.isneginf().any()
    out = torch.nn.functional.scaled_dot_product_attention(q.float() / 32, k.float(), v.float(), mask.float() / 8)
    places = out.view(2, 4, 2, 16, 32).transpose(2, 3).reshape(8, 16, 64)
    wanted = reference.scatter_windows(places, built.arguments["windows"])
    ours = reference_call(built)[0].float()
    assert torch.corrcoef(torch.stack([ours.flatten(), wanted.flatten()]))[0, 1] > 0.5


def test_every_op_at_every_model_batch_and_width() -> None:
    assert {planned.case.op for planned in ALL} == set(CASES)
    for op in CASES:
        mine = [planned for planned in ALL if planned.case.op == op]
        models = (*VITS, *SWINS) if op == "attention" else VITS
        assert {(p.model, p.case.batch) for p in mine} == {(vit.name, batch) for vit in models for batch in BATCHES}
    linears = [planned.case for planned in linear_plan()]
    assert {case.widths for case in linears if case.op == "linear_codes"} == set(WIDTHS)
    assert {case.data for case in linears} == {p.case.data for p in attention_plan()} == set(DATA)


def test_names_tell_cases_apart() -> None:
    names = [str(planned) for planned in ALL]
    assert len(set(names)) == len(names)
    assert not [name for name in names if " " in name or "/" in name]


def test_every_backend_is_measured_where_it_computes() -> None:
    assert {name for names in BACKENDS_ON.values() for name in names} == set(BACKENDS)
    for device, names in BACKENDS_ON.items():
        assert all(not BACKENDS[name].devices or device in BACKENDS[name].devices for name in names)


SMALL_CASES = [
    *(LinearCase(name, op, 2, m, n, k, (4,)) for name, op, m, n, k in linear_layers(SMALL, 2)),
    *(planned.case for planned in ALL if planned.model == "DeiT-T" and planned.case.batch == 1),
]
SMALL_WINDOWS = WindowCase(2, 16, 2, 32, grid=8)
ONE_OF_EACH = {(case.op, getattr(case, "softmax_bits", 0), case.data): case for case in reversed(SMALL_CASES)}


@pytest.mark.parametrize(
    "case", [*ONE_OF_EACH.values(), SMALL_WINDOWS], ids=lambda c: f"{c.op}-{c.case}-{c.data}".replace(" ", "_")
)
def test_arguments_are_the_ops_and_fill_the_outputs(case: object) -> None:
    built = case.build("cpu")
    names = [name for name in inspect.signature(getattr(reference, case.op)).parameters if name != "accumulate"]
    assert list(built.arguments) == names
    assert why_wrong(built, "cpu", "cpu") == ""
    codes = [output for output in reference_call(built) if output.dtype == torch.int8]
    assert all(len(output.unique()) >= 12 for output in codes), "outputs must spread, not saturate"
    assert case.work.bytes > 0
    for function, arguments in case.baselines(built).values():
        if function.__name__ != "sdpa":
            function(*arguments)


def test_baselines_of_a_linear() -> None:
    names = {op: set(case.baselines(case.build("cpu"))) for (op, *_), case in ONE_OF_EACH.items()}
    assert names["linear_codes"] - {"torchao int8 dynamic linear, bf16"} == {CUBLAS, CUBLAS_F16, INT_MM, UNFUSED}
    assert UNFUSED_PER_TOKEN in names["linear_per_token"]
    assert names["attention"] == set(SDPA)
    assert set(SMALL_WINDOWS.baselines(SMALL_WINDOWS.build("cpu"))) == {WINDOW_SDPA}


def test_baselines_compute_what_they_say() -> None:
    x = torch.randn(5, 32)
    weight = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    exact = x @ weight.float().t() * 0.01 + 1
    got = unfused_per_token(x, weight, torch.full((16,), 0.01), torch.ones(16))
    assert (got - exact).abs().max() < 0.02 * exact.abs().max()
    codes, scale = torch_per_token(x)
    assert (codes * scale - x).abs().max() <= 0.5001 * scale.max()
    image = torch.randn(2, 3, 16, 24)
    affine = (torch.full((192,), 40.0), torch.zeros(192, dtype=torch.int32))
    expected = reference.quantize_patches(image, *affine, 8, 8, 8)
    assert torch.equal(torch_patches(image, 8, 40.0), expected)


def test_the_cost_of_a_case_counts_operations_and_bytes() -> None:
    linear = Planned("m", LinearCase("qkv", "linear_codes", 1, 10, 20, 30, (8,)))
    assert linear.gop == pytest.approx((2 * 10 * 20 * 30 + 10 * 30 + 20 * 30 + 10 * 20) / 1e9)
