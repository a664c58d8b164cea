"""Published methods in float simulation: reparameterization, every preset at several widths, files of what came out."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_vits import mixed_allocation, small_vit, sqnr_db, variant_images, variant_vit
from torch import Tensor, nn

from tests.numerics import uniform
from vitq_kernels.models import UnsupportedModelError, model_sites
from vitq_kernels.presets import PRESETS, Simulation, file, lrp_qvit, published_widths, simulate
from vitq_kernels.presets.capture import fit_in_forward_order, inputs_of
from vitq_kernels.presets.norm import NormWithInput
from vitq_kernels.presets.quantizers import FakeQuantizer, Uniform
from vitq_kernels.presets.ranges import percentile_affine
from vitq_kernels.presets.reparameterization import fold_channel_scales
from vitq_kernels.presets.weights import asymmetric_rows
from vitq_kernels.simulation import SimulatedLinear, simulated
from vitq_kernels.tensor_file import CheckpointError, content_hash

METHODS = ("repq-vit", "lrp-qvit", "mix-qvit", "is-vit", "dopq-vit")
OWN_CODE = ("repq-vit", "lrp-qvit", "is-vit", "dopq-vit")  # mix-qvit runs lrp-qvit's
FLOAT_PIXELS = ("is-vit",)


@functools.cache
def quantized(method: str, weight_bits: int, activation_bits: int, variant: str = "class-token") -> nn.Module:
    """Shared between tests: copy before changing."""
    return simulate(variant_vit(variant), variant_images(variant), method, weight_bits, activation_bits)


def exact_logits(variant: str = "class-token") -> Tensor:
    with torch.inference_mode():
        return variant_vit(variant)(variant_images(variant, seed=6))


@torch.inference_mode()
def logits(model: nn.Module, variant: str = "class-token") -> Tensor:
    return model(variant_images(variant, seed=6))


# Reparameterization.


def norm_and_linear(bias: bool) -> tuple[nn.LayerNorm, SimulatedLinear, Tensor]:
    """A LayerNorm with outlier, negative and dead channels, the linear that reads it, and activations before them."""
    norm, linear = nn.LayerNorm(24), nn.Linear(24, 11, bias=bias)
    with torch.no_grad():
        norm.weight.copy_(uniform(-2, 2, (24,), 1))
        norm.bias.copy_(uniform(-1, 1, (24,), 2))
        norm.weight[3], norm.weight[4], norm.weight[5] = 30.0, 0.0, 0.0
        norm.bias[5] = 0.0
        linear.weight.copy_(uniform(-1, 1, (11, 24), 3))
    return norm.requires_grad_(False), SimulatedLinear(linear), uniform(-3, 3, (50, 7, 24), 4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("bits", [3, 8])
def test_the_fold_leaves_the_float_function(bits: int, bias: bool) -> None:
    norm, linear, x = norm_and_linear(bias)
    norm, linear, x = norm.double(), linear.double(), x.double()
    before = linear(norm(x))
    scale, zero = percentile_affine(norm(x).flatten(0, 1).mT.contiguous(), bits)
    fold_channel_scales(norm, linear, Uniform(scale, zero, 0, 2**bits - 1), scale.mean(), zero.mean())
    assert isinstance(linear.input, Uniform)
    linear.input = nn.Identity()
    torch.testing.assert_close(linear(norm(x)), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_per_channel_are_codes_per_tensor_after_the_fold(bits: int) -> None:
    """methods.md 8.1: with a whole target zero point the codes are the same, whatever the target scale."""
    for target in (0.01, 1.7):
        norm, linear, x = norm_and_linear(True)
        norm, linear, x = norm.double(), linear.double(), x.double()
        activations = norm(x)
        scale, zero = percentile_affine(activations.flatten(0, 1).mT.contiguous(), bits)
        channels = Uniform(scale, zero, 0, 2**bits - 1)
        before = (channels(activations) / scale + zero).round()
        fold_channel_scales(norm, linear, channels, torch.tensor(target), zero.mean().round())
        after = linear.input(norm(x)) / linear.input.scale + linear.input.zero_point
        ties = (((activations / scale) % 1) - 0.5).abs() < 1e-9
        assert torch.equal(before[~ties], after.round()[~ties])
        assert float(ties.double().mean()) < 0.01


def test_the_published_target_is_the_mean_not_rounded() -> None:
    zeros = [quantized("repq-vit", 4, 4).get_submodule(f"blocks.{i}.attn.qkv.input").zero_point for i in (0, 1)]
    assert any(float(zero) != round(float(zero)) for zero in zeros)
    assert all(zero.shape == () for zero in zeros)


def test_the_median_target_is_whole() -> None:
    for name, module in quantized("dopq-vit", 4, 4).named_modules():
        if isinstance(module, Uniform):
            assert float(module.zero_point) == round(float(module.zero_point)), name


def test_weights_after_norms_are_rounded_after_the_fold() -> None:
    """Folded columns lie on the grid of the folded weight, 2^b values a row."""
    model = quantized("repq-vit", 3, 8)
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "blocks.0.mlp.fc2", "patch_embed.proj", "head"):
        for row in model.get_submodule(name).weight.flatten(1):
            assert len(row.unique()) <= 8, name


@pytest.mark.parametrize("place", ["attn.qkv", "mlp.fc1"])
def test_the_folded_float_weight_is_rounded_once(place: str) -> None:
    """Not the weight that was rounded for calibration: r is read off the norm, before and after."""
    model, norm = variant_vit("class-token"), {"attn.qkv": "norm1", "mlp.fc1": "norm2"}[place]
    gain = model.blocks[0].get_submodule(norm).weight.data
    gain[gain == 0] = 0.7
    result = simulate(model, variant_images(), "repq-vit", 3, 4)
    ratio = gain / result.blocks[0].get_submodule(norm).weight
    exact, actual = (net.blocks[0].get_submodule(place).weight for net in (model, result))
    expected = asymmetric_rows(exact.detach() * ratio, torch.full((len(exact),), 3))
    same = (actual - expected).abs() < 1e-4 * expected.abs().amax(1, keepdim=True)
    assert float(same.float().mean()) > 0.99  # float32 may decide a tie the other way


# Clipped channels of LRP-QViT.


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("cap", [8.0, 16.0, float("inf")])
def test_clipped_channels_are_capped_and_drawn_together(cap: float, exponent: float) -> None:
    low, high = -torch.tensor([1.0, 1.1, 0.9, 4.0, 50.0]), torch.tensor([1.0, 0.8, 1.2, 6.0, 70.0])
    quantizer = lrp_qvit.clipped_channels(low, high, 4, lrp_qvit.Clipping(1.0, cap, exponent))
    span = ((high - low) / 15).minimum((high - low).median() / 15 * cap)
    assert bool((quantizer.scale >= span * (1 - 1e-5)).all()), "every capped channel is covered"
    ratio = quantizer.scale / quantizer.scale[0]
    torch.testing.assert_close(ratio, (span / span[0]) ** exponent)
    middle = (7.5 - quantizer.zero_point) * quantizer.scale
    assert bool(((middle - (low + high) / 2).abs() <= quantizer.scale * 0.5001).all()), "codes are centred"


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_best_clipping_is_no_worse_than_any(bits: int) -> None:
    x, weight = uniform(-1, 1, (900, 16), 1) ** 3, uniform(-1, 1, (12, 16), 2)
    x[:, 2] *= 40
    rows = torch.full((12,), bits)
    chosen = lrp_qvit.best_clipping(x, weight, rows, bits)
    error = lrp_qvit.output_error(x, weight, rows, chosen)
    for clipping in lrp_qvit.CLIPPINGS:
        span = (x.quantile(1 - clipping.percentile, 0), x.quantile(clipping.percentile, 0))
        other = lrp_qvit.clipped_channels(*span, bits, clipping)
        assert error <= lrp_qvit.output_error(x, weight, rows, other) * (1 + 1e-3)


def test_output_error_is_that_of_the_folded_layer() -> None:
    norm, linear, x = norm_and_linear(True)
    activations = norm(x).flatten(0, 1)
    scale, zero = percentile_affine(activations.mT.contiguous(), 4)
    quantizer, rows = Uniform(scale, zero, 0, 15), torch.full((11,), 5)
    before, weight = linear(activations), linear.weight.clone()
    predicted = lrp_qvit.output_error(activations, weight, rows, quantizer)
    fold_channel_scales(norm, linear, quantizer, scale.mean(), zero.mean())
    linear.weight = lrp_qvit.asymmetric_rows(linear.weight, rows)
    assert predicted == pytest.approx(float((linear(norm(x).flatten(0, 1)) - before).square().sum()), rel=1e-2)


# Every preset.


@pytest.mark.parametrize("method", OWN_CODE)
def test_more_bits_are_better(method: str) -> None:
    exact = exact_logits()
    quality = [sqnr_db(logits(quantized(method, bits, bits)), exact) for bits in (3, 4, 6, 8)]
    assert all(b > a + 1 for a, b in itertools.pairwise(quality)), quality
    # Codes by the logarithm cannot do better with more bits: steps of sqrt(2) or 2 stay.
    assert quality[-1] > (20 if method == "dopq-vit" else 10)


@pytest.mark.parametrize("variant", ["distilled", "average-pool", "no-qkv-bias", "layer-scale", "one-channel"])
@pytest.mark.parametrize("method", OWN_CODE)
def test_every_variant_of_the_model(method: str, variant: str) -> None:
    actual = logits(quantized(method, 8, 8, variant), variant)
    assert bool(torch.isfinite(actual).all())
    assert sqnr_db(actual, exact_logits(variant)) > 10


@pytest.mark.parametrize("method", OWN_CODE)
def test_every_site_is_quantized(method: str) -> None:
    model = quantized(method, 4, 4)
    left = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Identity)
        and (name.endswith(".input") or name.rpartition(".")[2] in ("query", "key", "value", "probability"))
    ]
    assert left == (["patch_embed.proj.input"] if method in FLOAT_PIXELS else [])
    quantizers = [m for m in model.modules() if isinstance(m, FakeQuantizer)]
    sites = model.simulation.sites
    assert len(quantizers) == len([s for s in sites if s.has_weight]) + 8 - len(left)  # and q, k, v, p of two blocks
    for site in sites:
        if site.has_weight:
            rows = model.get_submodule(site.name).weight.flatten(1)
            assert all(len(row.unique()) <= 16 for row in rows)


@pytest.mark.parametrize("method", OWN_CODE)
def test_levels_are_as_stated(method: str) -> None:
    """2^b, and one more exactly where the preset's ``levels`` says so."""
    after_norm = "after LayerNorm" in PRESETS[method].levels
    for name, module in quantized(method, 4, 4).named_modules():
        if isinstance(module, FakeQuantizer):
            if name.endswith("probability"):
                expected = {"is-vit": module.levels, "dopq-vit": 16}.get(method, 17)
                assert module.levels <= 17
            elif name.endswith(("qkv.input", "fc1.input")):
                expected = 16 + (after_norm and float(module.zero_point) % 1 != 0)
            else:
                expected = 256 if name.startswith("patch_embed") else 16
            assert module.levels == expected, name


