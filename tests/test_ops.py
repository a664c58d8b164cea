"""Every ``vitq::`` op on every backend: the reference's numbers, and the contract of a torch op."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import vitq_kernels.ops as ops
from tests.conformance import Case, check_values, op_arguments, op_call
from tests.conftest import BackendCase
from tests.numerics import assert_bitwise_equal, codes, integers, reals, uniform
from tests.op_cases import ALL_CASES, CASES, DTYPES, SAMPLES, WINDOWS
from vitq_kernels.ops.cpu import primitives
from vitq_kernels.packing import pack_weight
from vitq_kernels.spec import RowGroups

EACH_OP = pytest.mark.parametrize("case", [*SAMPLES.values(), WINDOWS[0]], ids=[*SAMPLES, "attention-windows"])


def test_every_op_has_cases() -> None:
    assert set(CASES) == set(ops.OPS)
    assert all(case.op == op for op, cases in CASES.items() for case in cases)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_values(case: Case, backend: BackendCase) -> None:
    check_values(case, backend.name, backend.device, backend.reference_floats)


def with_tensors(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return replace(case, arguments={k: change(v) if isinstance(v, Tensor) else v for k, v in case.arguments.items()})


def with_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The case with x, residual and real outputs in another float dtype."""
    changed = {k: v.to(dtype) for k, v in case.arguments.items() if k in ("x", "image", "residual")}
    out = {"out_dtype": dtype} if "out_dtype" in case.arguments else {}
    return replace(case, arguments=case.arguments | changed | out)


@EACH_OP
@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
def test_float_dtypes(case: Case, dtype: torch.dtype, backend: BackendCase) -> None:
    check_values(with_dtype(case, dtype), backend.name, backend.device, backend.reference_floats)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, every second element of a larger storage, from its fourth on."""
    room = tensor.new_zeros(2 * tensor.numel() + 3)
    return room.as_strided(tensor.shape, [2 * s for s in tensor.contiguous().stride()], 3).copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, last two dims exchanged in storage."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor


def offset(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, three elements into their storage: no alignment to speak of."""
    return tensor.new_zeros(tensor.numel() + 3)[3:].view(tensor.shape).copy_(tensor)


@EACH_OP
def test_inputs_that_require_grad(case: Case, backend: BackendCase) -> None:
    """As the parameters of a model that is called outside no_grad."""
    given = with_tensors(case, lambda t: t.clone().requires_grad_(t.is_floating_point()))
    expected = op_call(case, backend.name, backend.device)
    for got, wanted in zip(op_call(given, backend.name, backend.device), expected, strict=True):
        assert_bitwise_equal(got.detach(), wanted)


@EACH_OP
@pytest.mark.parametrize("layout", [strided, transposed, offset], ids=lambda f: f.__name__)
def test_any_strides_and_offset(case: Case, layout: Callable[[Tensor], Tensor], backend: BackendCase) -> None:
    moved = with_tensors(case, layout)
    check_values(moved, backend.name, backend.device, backend.reference_floats, like=case)
    for output in op_call(moved, backend.name, backend.device):
        assert output.is_contiguous()  # as the fake says


@EACH_OP
def test_opcheck(case: Case, backend: BackendCase) -> None:
    with ops.use_backend(backend.name):
        for variant in (case, with_tensors(case, transposed)):
            torch.library.opcheck(getattr(torch.ops.vitq, case.op), op_arguments(variant, backend.device))


@EACH_OP
def test_fake_is_like_real(case: Case, backend: BackendCase) -> None:
    moved = with_tensors(case, transposed)
    real = op_call(moved, backend.name, backend.device)
    with ops.use_backend(backend.name):
        arguments = op_arguments(moved, backend.device)
        with FakeTensorMode() as mode:
            fake = getattr(torch.ops.vitq, case.op)(*tree_map_only(Tensor, mode.from_tensor, arguments))
    fakes = (fake,) if isinstance(fake, Tensor) else fake
    for got, wanted in zip(fakes, real, strict=True):
        form = (got.shape, got.dtype, got.device, got.stride())
        assert form == (wanted.shape, wanted.dtype, wanted.device, wanted.stride())


