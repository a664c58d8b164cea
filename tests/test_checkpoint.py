"""Checkpoints: the same logits back, nothing needed to load, bad files named, good files never lost."""

from __future__ import annotations

import copy
import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm
from torch import Tensor, nn

from tests.numerics import assert_bitwise_equal
from tests.small_vits import (
    VARIANTS,
    mixed_allocation,
    quietly,
    small_vit,
    variant_images,
    variant_quantized,
    variant_vit,
)
from vitq_kernels import calibration, checkpoint, tensor_file
from vitq_kernels.checkpoint import CheckpointError, content_hash, load, save
from vitq_kernels.convert import quantize
from vitq_kernels.models import build_model, model_config, model_sites
from vitq_kernels.nn import PackedLinear
from vitq_kernels.ops import SEMANTICS_VERSION, use_backend
from vitq_kernels.replace import replace_linears
from vitq_kernels.skeleton import quantized_skeleton
from vitq_kernels.spec import BitAllocation


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    """A model with row groups of all widths."""
    model = variant_vit("distilled")
    return quantize(model, variant_images("distilled"), mixed_allocation(model))


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A checkpoint."""
    path = tmp_path / "good.safetensors"
    save(variant_quantized("class-token"), path)
    return path


def input_bits(model: nn.Module) -> dict[str, int]:
    """What each linear layer takes its codes to have, which chooses kernels."""
    return {name: module.input_bits for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def same_model(loaded: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Same tensors, record and logits."""
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise_equal(found[name], tensor)
    assert loaded.quantization == model.quantization
    assert input_bits(loaded) == input_bits(model)
    with torch.no_grad():
        logits = model(images)
        assert_bitwise_equal(loaded(images), logits)
        with use_backend("reference"):
            assert_bitwise_equal(loaded(images), logits)


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(variant: str, tmp_path: Path) -> None:
    model = variant_quantized(variant)
    save(model, tmp_path / "m.safetensors")
    same_model(load(tmp_path / "m.safetensors"), model, variant_images(variant, 3, seed=9))


def test_row_groups_and_their_orders_come_back(mixed: nn.Module, tmp_path: Path) -> None:
    save(mixed, tmp_path / "m.safetensors")
    loaded = load(str(tmp_path / "m.safetensors"), "cpu")
    same_model(loaded, mixed, variant_images("distilled", 3, seed=9))
    for name, module in mixed.named_modules():
        if isinstance(module, PackedLinear):
            assert loaded.get_submodule(name).groups == module.groups
    assert any(m.groups.order for m in loaded.modules() if isinstance(m, PackedLinear))


