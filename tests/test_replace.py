"""replace_linears on module trees of all kinds: integer linears where they can be, the rest as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tests.numerics import assert_bitwise_equal, reals, uniform
from tests.small_vits import small_vit, variant_images
from vitq_kernels.nn import DynamicQuantLinear
from vitq_kernels.ops import use_backend
from vitq_kernels.replace import replace_linears


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def filled(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model in eval mode with weights that do not depend on torch's generator."""
    for index, parameter in enumerate(model.parameters()):
        size = 1.7 / (parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 5)
        parameter.copy_(uniform(-size, size, parameter.shape, seed * 100 + index))
    return model.eval()


def mlp() -> nn.Module:
    return filled(
        nn.Sequential(nn.Linear(20, 40), nn.GELU(), nn.Linear(40, 33, bias=False), nn.Tanh(), nn.Linear(33, 7))
    )


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).double().norm() / exact.double().norm())


def integer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DynamicQuantLinear)]


def test_every_linear_of_a_tree_is_replaced_in_place() -> None:
    model, x = mlp(), reals("normal", (3, 5, 20), seed=1)
    expected, activation = model(x), model[1]
    assert replace_linears(model) is model
    assert integer_names(model) == ["0", "2", "4"]
    assert model[1] is activation
    assert not any(module.training for module in model.modules())
    assert 0 < relative_error(model(x), expected) < 0.02
    assert (model[2].bias is None, model[4].bias is None) == (True, False)
    assert "20, 40, weight_bits=8" in repr(model)


def test_a_replaced_linear_is_its_rounded_weight_times_rounded_tokens() -> None:
    linear = filled(nn.Linear(50, 30))
    x = reals("outlier", (6, 50), seed=2)
    replaced = replace_linears(copy.deepcopy(linear), weight_bits=5)
    scale = replaced.multiplier.double()
    codes = replaced.weight_codes().double()
    assert (
        (codes * scale[:, None] - linear.weight.double()).abs().amax(1) <= 0.5 * scale + linear.weight.abs().amax(1) / 2
    ).all()
    token = x.double().abs().amax(1, keepdim=True) / 127
    exact = (x.double() / token).round() * token @ (codes * scale[:, None]).t() + linear.bias
    torch.testing.assert_close(replaced(x).double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_error_falls_with_every_bit() -> None:
    x = reals("normal", (64, 20), seed=3)
    errors = []
    for bits in range(2, 9):
        model = mlp()
        expected = model(x)
        errors.append(relative_error(replace_linears(model, weight_bits=bits)(x), expected))
        assert {m.groups.mean_bits for m in model.modules() if isinstance(m, DynamicQuantLinear)} == {bits}
    assert errors == sorted(errors, reverse=True), errors
    assert errors[0] > 10 * errors[-1]


def test_size_is_the_packed_size() -> None:
    model = replace_linears(mlp(), weight_bits=3)
    sizes = [m.weight_bytes for m in model.modules() if isinstance(m, DynamicQuantLinear)]
    assert sizes == [20 * 40 * 3 // 8, 40 * 33 * 3 // 8, -(-33 * 7 * 3 // 8)]


def test_a_bare_linear_is_returned_replaced() -> None:
    linear, x = filled(nn.Linear(9, 4)), reals("normal", (2, 9), seed=1)
    replaced = replace_linears(linear)
    assert isinstance(replaced, DynamicQuantLinear)
    assert type(linear) is nn.Linear  # itself untouched
    assert relative_error(replaced(x), linear(x)) < 0.02


def test_a_vector_is_a_token() -> None:
    linear, x = filled(nn.Linear(9, 4)), reals("normal", (9,), seed=1)
    assert replace_linears(linear)(x).shape == (4,)


# --- trees of torch and others ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence-first", "batch-first"])
def test_transformer_encoder_layers_run(batch_first: bool, norm_first: bool, activation: str) -> None:
    """In eval mode torch has a fused path that reads the weights of the linears itself."""
    model = filled(
        nn.TransformerEncoderLayer(32, 4, 64, activation=activation, batch_first=batch_first, norm_first=norm_first)
    )
    x = reals("normal", (3, 5, 32), seed=1)
    expected = model(x)
    replace_linears(model)
    assert integer_names(model) == ["linear1", "linear2"]
    assert type(model.self_attn.out_proj) is NonDynamicallyQuantizableLinear  # the attention reads its weight
    assert 0 < relative_error(model(x), expected) < 0.03
    for mode in (True, False):
        model.train(mode)
        assert model(x).shape == x.shape


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the float model
def test_a_transformer_encoder_with_padding_runs() -> None:
    model = filled(nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2))
    x, padding = reals("normal", (2, 5, 32), seed=1), torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = model(x, src_key_padding_mask=padding)[~padding]
    replace_linears(model)
    found = model(x, src_key_padding_mask=padding)
    assert found.shape == x.shape  # the fused path would have cut the padding
    assert 0 < relative_error(found[~padding], expected) < 0.03


def test_a_whole_transformer_runs() -> None:
    model = filled(nn.Transformer(32, 4, 1, 1, 64, batch_first=True))
    source, target = reals("normal", (2, 5, 32), seed=1), reals("normal", (2, 3, 32), seed=2)
    expected = model(source, target)
    assert relative_error(replace_linears(model)(source, target), expected) < 0.03
    assert len(integer_names(model)) == 4


def test_a_vision_transformer_runs_without_calibration() -> None:
    model, images = small_vit(), variant_images()
    expected = model(images)
    replace_linears(model)
    assert len(integer_names(model)) == 9
    assert relative_error(model(images), expected) < 0.05


def test_a_swin_transformer_runs() -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=5,
    )
    model, images = filled(model), variant_images(count=2)
    expected = model(images)
    assert relative_error(replace_linears(model)(images), expected) < 0.1
    assert not any(type(m) is nn.Linear for m in model.modules())