@EACH_OP
def test_two_runs_give_the_same_bits_and_leave_the_inputs(case: Case, backend: BackendCase) -> None:
    with ops.use_backend(backend.name):
        arguments = op_arguments(case, backend.device)
        kept = tree_map_only(Tensor, Tensor.clone, arguments)
        first, second = (getattr(torch.ops.vitq, case.op)(*arguments) for _ in range(2))
    for got, wanted in zip(*map(tree_leaves, (arguments, kept)), strict=True):
        if isinstance(got, Tensor):
            assert_bitwise_equal(got, wanted)
    for got, wanted in zip(*map(tree_leaves, (first, second)), strict=True):
        assert_bitwise_equal(got, wanted)


def with_tokens(case: Case, lead: tuple[int, ...]) -> Case:
    """The case with the first of its tokens, in ``lead`` leading sizes."""
    count = torch.Size(lead).numel()
    changed = {}
    for name, value in case.arguments.items():
        if name in ("x", "a", "token_scale") or (name == "residual" and value.dim() > 1):
            changed[name] = value[:count].reshape((*lead, *value.shape[1:]))
    return replace(case, arguments=case.arguments | changed)


EACH_TOKEN_OP = pytest.mark.parametrize(
    "case", [c for op, c in SAMPLES.items() if op not in ("attention", "quantize_patches")], ids=lambda c: c.op
)


@EACH_TOKEN_OP
@pytest.mark.parametrize("lead", [(), (2, 8), (4, 2, 2)], ids=["vector", "2x8", "4x2x2"])
def test_any_leading_sizes(case: Case, lead: tuple[int, ...], backend: BackendCase) -> None:
    check_values(with_tokens(case, lead), backend.name, backend.device, backend.reference_floats)


@EACH_TOKEN_OP
@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=["0", "2x0"])
def test_no_tokens_give_no_outputs(case: Case, lead: tuple[int, ...], backend: BackendCase) -> None:
    full = op_call(case, backend.name, backend.device)
    for got, wanted in zip(op_call(with_tokens(case, lead), backend.name, backend.device), full, strict=True):
        assert (got.shape, got.dtype) == ((*lead, *wanted.shape[1:]), wanted.dtype)


def channels_last(image: Tensor) -> Tensor:
    return image.contiguous(memory_format=torch.channels_last)


def cropped(image: Tensor) -> Tensor:
    """The same numbers, a window of a larger image."""
    b, c, h, w = image.shape
    return image.new_zeros(b, c + 1, h + 2, w + 5)[:, 1:, 1:-1, 3:-2].copy_(image)


