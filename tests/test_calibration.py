"""Calibration: what it sees is what a direct look sees, and the model comes back untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal
from tests.small_vits import VARIANTS, variant_images, variant_vit
from vitq_kernels import calibration
from vitq_kernels.calibration import CalibrationStats, Calibrator, calibrate, image_batches, input_covariances
from vitq_kernels.models import model_sites
from vitq_kernels.observers import tau_errors

SOME = ("class-token", "average-pool", "distilled", "no-qkv-bias", "dynamic-pad", "layer-scale")


def tensors_of(stats: CalibrationStats) -> dict[str, Tensor]:
    """Every tensor of the statistics by a name that says where it is."""
    found = {}
    for group in ("inputs", "qkv"):
        for name, ranges in getattr(stats, group).items():
            found |= {f"{group} {name} {f.name}": getattr(ranges, f.name) for f in fields(ranges)}
    for group in ("output_mean", "tau_error"):
        found |= {f"{group} {name}": tensor for name, tensor in getattr(stats, group).items()}
    return found


def seen_by_hooks(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Input and output [tokens, channels] of every site with a weight, through hooks of the test's own."""
    inputs, outputs, handles = {}, {}, []
    for site in model_sites(model):
        if site.has_weight:

            def hook(module: nn.Module, args: tuple[Tensor], out: Tensor, name: str = site.name) -> None:
                x, y = (t.movedim(1, -1) if isinstance(module, nn.Conv2d) else t for t in (args[0], out))
                inputs[name], outputs[name] = x.flatten(0, -2), y.flatten(0, -2)

            handles.append(model.get_submodule(site.name).register_forward_hook(hook))
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return inputs, outputs


@pytest.mark.parametrize("variant", SOME)
def test_ranges_and_means_are_those_of_a_direct_look(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 6)
    stats = calibrate(model, images)
    inputs, outputs = seen_by_hooks(model, images)
    assert stats.images == 6
    assert list(stats.inputs) == list(stats.output_mean) == list(inputs)  # forward order
    for name, x in inputs.items():
        assert_bitwise_equal(stats.inputs[name].low[-1], x.amin(0))
        assert_bitwise_equal(stats.inputs[name].high[-1], x.amax(0))
        torch.testing.assert_close(
            stats.output_mean[name], outputs[name].double().mean(0).float(), rtol=1e-6, atol=1e-7
        )
    assert list(stats.qkv) == [name for name in inputs if name.endswith("qkv")]
    for name, ranges in stats.qkv.items():
        assert_bitwise_equal(ranges.high[-1], outputs[name].amax(0))
        av = name.replace("qkv", "av")
        whole = outputs[name].unflatten(0, (6, -1))
        heads = whole.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        torch.testing.assert_close(stats.tau_error[av], tau_errors(*heads, 16**-0.5), rtol=1e-5, atol=0)


def test_patch_embedding_ranges_are_of_the_images_channels() -> None:
    images = variant_images(count=4) * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    stats = calibrate(variant_vit("class-token"), images)
    ranges = stats.inputs["patch_embed.proj"]
    assert ranges.low.shape == (3, 3)
    assert_bitwise_equal(ranges.low[-1], images.amin((0, 2, 3)))
    assert_bitwise_equal(ranges.high[-1], images.amax((0, 2, 3)))


def test_tau_looks_at_the_first_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = variant_vit("class-token"), variant_images(count=7)
    monkeypatch.setattr(calibration, "ATTENTION_IMAGES", 3)
    few = calibrate(model, images, batch_size=2)  # the third image is half of a batch
    monkeypatch.undo()
    first = calibrate(model, images[:3])
    for name, error in first.tau_error.items():
        torch.testing.assert_close(few.tau_error[name], error, rtol=1e-4, atol=0)