@pytest.mark.parametrize("method", OWN_CODE)
def test_calibration_repeats_itself(method: str) -> None:
    again = simulate(variant_vit("class-token"), variant_images(), method, 4, 4)
    assert torch.equal(logits(again), logits(quantized(method, 4, 4)))


@pytest.mark.parametrize("method", OWN_CODE)
def test_the_float_model_stays(method: str) -> None:
    model = variant_vit("class-token")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    simulate(model, variant_images(), method, 3, 3)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", OWN_CODE)
def test_an_allocation_gives_every_row_its_width(method: str) -> None:
    model = variant_vit("class-token")
    allocation = mixed_allocation(model, activation_bits=6)
    result = simulate(model, variant_images(), method, allocation=allocation)
    assert bool(torch.isfinite(logits(result)).all())
    for name, site in allocation.sites.items():
        if site.weight is not None:
            rows = result.get_submodule(name).weight.flatten(1)
            for row, bits in zip(rows, site.weight.row_bits(), strict=True):
                assert len(row.unique()) <= 2**bits
    widest = max(len(row.unique()) for row in result.get_submodule("blocks.0.mlp.fc1").weight)
    assert widest > 16, "some rows have more than four bits"
    assert (result.simulation.weight_bits, result.simulation.allocation) == (None, allocation)


