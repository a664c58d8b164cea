"""The integer modules against real-valued formulas over numbers that the tests dequantize by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal, assert_reals_close, codes, integers, reals, uniform
from tests.small_vits import variant_quantized, variant_vit
from vitq_kernels import ops
from vitq_kernels.nn import (
    DynamicQuantLinear,
    QuantAttention,
    QuantizeInput,
    QuantLayerNorm,
    QuantLinear,
    QuantMlp,
    QuantPatchEmbed,
    flatten_patches,
)
from vitq_kernels.packing import pack_weight
from vitq_kernels.quantizers import log2_levels
from vitq_kernels.spec import RowGroups

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- a linear whose real numbers are known ------------------------------------------------------------------------


def shuffled_groups(rows: int, seed: int = 0) -> RowGroups:
    """Groups of 16 rows of widths 2..8, reordered inside tiles."""
    order, bits = [], []
    for tile in range(0, rows, 256):
        count = min(256, rows - tile)
        order += (tile + integers(0, 1 << 30, (count,), seed + tile).argsort()).tolist()
        bits += integers(2, 8, (-(-count // 16),), seed + tile + 1).tolist()
    return RowGroups(rows, tuple(bits), 16, tuple(order))


GROUPS = {
    "8-bit": lambda rows: RowGroups.uniform(rows, 8),
    "3-bit": lambda rows: RowGroups.uniform(rows, 3),
    "mixed": shuffled_groups,
}


def row_codes(groups: RowGroups, cols: int, seed: int = 0) -> Tensor:
    """int8 [N, K], each row within its width and filling it."""
    rows = [codes("random", (1, cols), bits, seed + n) for n, bits in enumerate(groups.row_bits())]
    return torch.cat(rows)


@dataclass(frozen=True)
class KnownLinear:
    """A linear ``y = x @ weight.T + bias`` in reals, and what its integer form needs."""

    weight: Tensor  # float64 [N, K]
    bias: Tensor  # float64 [N]
    codes: Tensor  # int8 [N, K]; weight[n, k] = step[n] * codes[n, k] / in_scale[k]
    step: Tensor  # float64 [N], real units of the output per accumulator unit
    in_scale: Tensor  # float64 [K]
    in_zero: Tensor  # int32 [K]
    groups: RowGroups

    @classmethod
    def make(cls, rows: int, cols: int, groups: RowGroups, seed: int = 0) -> KnownLinear:
        w = row_codes(groups, cols, seed)
        in_scale = uniform(0.01, 0.05, (cols,), seed + 1).double()
        half_range = 2.0 ** (torch.tensor(groups.row_bits()) - 1)
        step = uniform(0.5, 1.5, (rows,), seed + 2).double() * 0.02 / half_range / math.sqrt(cols)
        in_zero = integers(-90, 90, (cols,), seed + 3)
        return cls(
            step[:, None] * w / in_scale, uniform(-1, 1, (rows,), seed + 4).double(), w, step, in_scale, in_zero, groups
        )

    def integer(self, epilogue: str, out_scale: Tensor | None = None, centre: float = 0.0, **arguments) -> QuantLinear:
        """The module; ``out_scale`` [N] is of output codes that count from ``centre``."""
        bias_q = ((self.bias - centre) / self.step).round() - (self.codes.double() * self.in_zero).sum(1)
        multiplier = self.step if out_scale is None else self.step / out_scale
        packed = pack_weight(self.codes, self.groups)
        return QuantLinear(packed, multiplier.float(), bias_q.int(), epilogue, **arguments)

    def real_input(self, a: Tensor) -> Tensor:
        """What input codes [..., K] stand for."""
        return (a.double() - self.in_zero) * self.in_scale

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


SHAPES = [(24, 32, (5,)), (40, 50, (2, 7)), (300, 33, (3,))]  # N, K, leading sizes; K odd, two tiles of rows
CASES = [(n, k, lead, kind) for n, k, lead in SHAPES for kind in GROUPS]
each_case = pytest.mark.parametrize(
    ("n", "k", "lead", "kind"),
    CASES,
    ids=[f"{'x'.join(map(str, lead))}-{k}-to-{n}-{kind}" for n, k, lead, kind in CASES],
)


def known(n: int, k: int, lead: tuple[int, ...], kind: str) -> tuple[KnownLinear, Tensor, Tensor]:
    """A linear, input codes and the exact real outputs."""
    linear = KnownLinear.make(n, k, GROUPS[kind](n), seed=n + k)
    a = codes("random", (*lead, k), 8, seed=n)
    return linear, a, linear(linear.real_input(a))


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    worst = ((actual.double() - expected).abs() / bound).max()
    assert worst <= 1, f"{float(worst):.4g} times the bound"


@each_case
def test_linear_real_is_the_real_linear(n: int, k: int, lead: tuple, kind: str) -> None:
    linear, a, y = known(n, k, lead, kind)
    out = linear.integer("real")(a)
    assert out.dtype == torch.float32
    assert out.shape == (*lead, n)
    assert_within(out, y, linear.step * 0.5 + 1e-6 * y.abs().max())  # the bias is a whole number of steps


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@each_case
def test_linear_residual_adds_in_the_residuals_dtype(
    n: int, k: int, lead: tuple, kind: str, dtype: torch.dtype
) -> None:
    linear, a, y = known(n, k, lead, kind)
    residual = reals("normal", (*lead, n), dtype, seed=3)
    out = linear.integer("residual")(a, residual)
    assert out.dtype == dtype
    exact = residual.double() + y
    assert_within(out, exact, linear.step * 0.5 + 2 * torch.finfo(dtype).eps * (1 + exact.abs()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@each_case
def test_linear_codes_stand_for_the_real_outputs(n: int, k: int, lead: tuple, kind: str, bits: int) -> None:
    linear, a, y = known(n, k, lead, kind)
    scale = uniform(0.9, 1.1, (n,), 5).double() * y.std() / (1 << (bits - 1))  # clips beyond one sigma
    zero = integers(-1, 1, (n,), 6)
    module = linear.integer("codes", scale, 0.25, zero_point=zero, out_bits=bits)
    out = module(a)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    assert out.dtype == torch.int8
    assert qmin == out.min()
    assert qmax == out.max()
    back = (out.double() - zero) * scale + 0.25
    reachable = torch.maximum(torch.minimum(y, (qmax - zero) * scale + 0.25), (qmin - zero) * scale + 0.25)
    assert_within(back, reachable, 0.5001 * scale + 0.5 * linear.step)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@each_case
def test_linear_gelu_codes_stand_for_gelu(n: int, k: int, lead: tuple, kind: str, approximate: str) -> None:
    linear, a, y = known(n, k, lead, kind)
    g = F.gelu(y, approximate=approximate)
    scale = uniform(0.005, 0.02, (n,), 5).double()
    zero = integers(-128, -90, (n,), 6)
    module = linear.integer("gelu", zero_point=zero, inv_scale=(1 / scale).float(), gelu=approximate)
    back = (module(a).double() - zero) * scale
    reachable = torch.maximum(torch.minimum(g, (127 - zero) * scale), (-128 - zero) * scale)
    assert_within(back, reachable, 0.5001 * scale + 0.6 * linear.step)
    assert (back != 0).any()


def test_the_two_forms_of_gelu_differ() -> None:
    linear, a, y = known(40, 50, (2, 7), "8-bit")
    apart = (F.gelu(y) - F.gelu(y, approximate="tanh")).abs().max()
    arguments = {"zero_point": torch.zeros(40, dtype=torch.int32), "inv_scale": torch.full((40,), float(4 / apart))}
    erf, tanh = (linear.integer("gelu", gelu=form, **arguments)(a) for form in ("none", "tanh"))
    assert (erf != tanh).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_quantize_input_makes_it_a_drop_in_for_linear(dtype: torch.dtype) -> None:
    linear, _, _ = known(40, 50, (2, 7), "mixed")
    module = linear.integer("real", quantize_input=QuantizeInput((1 / linear.in_scale).float(), linear.in_zero, 8))
    x = (reals("normal", (2, 7, 50), seed=1) * 0.5).to(dtype)
    low, high = ((q - linear.in_zero) * linear.in_scale for q in (-128, 127))
    clipped = torch.maximum(torch.minimum(x.double(), high), low)
    out = module(x)
    assert out.dtype == dtype
    bound = 0.5 * (linear.weight.abs() @ linear.in_scale) + linear.step  # half a step of every input
    assert_within(out, linear(clipped), bound * 1.001 + torch.finfo(dtype).eps * 8)
    assert (clipped != x.double()).any()


def test_linear_refuses_what_does_not_fit() -> None:
    linear, a, _ = known(24, 32, (5,), "8-bit")
    with pytest.raises(ValueError, match=r"vitq::linear_real: weight must be int8 \[24, 31\]"):
        linear.integer("real")(a[:, 1:])
    with pytest.raises(ValueError, match="vitq::linear_residual: residual must be"):
        linear.integer("residual")(a, torch.zeros(5, 23))


# --- LayerNorm, attention, MLP, block -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "outlier", "zero_rows", "constant_rows"])
def test_layernorm_codes_stand_for_layer_norm(kind: str, bits: int, dtype: torch.dtype) -> None:
    channels = 48
    x = reals(kind, (3, 5, channels), dtype, seed=2)
    gamma, beta = uniform(-2, 2, (channels,), 1), uniform(-1, 1, (channels,), 2)
    scale = uniform(0.5, 2, (channels,), 3).double() * 4 / (1 << bits)
    zero = integers(-1, 1, (channels,), 4)
    module = QuantLayerNorm((gamma / scale).float(), (beta / scale + zero).float(), 1e-6, bits)
    exact = F.layer_norm(x.double(), (channels,), gamma.double(), beta.double(), 1e-6)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    reachable = torch.maximum(torch.minimum(exact, (qmax - zero) * scale), (qmin - zero) * scale)
    assert_within((module(x).double() - zero) * scale, reachable, 0.5001 * scale)


def attention_module(heads: int, dim: int, seed: int = 0) -> tuple[QuantAttention, KnownLinear, dict[str, Tensor]]:
    """Attention over a known qkv linear, with 8-bit probabilities, an identity-like proj and its scales."""
    width = heads * dim
    qkv = KnownLinear.make(3 * width, 24, shuffled_groups(3 * width, seed), seed)
    head_scale = uniform(0.01, 0.02, (2, heads), seed + 1).double()
    out_scale = uniform(0.022, 0.026, (heads, dim), seed + 2).double()
    v_scale = uniform(0.01, 0.02, (heads, dim), seed + 3).double()
    scales = torch.cat((head_scale.repeat_interleave(dim, 1).flatten(), v_scale.flatten()))
    zero = integers(-20, 20, (heads, dim), seed + 4)
    tau = 2.0**-5
    kappa = head_scale[0] * head_scale[1] * dim**-0.5 * math.log2(math.e) / tau
    proj = KnownLinear.make(20, width, RowGroups.uniform(20, 8), seed + 5)
    module = QuantAttention(
        qkv.integer("codes", scales, zero_point=torch.zeros(3 * width, dtype=torch.int32)),
        proj.integer("residual"),
        kappa.float(),
        log2_levels(8, tau).expand(heads, -1).clone(),
        (v_scale / out_scale).float(),
        zero,
        8,
    )
    return module, qkv, {"qkv": scales, "out": out_scale, "zero": zero, "proj": proj}


def test_attention_is_softmax_attention_of_what_its_codes_stand_for() -> None:
    heads, dim = 3, 4
    module, qkv, known_as = attention_module(heads, dim)
    a = codes("random", (2, 9, 24), 8, seed=5)
    x = module.qkv(a).double() * known_as["qkv"]  # [B, S, 3 * H * D]
    assert_within(x, qkv(qkv.real_input(a)).clamp(-127 * known_as["qkv"], 127 * known_as["qkv"]), 1.1 * known_as["qkv"])
    out = module.attend(a)
    for image in range(2):
        for head in range(heads):
            part = [x[image, :, (i * heads + head) * dim : (i * heads + head + 1) * dim] for i in range(3)]
            exact = torch.softmax(part[0] @ part[1].t() * dim**-0.5, -1) @ part[2]
            columns = slice(head * dim, (head + 1) * dim)
            back = (out[image, :, columns].double() - known_as["zero"][head]) * known_as["out"][head]
            # Half an output step, and 2^(1/64) - 1 = 1.1 % and half a level of 255 on every probability.
            bound = 0.5 * known_as["out"][head] + part[2].abs().max() * (0.011 + 9 * 0.5 / 255)
            assert_within(back, exact, bound)
            assert float((back - exact).square().mean() / exact.square().mean()) < 1e-3  # 30 dB


def test_attention_adds_its_projection_to_the_residual() -> None:
    module, _, known_as = attention_module(2, 8, seed=7)
    a, residual = codes("random", (2, 5, 24), 8, seed=6), reals("normal", (2, 5, 20), seed=7)
    proj = known_as["proj"]
    exact = residual.double() + proj(proj.real_input(module.attend(a)))
    assert_within(module(a, residual), exact, proj.step + 1e-6)


def test_mlp_is_two_linears_around_gelu() -> None:
    first, second = (KnownLinear.make(n, k, shuffled_groups(n, n), n) for n, k in ((48, 20), (20, 48)))
    a, residual = codes("random", (2, 5, 20), 8, seed=1), reals("normal", (2, 5, 20), seed=2)
    fc1 = first.integer("gelu", zero_point=second.in_zero, inv_scale=(1 / second.in_scale).float())
    mlp = QuantMlp(fc1, second.integer("residual"))
    hidden = F.gelu(first(first.real_input(a)))
    low, high = ((q - second.in_zero) * second.in_scale for q in (-128, 127))
    exact = residual.double() + second(torch.maximum(torch.minimum(hidden, high), low))
    assert_within(mlp(a, residual), exact, 0.55 * (second.weight.abs() @ second.in_scale) + second.step)
    assert_bitwise_equal(mlp(a, residual), mlp.fc2(mlp.fc1(a), residual))


@pytest.mark.parametrize("variant", ["class-token", "layer-scale", "no-qkv-bias", "tanh-gelu"])
def test_block_is_the_float_block_nearly(variant: str) -> None:
    block, float_block = variant_quantized(variant).blocks[0], variant_vit(variant).blocks[0]
    x = reals("normal", (6, 17, 32), seed=1)
    expected, got = float_block(x), block(x)
    branch = (expected - x).double().square().mean()
    assert 10 * torch.log10(branch / (got - expected).double().square().mean()) > 20  # dB, measured 25 to 30
    half = block.mlp(block.norm2(block.attn(block.norm1(x), x)), block.attn(block.norm1(x), x))
    assert_bitwise_equal(got, half)


@pytest.mark.parametrize("arguments", [{"attn_mask": torch.zeros(17, 17)}, {"is_causal": True}], ids=["mask", "causal"])
def test_block_refuses_a_mask(arguments: dict) -> None:
    with pytest.raises(ValueError, match="QuantBlock: attn_mask and is_causal must be absent"):
        variant_quantized("class-token").blocks[0](torch.zeros(1, 17, 32), **arguments)


def test_a_norm_behind_other_outputs_is_refused() -> None:
    block = variant_quantized("class-token").blocks[0]
    with pytest.raises(ValueError, match=r"^QuantLinear: next_norm needs the epilogue 'residual', got 'codes'$"):
        block.attn.qkv(torch.zeros(1, 3, 32, dtype=torch.int8), next_norm=block.norm2)


# --- patches ------------------------------------------------------------------------------------------------------

IMAGES = {
    "square": ((2, 3, 16, 16), (8, 8)),
    "rectangles": ((2, 1, 12, 20), (4, 2)),
    "rest-dropped": ((1, 3, 19, 29), (8, 8)),
    "one-patch": ((1, 2, 5, 7), (5, 7)),
}


@pytest.mark.parametrize("case", IMAGES)
def test_patches_are_unfolds(case: str) -> None:
    shape, patch = IMAGES[case]
    image = reals("normal", shape, seed=1)
    expected = F.unfold(image, patch, stride=patch).transpose(1, 2)
    found = flatten_patches(image, patch)
    assert found.shape[1:3] == (shape[2] // patch[0], shape[3] // patch[1])
    assert_bitwise_equal(found.flatten(1, 2), expected)
    assert_bitwise_equal(
        flatten_patches(image.contiguous(memory_format=torch.channels_last), patch).flatten(1, 2), expected
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("case", IMAGES)
def test_patch_embedding_is_a_convolution(case: str, dtype: torch.dtype) -> None:
    shape, patch = IMAGES[case]
    k = shape[1] * patch[0] * patch[1]
    linear = KnownLinear.make(12, k, RowGroups.uniform(12, 8), seed=k)
    quantize_input = QuantizeInput((1 / linear.in_scale).float(), linear.in_zero, 8)
    embed = QuantPatchEmbed(linear.integer("real", quantize_input=quantize_input), patch)
    image = (reals("normal", shape, seed=2) * 0.3).to(dtype)
    # The image as its codes stand for it: every channel and place of a patch has its own scale.
    scale, zero = ((t.view(1, -1, 1)) for t in (linear.in_scale, linear.in_zero))
    unfolded = F.unfold(image.double(), patch, stride=patch)
    quantized = ((unfolded / scale + zero).round().clamp(-128, 127) - zero) * scale
    height, width = shape[2] // patch[0] * patch[0], shape[3] // patch[1] * patch[1]
    image = F.fold(quantized, (height, width), patch, stride=patch)
    exact = F.conv2d(image, linear.weight.view(12, shape[1], *patch), linear.bias, stride=patch)
    # A value on a tie may take either code.
    found = embed((reals("normal", shape, seed=2) * 0.3).to(dtype))
    assert found.shape == exact.shape
    assert found.dtype == dtype
    tie = (linear.weight.abs() * linear.in_scale).max(1).values[:, None, None]
    assert_within(found, exact, linear.step[:, None, None] + tie * 1.01 + torch.finfo(dtype).eps * exact.abs().max())


# --- dynamic activations ------------------------------------------------------------------------------------------


def dynamic_linear(kind: str = "mixed", bias: bool = True) -> tuple[DynamicQuantLinear, Tensor, Tensor | None]:
    groups = GROUPS[kind](40)
    w, scale = row_codes(groups, 50, 1), uniform(0.01, 0.02, (40,), 2)
    b = uniform(-1, 1, (40,), 3) if bias else None
    return DynamicQuantLinear(pack_weight(w, groups), scale, b), scale.double()[:, None] * w, b


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("kind", ["normal", "outlier", "zero_rows"])
def test_dynamic_linear_is_the_linear_of_its_rounded_tokens(kind: str, dtype: torch.dtype, bias: bool) -> None:
    module, weight, b = dynamic_linear(bias=bias)
    x = reals(kind, (2, 6, 50), dtype, seed=4)
    exact = F.linear(x.double(), weight, None if b is None else b.double())
    out = module(x)
    assert out.dtype == dtype
    half_step = x.double().abs().amax(-1, keepdim=True) / 127 * 0.5001
    assert_within(out, exact, half_step * weight.abs().sum(1) + 2 * torch.finfo(dtype).eps * (1 + exact.abs()))
    rounded = (x.double() / half_step * 0.5001).nan_to_num().round() * half_step / 0.5001
    on_codes = F.linear(rounded, weight, None if b is None else b.double())
    if dtype == torch.float32 and kind == "outlier":  # no ties: exact up to float32's rounding
        assert_reals_close(out, on_codes, on_codes.float() * (1 + 2e-6))


def test_a_token_of_zeros_gives_the_bias() -> None:
    module, _, b = dynamic_linear()
    assert_bitwise_equal(module(torch.zeros(3, 50)), b.expand(3, 40).contiguous())


# --- what the modules keep ----------------------------------------------------------------------------------------


def _dynamic() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = reals("normal", (3, 50), seed=1)
    return dynamic_linear()[0], lambda module: module(x)


def _layernorm() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = reals("normal", (3, 12), seed=1)
    return QuantLayerNorm(uniform(1, 9, (12,), 1), uniform(-1, 1, (12,), 2), 1e-6, 6), lambda module: module(x)


def _quantize() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    x = reals("normal", (3, 12), seed=1)
    return QuantizeInput(uniform(9, 30, (12,), 1), integers(-9, 9, (12,), 2), 8), lambda module: module(x)


def _attention() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    a, residual = codes("random", (2, 5, 24), 8, seed=6), reals("normal", (2, 5, 20), seed=7)
    return attention_module(2, 8)[0], lambda module: module(a, residual)


def _linear(epilogue: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    linear, a, _ = known(40, 50, (2, 7), "mixed")
    zero, ones = integers(-9, 9, (40,), 1), torch.full((40,), 30.0)
    arguments = {"codes": {"zero_point": zero}, "gelu": {"zero_point": zero, "inv_scale": ones}}.get(epilogue, {})
    out_scale = torch.full((40,), 0.03).double() if epilogue == "codes" else None
    rest = (reals("normal", (2, 7, 40), seed=2),) if epilogue == "residual" else ()
    return linear.integer(epilogue, out_scale, **arguments), lambda module: module(a, *rest)


MODULES = {
    "linear-codes": lambda: _linear("codes"),
    "linear-gelu": lambda: _linear("gelu"),
    "linear-real": lambda: _linear("real"),
    "linear-residual": lambda: _linear("residual"),
    "dynamic-linear": _dynamic,
    "layernorm": _layernorm,
    "quantize-input": _quantize,
    "attention": _attention,
}
each_module = pytest.mark.parametrize("kind", MODULES)
CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "and-back": lambda m: m.half().float(),
    "to-device-and-dtype": lambda m: m.to("cpu", torch.float16),
}


def same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)


@pytest.mark.parametrize("cast", CASTS)
@each_module
def test_casts_leave_the_constants_alone(kind: str, cast: str) -> None:
    module, run = MODULES[kind]()
    expected, state = run(module), {name: t.clone() for name, t in module.state_dict().items()}
    module = CASTS[cast](module)
    same_state(module, state)
    assert_bitwise_equal(run(module), expected)


@each_module
def test_a_deep_copy_is_equal_and_independent(kind: str) -> None:
    module, run = MODULES[kind]()
    expected = run(module)
    twin = copy.deepcopy(module)
    assert_bitwise_equal(run(twin), expected)
    state = {name: t.clone() for name, t in twin.state_dict().items()}
    for buffer in module.buffers():
        buffer.fill_(1)
    for part in module.modules():
        for tensor in [t for ts in getattr(part, "_prepared", {}).values() for t in ts]:
            tensor.fill_(1)
    same_state(twin, state)
    assert_bitwise_equal(run(twin), expected)


@each_module
def test_state_comes_back_strictly(kind: str) -> None:
    module, run = MODULES[kind]()
    expected = run(module)
    other, _ = MODULES[kind]()
    for buffer in other.buffers():
        if buffer.dtype != torch.uint8 or buffer.dim() > 1:  # packed bytes and orders must stay ones
            buffer.zero_()
    other.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, strict=True)
    assert_bitwise_equal(run(other), expected)


@each_module
def test_reference_and_cpu_backends_agree_bitwise(kind: str) -> None:
    module, run = MODULES[kind]()
    default = run(module)
    for name in ("reference", "cpu"):
        with ops.use_backend(name):
            assert_bitwise_equal(run(module), default)
            assert_bitwise_equal(run(MODULES[kind]()[0]), default)  # made under that backend too


def test_loading_replaces_weight_and_order() -> None:
    groups = [shuffled_groups(40, 0), shuffled_groups(40, 0)]
    groups[1] = RowGroups(40, groups[0].bits, 16, tuple(shuffled_groups(40, 3).order))
    assert groups[0].order != groups[1].order
    modules = [KnownLinear.make(40, 50, g, seed).integer("real") for seed, g in enumerate(groups)]
    a = codes("random", (3, 50), 8, seed=1)
    assert modules[0](a).ne(modules[1](a)).any()
    modules[0].load_state_dict(modules[1].state_dict())
    assert modules[0].groups == groups[1]
    assert_bitwise_equal(modules[0](a), modules[1](a))
    assert_bitwise_equal(modules[0].weight_codes(), modules[1].weight_codes())


def test_loading_an_order_that_is_none_is_refused() -> None:
    module = KnownLinear.make(40, 50, shuffled_groups(40), 0).integer("real")
    state = module.state_dict()
    state["row_order"] = torch.zeros_like(state["row_order"])
    with pytest.raises(ValueError, match="row_order must permute the rows inside each tile"):
        module.load_state_dict(state)


def test_loading_other_widths_is_refused() -> None:
    module, other = (KnownLinear.make(24, 32, RowGroups.uniform(24, b), 0).integer("real") for b in (3, 4))
    with pytest.raises(RuntimeError, match="size mismatch for weight_packed"):
        module.load_state_dict(other.state_dict())


@pytest.mark.parametrize("kind", GROUPS)
def test_a_linear_knows_its_weight_and_its_size(kind: str) -> None:
    linear, _, _ = known(300, 33, (3,), kind)
    module = linear.integer("real")
    assert_bitwise_equal(module.weight_codes(), linear.codes)
    assert module.weight_bytes == linear.groups.weight_bytes(33) + linear.groups.order_bytes
    assert (module.in_features, module.out_features) == (33, 300)
    assert f"33, 300, weight_bits={linear.groups.mean_bits:.4g}" in repr(module)