# --- the model comes back untouched -------------------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple:
    """All that calibration might change: bytes of the state, training flags, hooks, gradients."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), sorted(vars(m)))
        for m in model.modules()
    ]
    weights = {name: t.view(torch.uint8).tolist() for name, t in model.state_dict().items()}
    grads = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return hooks, [m.training for m in model.modules()], weights, grads


@pytest.fixture
def model() -> nn.Module:
    return variant_vit("distilled")


def test_the_model_is_left_as_it_was(model: nn.Module) -> None:
    images = variant_images(count=2)
    with torch.no_grad():
        before, logits = state_of(model), model(images)
        calibrate(model, images)
        input_covariances(model, images)
        assert state_of(model) == before
        assert_bitwise_equal(model(images), logits)


def test_outputs_are_bit_identical_while_it_watches(model: nn.Module) -> None:
    images = variant_images(count=2)
    with torch.no_grad():
        logits = model(images)
        with Calibrator(model):
            assert_bitwise_equal(model(images), logits)


class Stop(Exception):
    pass


def stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize("run", [calibrate, input_covariances], ids=lambda f: f.__name__)
def test_hooks_go_when_the_forward_raises(run: Callable, model: nn.Module) -> None:
    handle = model.blocks[1].mlp.fc1.register_forward_pre_hook(stop)
    before = state_of(model)
    with pytest.raises(Stop):
        run(model, variant_images(count=2))
    assert state_of(model) == before
    handle.remove()


def test_hooks_go_when_the_body_raises(model: nn.Module) -> None:
    before = state_of(model)
    with Calibrator(model):
        assert state_of(model) != before  # it does watch
    with pytest.raises(Stop), Calibrator(model):
        stop()
    assert state_of(model) == before


def test_hooks_go_when_activations_are_not_finite(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].norm1.bias[3] = float("inf")
    before = state_of(model)
    with pytest.raises(ValueError, match="activations must be finite, got NaN or Inf; check weights and images"):
        calibrate(model, variant_images(count=2))
    assert state_of(model) == before


# --- what the numbers depend on -----------------------------------------------------------------------------------


def test_batches_and_one_tensor_give_the_same(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLE_TOKENS", 7 * 32 * 32)  # every pixel is kept
    images = variant_images(count=7)
    whole = tensors_of(calibrate(model, images, batch_size=100))
    for other in (
        calibrate(model, images, batch_size=3),
        calibrate(model, [images[:1], images[1:5], images[5:]]),
        calibrate(model, iter(images.split(2))),
    ):
        found = tensors_of(other)
        assert found.keys() == whole.keys()
        for name, tensor in found.items():  # the float model itself rounds differently in other batches
            torch.testing.assert_close(tensor, whole[name], rtol=2e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_sample_is_a_function_of_the_seed(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "SAMPLE_TOKENS", 12)  # two tokens of an image
    images = variant_images(count=6)
    first, again, other = (tensors_of(calibrate(model, images, seed=seed)) for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert_bitwise_equal(tensor, again[name])
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    for name in first:  # but extremes and means are of all tokens
        if name.startswith("output_mean"):
            assert_bitwise_equal(first[name], other[name])


def test_the_callers_random_state_is_untouched(model: nn.Module) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    calibrate(model, variant_images(count=2))
    assert_bitwise_equal(torch.rand(3), expected)


def test_progress_counts_images(model: nn.Module) -> None:
    calls = []
    calibrate(model, variant_images(count=5), batch_size=2, progress=lambda *done: calls.append(done))
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_calibrator_by_hand_is_calibrate(model: nn.Module) -> None:
    images = variant_images(count=4)
    with torch.no_grad(), Calibrator(model, expected_images=4) as calibrator:
        model(images[:2])
        model(images[2:])
    found, expected = tensors_of(calibrator.stats()), tensors_of(calibrate(model, images, batch_size=2))
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)


@pytest.mark.parametrize("variant", SOME)
def test_input_covariances_are_the_direct_ones(variant: str) -> None:
    model, images = variant_vit(variant), variant_images(variant, 5)
    found = input_covariances(model, images, batch_size=2)
    inputs, _ = seen_by_hooks(model, images)
    linears = [name for name in inputs if name.startswith("blocks")]
    assert list(found) == linears
    for name in linears:
        expected = torch.cov(inputs[name].double().t(), correction=0)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().max()))


# --- files --------------------------------------------------------------------------------------------------------


def test_statistics_come_back_from_a_file(model: nn.Module, tmp_path: Path) -> None:
    stats = calibrate(model, variant_images(count=3))
    stats.save(tmp_path / "stats.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert loaded.images == 3
    expected, found = tensors_of(stats), tensors_of(loaded)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)


def test_a_failed_save_leaves_the_old_file(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "stats.safetensors"
    stats = calibrate(model, variant_images(count=1))
    stats.save(path)
    good = path.read_bytes()

    def half(_: object, name: str, *__: object) -> None:
        Path(name).write_bytes(good[:100])
        raise OSError("disk full")

    monkeypatch.setattr(calibration, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        stats.save(path)
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_print_their_sites_and_ranges(model: nn.Module) -> None:
    text = str(calibrate(model, variant_images(count=3)))
    assert text.startswith("calibrated on 3 images")
    for name in ("patch_embed.proj", "blocks.1.mlp.fc2", "head_dist"):
        assert name in text


# --- bad images ---------------------------------------------------------------------------------------------------


def spoiled(value: float) -> list[Tensor]:
    """Batches of 3 and 2 images, the fifth with one bad pixel."""
    batches = list(variant_images(count=5).clone().split(3))
    batches[1][1, 2, 31, 31] = value
    return batches


BAD_IMAGES = {
    "nan": (lambda: spoiled(float("nan")), "images must be finite, got NaN or Inf in image 4"),
    "inf": (lambda: torch.cat(spoiled(float("-inf"))), "images must be finite, got NaN or Inf in image 4"),
    "no-tensor": (lambda: torch.empty(0, 3, 32, 32), "images must hold at least one image, got 0"),
    "no-batches": (list, "images must hold at least one image, got 0"),
    "empty-batches": (lambda: [torch.empty(0, 3, 32, 32)] * 2, "images must hold at least one image, got 0"),
    "one-image": (
        lambda: torch.zeros(3, 32, 32),
        r"images must be float \[n, C, H, W\], got torch.float32 \[3, 32, 32\]",
    ),
    "integers": (lambda: torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"images must be float .* got torch.uint8"),
}


@pytest.mark.parametrize("run", [calibrate, input_covariances], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_named(case: str, run: Callable, model: nn.Module) -> None:
    make, message = BAD_IMAGES[case]
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        run(model, make())
    assert state_of(model) == before


def test_statistics_of_nothing_are_refused(model: nn.Module) -> None:
    with Calibrator(model) as calibrator:
        pass
    with pytest.raises(ValueError, match="at least one image must be seen, got 0"):
        calibrator.stats()


def test_batches_come_in_the_given_size() -> None:
    assert [len(b) for b in image_batches(variant_images(count=7), 3)] == [3, 3, 1]
    assert [len(b) for b in image_batches(iter(variant_images(count=7).split(5)), 3)] == [5, 2]  # as they come


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_calibrates(variant: str) -> None:
    model = variant_vit(variant)
    stats = calibrate(model, variant_images(variant, 2))
    assert set(stats.inputs) == {site.name for site in model_sites(model) if site.has_weight}
    assert all(bool(t.isfinite().all()) for name, t in tensors_of(stats).items() if not name.startswith("tau_error"))