def test_the_methods_differ() -> None:
    seen = {method: logits(quantized(method, 4, 4)) for method in METHODS}
    for first in METHODS:
        for other in METHODS:
            same = {first, other} == {"lrp-qvit", "mix-qvit"} or first == other
            assert torch.equal(seen[first], seen[other]) == same, (first, other)


@pytest.mark.parametrize("method", METHODS)
def test_the_record_says_what_was_done(method: str) -> None:
    preset, record = PRESETS[method], quantized(method, 4, 6).simulation
    assert (record.method, record.weight_bits, record.activation_bits) == (method, 4, 6)
    assert record.executes == "simulated"
    assert preset.why_simulated == record.why_simulated != ""
    assert record.completed == preset.completed != ()
    assert record.calibration_images == min(32, preset.calibration_images)
    assert record.float_bytes == 4 * sum(s.rows * s.cols for s in record.sites)
    assert Simulation.from_json(record.to_json()) == record
    for site in record.sites:
        got = record.allocation.sites[site.name]
        assert got.activation == (8 if site.kind == "patch_embed" else 6)
        assert got.weight is None or set(got.weight.bits) == {4}


def test_no_more_images_than_the_paper_takes() -> None:
    model, images = variant_vit("class-token"), variant_images(count=40)
    more = simulate(model, images, "repq-vit", 4, 4)
    assert more.simulation.calibration_images == 32
    fewer = simulate(model, images[:32], "repq-vit", 4, 4)
    assert torch.equal(logits(more), logits(fewer))
    assert not torch.equal(logits(simulate(model, images[:8], "repq-vit", 4, 4)), logits(fewer))