class Twice(nn.Module):
    """One linear under two names, and one module of linears under two more."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.block = nn.Sequential(nn.Linear(8, 8))
        self.blocks = nn.ModuleList([self.block, self.block])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.blocks[0](self.again(self.first(x))))


def test_shared_modules_stay_shared() -> None:
    model, x = filled(Twice()), reals("normal", (3, 8), seed=1)
    expected = model(x)
    replace_linears(model)
    assert isinstance(model.first, DynamicQuantLinear)
    assert model.first is model.again
    assert model.block is model.blocks[0] is model.blocks[1]
    assert isinstance(model.block[0], DynamicQuantLinear)
    assert not any(type(m) is nn.Linear for m in model.modules())
    assert relative_error(model(x), expected) < 0.05


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_subclasses_are_left_alone() -> None:
    model = nn.Sequential(Scaled(4, 4), nn.Linear(4, 4))
    scaled = model[0]
    replace_linears(model)
    assert model[0] is scaled
    assert integer_names(model) == ["1"]


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        (["head"], ["head"]),
        (["*.fc?"], ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        (("head", "blocks.1.*"), [*(f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")), "head"]),
        (["nothing"], []),
        ([], []),
    ],
    ids=["name", "pattern", "several", "no-match", "none"],
)
def test_excluded_linears_are_left_alone(exclude: list[str], kept: list[str]) -> None:
    model = small_vit()
    replace_linears(model, exclude=exclude)
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == kept
    assert len(integer_names(model)) == 9 - len(kept)


# --- numbers and forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("cast_first", [True, False], ids=["cast-then-replace", "replace-then-cast"])
def test_half_precision_in_half_precision_out(dtype: torch.dtype, cast_first: bool) -> None:
    x = reals("normal", (6, 20), dtype, seed=1)
    exact = mlp()(x.float())
    model = replace_linears(mlp().to(dtype)) if cast_first else replace_linears(mlp()).to(dtype)
    assert model[0].multiplier.dtype == torch.float32
    out = model(x)
    assert out.dtype == dtype
    assert relative_error(out.float(), exact) < 0.03


def test_backends_agree() -> None:
    model, x = replace_linears(mlp(), weight_bits=4), reals("outlier", (4, 20), seed=1)
    expected = model(x)
    with use_backend("reference"):
        assert_bitwise_equal(model(x), expected)


def test_state_comes_back() -> None:
    x = reals("normal", (4, 20), seed=1)
    first, second = replace_linears(mlp(), weight_bits=4), replace_linears(filled(mlp(), 7), weight_bits=4)
    assert (first(x) != second(x)).any()
    second.load_state_dict(first.state_dict())
    assert_bitwise_equal(second(x), first(x))


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Identity(), nn.Sequential(Scaled(2, 2))],
    ids=["convolution", "identity", "subclass"],
)
def test_a_model_without_linears_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"must contain an nn\.Linear that is not excluded, got none in"):
        replace_linears(model)


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="not excluded, got none in Sequential"):
        replace_linears(mlp(), exclude=["*"])


@pytest.mark.parametrize("bits", [1, 9, 4.0, "8", True], ids=repr)
def test_other_widths_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=r"weight_bits must be an integer in 2\.\.8, got"):
        replace_linears(mlp(), weight_bits=bits)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named_and_nothing_is_replaced(part: str, value: float) -> None:
    model = mlp()
    getattr(model[4], part).view(-1)[3] = value
    with pytest.raises(ValueError, match=rf"weights must be finite, got NaN or Inf in 4\.{part}"):
        replace_linears(model)
    assert integer_names(model) == []