@pytest.mark.parametrize("bits", [(2, 3), (4, 4), (5, 6)], ids=["w2a3", "w4a4", "w5a6"])
def test_few_bits_come_back(bits: tuple[int, int], tmp_path: Path) -> None:
    model = variant_quantized("class-token", *bits)
    save(model, tmp_path / "m.safetensors")
    same_model(load(tmp_path / "m.safetensors"), model, variant_images(count=3, seed=9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_a_half_precision_model_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    model = copy.deepcopy(variant_quantized("pre-norm")).to(dtype)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.pos_embed.dtype == dtype
    same_model(loaded, model, variant_images("pre-norm", 3).to(dtype))


ARGUMENTS = {
    "register-mean": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    "no-classifier": {"num_classes": 0},
    "odd-mlp": {"embed_dim": 224, "num_heads": 2, "depth": 1, "mlp_ratio": 61.5 / 224},
    "wide-eps": {"norm_layer": lambda dim, **kw: LayerNorm(dim, eps=0.1, **kw)},
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_odd_architectures_come_back(case: str, tmp_path: Path) -> None:
    model = quantize(small_vit(**ARGUMENTS[case]), variant_images(count=4))
    save(model, tmp_path / "m.safetensors")
    same_model(load(tmp_path / "m.safetensors"), model, variant_images(count=3, seed=9))


def test_a_loaded_model_is_ready_to_run_and_to_compile(good: Path) -> None:
    loaded = load(good)
    assert not any(m.training for m in loaded.modules())
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    images = variant_images(count=2)
    torch._dynamo.reset()
    with torch.no_grad():  # compiled before its first eager run
        compiled = torch.compile(loaded, fullgraph=True, backend="aot_eager")(images)
        torch._dynamo.reset()
        assert_bitwise_equal(compiled, variant_quantized("class-token")(images))


def test_saving_again_gives_the_same_file(mixed: nn.Module, tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save(mixed, first)
    save(load(first), second)
    assert contents(first)[1] == contents(second)[1]  # the sha256 among them
    assert first.stat().st_size == second.stat().st_size


def test_a_file_may_be_replaced_by_what_was_loaded_from_it(good: Path) -> None:
    before = contents(good)[1]
    loaded = load(good)
    save(loaded, good)
    assert contents(good)[1] == before
    same_model(loaded, variant_quantized("class-token"), variant_images(count=1))  # its tensors did not lie in the file


def test_data_settings_of_timm_come_along(tmp_path: Path) -> None:
    model = copy.deepcopy(variant_quantized("class-token"))
    kept = {"architecture": "vit_x", "mean": (0.5, 0.4, 0.3), "crop_pct": 0.9, "input_size": (3, 32, 32)}
    model.pretrained_cfg = {"url": "https://a/b", **kept}
    save(model, tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").pretrained_cfg == json.loads(json.dumps(kept))


def test_loading_needs_neither_calibration_nor_weights_nor_network(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("not for loading")

    for owner, name in (
        (calibration.Calibrator, "__init__"),
        (timm, "create_model"),
        (socket.socket, "connect"),
        (torch, "load"),
        (torch.hub, "load_state_dict_from_url"),
        (nn.init, "trunc_normal_"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
    ):
        monkeypatch.setattr(owner, name, forbidden)
    loaded = load(good)
    monkeypatch.undo()
    same_model(loaded, variant_quantized("class-token"), variant_images(count=2))


# --- size ---------------------------------------------------------------------------------------------------------


def test_the_file_is_its_tensors_and_a_header(mixed: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(mixed, path)
    tensors = load_file(path)
    data = sum(t.numel() * t.element_size() for t in tensors.values())
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == 8 + header + data
    packed = sum(t.numel() for name, t in tensors.items() if name.endswith(("weight_packed", "row_order")))
    record = mixed.quantization
    assert packed == record.allocation.weight_bytes(record.sites)
    assert not any(name.endswith((".weight", ".bias")) and "blocks" in name for name in tensors)  # no float weights


@pytest.mark.parametrize(("bits", "most"), [(8, 1.1), (4, 1.2), (2, 1.4)], ids=["8-bit", "4-bit", "2-bit"])
def test_a_real_model_is_little_more_than_its_weights(bits: int, most: float) -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    sites = model_sites(model)
    allocation = BitAllocation.uniform(sites, bits)
    skeleton = quantized_skeleton(build_model(model_config(model), "meta"), allocation)
    size = sum(t.numel() * t.element_size() for t in skeleton.state_dict().values())
    assert 1 < size / allocation.weight_bytes(sites) < most


# --- a failed write -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk-full", "interrupted"])
def test_a_failed_write_leaves_the_good_file(
    error: BaseException, good: Path, mixed: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = good.read_bytes()

    def half(tensors: dict, name: str, metadata: dict) -> None:
        save_file(tensors, name, metadata)
        with open(name, "r+b") as file:
            file.truncate(1000)
        raise error

    monkeypatch.setattr(tensor_file, "save_file", half)
    with pytest.raises(type(error)):
        save(mixed, good)
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


def test_a_failed_first_write_leaves_nothing(mixed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(mixed, tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_ordinary_permissions(mixed: nn.Module, tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        save(mixed, tmp_path / "m.safetensors")
    finally:
        os.umask(umask)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_missing_folder_is_named(mixed: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*none/m\.safetensors: directory .*none does not exist"):
        save(mixed, tmp_path / "none" / "m.safetensors")


# --- models that cannot be saved ----------------------------------------------------------------------------------


def partly_float() -> nn.Module:
    model = small_vit()
    model.blocks[1] = small_vit(1, act_layer="elu").blocks[1]
    return quietly(quantize, model, variant_images(count=4))


def with_another_head() -> nn.Module:
    model = copy.deepcopy(variant_quantized("class-token"))
    model.head = nn.Linear(32, 3)
    return model


def without_norm_bias() -> nn.Module:
    return quantize(small_vit(norm_layer=lambda dim, **kw: LayerNorm(dim, bias=False, **kw)), variant_images(count=4))


UNSAVEABLE = {
    "float": (small_vit, "save: model must come from vitq_kernels.quantize or load, got VisionTransformer"),
    "replaced": (lambda: replace_linears(small_vit()), "save: model must come from vitq_kernels.quantize or load"),
    "partly-float": (partly_float, "save: every part of the model must be integer, got one with parts left in float"),
    "another-head": (with_another_head, r"save: VisionTransformer must rebuild .*; head\.bias would be absent"),
    "no-norm-bias": (without_norm_bias, r"save: .*; norm\.bias would be \(32,\), is absent"),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_a_model_that_could_not_be_loaded_is_not_saved(case: str, good: Path) -> None:
    make, message = UNSAVEABLE[case]
    before = good.read_bytes()
    with pytest.raises(ValueError, match=message):
        save(make(), good)
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


# --- files that cannot be loaded ----------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    """Asserts that loading names the file and what is wrong."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"checkpoint .* does not exist") as caught:
            load(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", [0, 4, 8, 0.01, 0.5, 0.999], ids=str)
def test_a_truncated_file_is_refused(part: float, good: Path) -> None:
    data = good.read_bytes()
    good.write_bytes(data[: part if isinstance(part, int) else int(len(data) * part)])
    refused(good, "is not a whole safetensors file")


def test_a_file_with_something_behind_it_is_refused(good: Path) -> None:
    good.write_bytes(good.read_bytes() + b"x")
    refused(good, "is not a whole safetensors file")


@pytest.mark.parametrize("place", [0.0, 0.3, 0.7, 1.0], ids=["first-byte", "third", "two-thirds", "last-byte"])
def test_one_bit_of_a_tensor_is_noticed(place: float, good: Path) -> None:
    data = bytearray(good.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int((len(data) - 1 - start) * place)] ^= 0x10
    good.write_bytes(data)
    refused(good, "was changed after it was written: its sha256 does not match")


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'num_heads\\": 2', b'num_heads\\": 4'), (b'"activation\\": 8', b'"activation\\": 7'), (b'eps\\"', b'epz\\"')],
    ids=["architecture", "allocation", "key"],
)
def test_a_changed_manifest_is_noticed(old: bytes, new: bytes, good: Path) -> None:
    data = good.read_bytes()
    assert old in data
    good.write_bytes(data.replace(old, new, 1))
    refused(good, "was changed after it was written: its sha256 does not match")


def test_swapped_tensors_of_one_shape_are_noticed(good: Path) -> None:
    tensors, metadata = contents(good)
    a, b = "blocks.0.norm1.gain", "blocks.1.norm1.gain"
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, good, metadata)
    refused(good, "its sha256 does not match")


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


def rewritten(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Changes tensors and manifest of a checkpoint and signs it again."""
    tensors, metadata = contents(path)
    manifest = json.loads(metadata["manifest"])
    change(tensors, manifest)
    text = json.dumps(manifest)
    save_file(tensors, path, {"manifest": text, "sha256": content_hash(tensors, text)})


def test_a_signed_rewrite_without_changes_is_accepted(good: Path) -> None:
    rewritten(good, lambda tensors, manifest: None)
    same_model(load(good), variant_quantized("class-token"), variant_images(count=2))


@pytest.mark.parametrize("version", [SEMANTICS_VERSION + 1, 0, None, "1"], ids=str)
def test_another_semantics_version_is_refused(version: object, good: Path) -> None:
    rewritten(good, lambda tensors, manifest: manifest.update(semantics_version=version))
    refused(good, f"semantics version must be {SEMANTICS_VERSION}, got {version}; quantize the float model again")


SIGNED = {
    "other-format": (lambda t, m: m.update(format="vitq-kernels checkpoint 99"), "format must be '.*', got '.* 99'"),
    "no-format": (lambda t, m: m.pop("format"), "format must be '.*', got None"),
    "no-version": (lambda t, m: m.pop("semantics_version"), "semantics version must be .*, got None"),
    "no-model": (lambda t, m: m.pop("model"), "do not fit the manifest: KeyError: 'model'"),
    "no-sites": (lambda t, m: m.pop("sites"), "do not fit the manifest: KeyError: 'sites'"),
    "unknown-class": (lambda t, m: m["model"].update({"class": "os.system"}), "do not fit the manifest: KeyError"),
    "unknown-argument": (lambda t, m: m["model"]["arguments"].update(surprise=1), "do not fit the manifest: TypeError"),
    "not-an-object": (lambda t, m: m.update(model=[1, 2]), "do not fit the manifest"),
    "width-9": (
        lambda t, m: m["allocation"]["sites"]["head"].update(activation=9),
        r"must be an integer in 2\.\.8, got 9",
    ),
    "missing-site": (
        lambda t, m: m["allocation"]["sites"].pop("blocks.0.attn.qk"),
        r"do not fit .*blocks\.0\.attn\.qk",
    ),
    "other-width": (lambda t, m: m["allocation"]["sites"]["head"]["weight"].update(bits=[4]), "size mismatch for head"),
    "missing-tensor": (lambda t, m: t.pop("norm.bias"), r"do not fit .*Missing key.*norm\.bias"),
    "extra-tensor": (lambda t, m: t.update(more=torch.zeros(2)), r"do not fit .*Unexpected key.*more"),
    "other-shape": (
        lambda t, m: t.update({"norm.bias": torch.zeros(31)}),
        r"do not fit .*size mismatch for norm\.bias",
    ),
    "deeper": (lambda t, m: m["model"]["arguments"].update(depth=3), "do not fit the manifest"),
}


@pytest.mark.parametrize("case", SIGNED)
def test_a_signed_file_that_makes_no_sense_is_refused(case: str, good: Path) -> None:
    change, message = SIGNED[case]
    rewritten(good, change)
    with pytest.raises(CheckpointError, match=f"(?s){message}") as caught:
        load(good)
    assert str(good) in str(caught.value)


def test_an_order_that_is_no_permutation_is_refused(mixed: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save(mixed, path)
    rewritten(path, lambda tensors, manifest: tensors["blocks.0.mlp.fc1.row_order"].zero_())
    refused(path, "row_order must permute the rows inside each tile")


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", [pickle.dump, torch.save], ids=["pickle", "torch-save"])
def test_a_pickle_is_refused_and_not_executed(writer: Callable, tmp_path: Path) -> None:
    path, harm = tmp_path / "m.safetensors", tmp_path / "harm"
    with open(path, "wb") as file:
        writer({"state_dict": Bomb(harm)}, file)
    refused(path, "is not a whole safetensors file")
    assert not harm.exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n" * 10, b"{}", b"\xff" * 100], ids=["empty", "png", "json", "ones"]
)
def test_another_kind_of_file_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    refused(path, "is not a whole safetensors file")


FOREIGN = {
    "no-metadata": (None, "is not a vitq-kernels checkpoint: it has no manifest"),
    "timm": ({"format": "pt"}, "is not a vitq-kernels checkpoint: it has no manifest"),
    "not-json": ({"manifest": "{half"}, "the manifest is not JSON"),
    "a-list": ({"manifest": "[1]"}, r"format must be '.*', got \[1\]"),
    "a-number": ({"manifest": "3"}, "format must be '.*', got 3"),
    "an-object": ({"manifest": '{"format": "other"}'}, "format must be '.*', got 'other'"),
    "no-hash": (
        {"manifest": json.dumps({"format": checkpoint.FORMAT, "semantics_version": SEMANTICS_VERSION})},
        "its sha256 does not match",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_safetensors_file_is_refused(case: str, tmp_path: Path) -> None:
    metadata, message = FOREIGN[case]
    path = tmp_path / "m.safetensors"
    save_file({"head.weight": torch.zeros(3, 4)}, path, metadata)
    refused(path, message)