def test_the_batch_size_does_not_matter() -> None:
    model, images = variant_vit("class-token"), variant_images()
    small = simulate(model, images, "repq-vit", 4, 4, batch_size=5)
    assert torch.equal(logits(small), logits(quantized("repq-vit", 4, 4)))


def test_progress_ends_at_its_total() -> None:
    seen: list[tuple[int, int]] = []
    simulate(variant_vit("class-token"), variant_images(), "repq-vit", 4, 4, progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][0] == seen[-1][1]


BAD = {
    "method": (("gptq", 4, 4), {}, "method must be one of .*repq-vit.*, got 'gptq'"),
    "no-widths": (("repq-vit",), {}, "give either weight_bits and activation_bits, or an allocation"),
    "one-width": (("repq-vit", 4), {}, "activation_bits must be an integer in 2..8, got None"),
    "weight-width": (("repq-vit", 9, 4), {}, "weight_bits must be an integer in 2..8, got 9"),
    "activation-width": (("repq-vit", 4, 1), {}, "activation_bits must be an integer in 2..8, got 1"),
    "both": (("repq-vit", 4, 4), {"allocation": "of-the-model"}, "give either"),
    "other-model": (("repq-vit",), {"allocation": "of-another"}, "allocation does not fit the model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, keywords, message = BAD[case]
    model = variant_vit("class-token")
    plans = {"of-the-model": model, "of-another": variant_vit("distilled")}
    keywords = {name: published_widths(model_sites(plans[value]), 4, 4) for name, value in keywords.items()}
    with pytest.raises(ValueError, match=message):
        simulate(model, variant_images(count=2), *arguments, **keywords)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (3, 32, 32)], ids=["none", "no-batch"])