@pytest.mark.parametrize("layout", [channels_last, cropped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES["quantize_patches"][::5], ids=str)
def test_patches_of_images_in_any_layout(case: Case, layout: Callable[[Tensor], Tensor], backend: BackendCase) -> None:
    moved = replace(case, arguments=case.arguments | {"image": layout(case.arguments["image"])})
    check_values(moved, backend.name, backend.device, backend.reference_floats, like=case)


def test_patches_of_an_empty_batch(backend: BackendCase) -> None:
    case = SAMPLES["quantize_patches"]
    empty = replace(case, arguments=case.arguments | {"image": case.arguments["image"][:0]})
    assert op_call(empty, backend.name, backend.device)[0].shape == (0, 4, 4, 24)


def test_attention_over_an_empty_batch(backend: BackendCase) -> None:
    x = SAMPLES["attention"].arguments
    empty = replace(SAMPLES["attention"], arguments=x | {k: x[k][:0] for k in "qkv"} | {"bias_q": None})
    assert op_call(empty, backend.name, backend.device)[0].shape == (0, 49, 96)


def test_windows_over_an_empty_batch(backend: BackendCase) -> None:
    x = WINDOWS[0].arguments
    empty = replace(WINDOWS[0], arguments=x | {k: x[k][:0] for k in "qkv"})
    assert op_call(empty, backend.name, backend.device)[0].shape == (0, 14 * 21, 96)


def test_windows_of_views_of_a_fused_qkv(backend: BackendCase) -> None:
    x = WINDOWS[0].arguments
    fused = torch.stack([x[name].transpose(1, 2) for name in "qkv"], 2)
    views = dict(zip("qkv", fused.permute(2, 0, 3, 1, 4), strict=True))
    moved = replace(WINDOWS[0], arguments=x | views)
    check_values(moved, backend.name, backend.device, like=WINDOWS[0])


@pytest.mark.parametrize("case", CASES["linear_codes"] + CASES["linear_real"], ids=str)
def test_cpu_backend_where_the_int8_gemm_saturates(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # On x86 without VNNI torch._int_mm is not exact; here it saturates as much as can be.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.int() @ b.int()).clamp(-32768, 32767))
    monkeypatch.setattr(primitives, "int_mm_pays", primitives.int_mm_pays.__wrapped__)
    assert not primitives.int_mm_pays()
    check_values(case, "cpu")


def test_cpu_backend_on_a_cpu_without_vnni() -> None:
    # oneDNN reads this variable once a process; elsewhere than on x86 it means nothing.
    code = """if True:
        import torch
        from vitq_kernels.ops.cpu.primitives import matmul_into
        a, w = (torch.full((n, 147), 127, dtype=torch.int8) for n in (17, 72))
        acc = torch.empty(17, 72, dtype=torch.int32)
        matmul_into(acc, a, w.t())
        assert (acc == 127 * 127 * 147).all()
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)


def chain(x: Tensor, p: dict[str, Any], layout: str) -> tuple[Tensor, Tensor]:
    """A transformer block of ops: x [B, S, 64] with two heads."""
    vitq = torch.ops.vitq
    a = vitq.quantize(x, p["inv_scale"], p["zero_point"], 8)
    qkv = vitq.linear_codes(a, p["qkv"], layout, p["m192"], p["b192"], p["z192"], 8)
    q, k, v = qkv.view(*x.shape[:2], 3, 2, 32).permute(2, 0, 3, 1, 4)
    a = vitq.attention(q, k, v, p["kappa"], p["levels"], p["mh"], p["zh"], None, None, 8)
    x = vitq.linear_residual(a, p["proj"], layout, p["m64"], p["b64"], x)
    x, a = vitq.add_layernorm(x, x, p["inv_scale"], p["offset"], 1e-6, 8)
    a = vitq.linear_gelu_codes(a, p["fc1"], layout, p["m192"], p["b192"], p["inv192"], p["z192"], 8, "none")
    a, scale = vitq.quantize_per_token(vitq.linear_real(a, p["fc2"], layout, p["m64"], p["b64"], torch.float16))
    y = vitq.linear_per_token(a, scale, p["proj"], layout, p["m64"], None, torch.float32)
    return x + y, vitq.layernorm(y, p["inv_scale"], p["offset"], 1e-6, 4)


def chain_parameters(device: str = "cpu") -> tuple[dict[str, Any], str]:
    p: dict[str, Any] = {
        "inv_scale": uniform(20, 40, (64,), 1),
        "zero_point": integers(-10, 10, (64,), 2),
        "offset": uniform(-5, 5, (64,), 3),
        "kappa": torch.tensor([1e-4, 2e-4]),
        "levels": torch.tensor([[255, 128, 64, 32, 16, 8, 4, 0]] * 2, dtype=torch.uint8),
        "mh": uniform(1, 2, (2, 32), 4),
        "zh": integers(-9, 9, (2, 32), 5),
        "inv192": uniform(20, 40, (192,), 6),
    }
    for n in (64, 192):
        p[f"m{n}"], p[f"b{n}"] = uniform(1e-4, 4e-4, (n,), n), integers(-999, 999, (n,), n + 1)
        p[f"z{n}"] = integers(-9, 9, (n,), n + 2)
    p = {name: tensor.to(device) for name, tensor in p.items()}
    layout = ""
    for seed, (name, n, k) in enumerate((("qkv", 192, 64), ("proj", 64, 64), ("fc1", 192, 64), ("fc2", 64, 192))):
        packed = pack_weight(codes("random", (n, k), 4, seed).to(device), RowGroups.uniform(n, 4))
        layout, p[name] = ops.prepare_weight(packed)
    return p, layout


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(dynamic: bool, backend: BackendCase) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(chain, fullgraph=True, backend=keep, dynamic=dynamic)
    with ops.use_backend(backend.name):
        p, layout = chain_parameters(backend.device)
        for shape in ((5, 11, 64), (3, 17, 64), (4, 9, 64)):
            x = reals("normal", shape, seed=9).to(backend.device)
            for got, wanted in zip(compiled(x, p, layout), chain(x, p, layout), strict=True):
                assert_bitwise_equal(got, wanted)
    if dynamic:
        assert len(graphs) == 1  # sizes did not specialise


def test_weight_layout_is_a_constant_of_the_graph() -> None:
    compiled = torch.compile(lambda x: (x + 1, ops.weight_layout("cpu")), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))[1] == chain_parameters()[1]