def test_images_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[n, C, H, W\] with n at least 1, got "):
        simulate(variant_vit("class-token"), torch.zeros(shape), "repq-vit", 4, 4)


@pytest.mark.parametrize("where", ["images", "weights"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_numbers_that_are_not_finite_are_refused(where: str, value: float) -> None:
    model, images = variant_vit("class-token"), variant_images(count=2)
    (images if where == "images" else model.blocks[1].mlp.fc2.weight.data).view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{where} must be finite, got NaN or Inf"):
        simulate(model, images, "repq-vit", 4, 4)


@pytest.mark.parametrize("odd", [{"act_layer": "elu"}, {"qk_norm": True}, {"act_layer": "silu"}], ids=str)
def test_a_block_that_is_not_one_of_vit_is_refused(odd: dict) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0"):
        simulate(small_vit(**odd), variant_images(count=2), "repq-vit", 4, 4)


# What goes into modules.


def test_inputs_are_those_of_a_plain_forward() -> None:
    model, images = simulated(variant_vit("class-token")), variant_images(count=7)
    names = ("blocks.0.attn.qkv", "blocks.1.attn.probability", "head")
    seen = inputs_of(model, names, list(images.split(3)))
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    torch.testing.assert_close(seen["blocks.0.attn.qkv"], model.blocks[0].norm1(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["blocks.1.attn.probability"].sum(-1), torch.ones(7, 2, 17))
    assert seen["head"].shape == (7, 32)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_quantizers_are_fitted_on_what_reaches_them_through_the_earlier_ones() -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model, images, seen = simulated(variant_vit("class-token")), variant_images(count=4), {}

    def keep(name: str) -> object:
        return lambda x: (seen.__setitem__(name, x), Half())[1]

    names = ("blocks.0.mlp.fc1.input", "blocks.0.mlp.fc2.input")
    fit_in_forward_order(model, {name: keep(name) for name in names}, [images[:3], images[3:]], lambda *_: None)
    assert all(isinstance(model.get_submodule(name), Half) for name in names)
    assert seen[names[0]].shape[0] == 4
    block = model.blocks[0]
    hidden = nn.functional.linear(seen[names[0]] / 2, block.mlp.fc1.weight, block.mlp.fc1.bias)
    torch.testing.assert_close(seen[names[1]], block.mlp.act(hidden), rtol=1e-4, atol=1e-5)


# Files.


def signature(path: Path) -> dict[str, str]:
    """Manifest and hash of a file."""
    with safe_open(str(path), framework="pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("method", OWN_CODE)
@pytest.mark.parametrize("variant", ["class-token", "no-qkv-bias"])
def test_a_file_gives_the_same_model_back(method: str, variant: str, tmp_path: Path) -> None:
    model = quantized(method, 4, 5, variant)
    file.save(model, tmp_path / "s.safetensors")
    loaded = file.load(tmp_path / "s.safetensors")
    assert torch.equal(logits(loaded, variant), logits(model, variant))
    assert loaded.simulation == model.simulation
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    file.save(loaded, tmp_path / "again.safetensors")
    first, again = (signature(tmp_path / name) for name in ("s.safetensors", "again.safetensors"))
    assert first == again


def test_a_quantizer_before_a_norm_is_kept(tmp_path: Path) -> None:
    model = copy.deepcopy(quantized("repq-vit", 6, 6))
    plain = logits(model)
    for name in ("blocks.0.norm1", "norm"):
        wrapped = NormWithInput(model.get_submodule(name))
        wrapped.input = Uniform(torch.tensor(0.25), torch.tensor(8.0), 0, 15)
        model.set_submodule(name, wrapped)
    file.save(model, tmp_path / "s.safetensors")
    loaded = logits(file.load(tmp_path / "s.safetensors"))
    assert torch.equal(loaded, logits(model))
    assert not torch.equal(loaded, plain)


def changed(path: Path, change: object, sign: bool = True) -> None:
    """Rewrites a file after ``change(tensors, manifest)``; with its hash made good unless ``sign`` is False."""
    with safe_open(str(path), framework="pt") as opened:
        metadata = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    manifest = json.loads(metadata["manifest"])
    change(tensors, manifest)
    text = json.dumps(manifest)
    save_file(tensors, path, {"manifest": text, "sha256": content_hash(tensors, text) if sign else metadata["sha256"]})


QUANTIZER = "blocks.0.attn.probability"
TAMPERED = {
    "tensor": (lambda t, m: t["head.weight"].mul_(2), False, "its sha256 does not match"),
    "manifest": (lambda t, m: m["simulation"].update(method="adalog"), False, "its sha256 does not match"),
    "format": (lambda t, m: m.update(format="vitq-kernels simulation 2"), True, "format must be .* 1', got .* 2'"),
    "unknown-quantizer": (
        lambda t, m: m["quantizers"][QUANTIZER].update({"class": "Popen"}),
        True,
        "do not fit the manifest: KeyError",
    ),
    "quantizer-argument": (
        lambda t, m: m["quantizers"][QUANTIZER]["config"].update(surprise=1),
        True,
        "do not fit the manifest: TypeError",
    ),
    "quantizer-elsewhere": (
        lambda t, m: m["quantizers"].update({"blocks.9.attn.query": {"class": "Log2", "config": {}}}),
        True,
        "do not fit",
    ),
    "quantizer-lost": (lambda t, m: m["quantizers"].pop(QUANTIZER), True, "do not fit .*Unexpected key"),
    "tensor-lost": (lambda t, m: t.pop("blocks.0.mlp.fc1.weight"), True, "do not fit .*Missing key"),
    "tensor-of-another-shape": (
        lambda t, m: t.update({"head.weight": torch.zeros(3, 3)}),
        True,
        "do not fit .*size mismatch",
    ),
    "no-simulation": (lambda t, m: m.pop("simulation"), True, "do not fit the manifest: KeyError: 'simulation'"),
    "record-incomplete": (lambda t, m: m["simulation"].pop("levels"), True, "not a simulation: TypeError"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_file_is_refused(case: str, tmp_path: Path) -> None:
    change, sign, message = TAMPERED[case]
    path = tmp_path / "s.safetensors"
    file.save(quantized("repq-vit", 4, 4), path)
    changed(path, change, sign)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        file.load(path)
    assert str(path) in str(caught.value)


def test_a_signed_rewrite_without_changes_is_accepted(tmp_path: Path) -> None:
    file.save(quantized("repq-vit", 4, 4), tmp_path / "s.safetensors")
    changed(tmp_path / "s.safetensors", lambda t, m: None)
    assert torch.equal(logits(file.load(tmp_path / "s.safetensors")), logits(quantized("repq-vit", 4, 4)))


def test_a_model_that_was_not_simulated_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model must come from vitq_kernels\.presets\.simulate, got VisionTransformer"
    ):
        file.save(variant_vit("class-token"), tmp_path / "s.safetensors")
    with pytest.raises(FileNotFoundError, match=r"s\.safetensors does not exist"):
        file.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"completed": 3}'])
def test_text_that_is_no_simulation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a simulation"):
        Simulation.from_json(text)


def test_presets_are_complete() -> None:
    for name, preset in PRESETS.items():
        assert name == preset.name
        assert all(getattr(preset, field.name) for field in fields(preset) if field.name != "completed")
        assert preset.executes == "simulated"
