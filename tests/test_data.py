"""The embedded model and images: accuracy as stated, disjoint splits, small files."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from vitq_kernels.data import digits_images, load_digits_swin, load_digits_vit, preprocess_digits

FOLDER = files("vitq_kernels.data")
SIZES = {"calibration": 128, "test": 500}
MODELS = {"vit": load_digits_vit, "swin": load_digits_swin}


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def metadata(kind: str) -> dict[str, str]:
    with safe_open(FOLDER / f"digits_{kind}.safetensors", framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "digits.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def correct(kind: str) -> int:
    images, labels = digits_images("test")
    with torch.inference_mode():
        return int((MODELS[kind]()(images).argmax(dim=1) == labels).sum())


def test_model_reaches_98_percent_of_the_test_images(correct: int) -> None:
    assert correct >= 0.98 * SIZES["test"]


def test_model_has_the_accuracy_its_file_states_to_the_image(correct: int, metadata: dict[str, str]) -> None:
    assert correct == round(float(metadata["float_top1"]) * SIZES["test"])


def test_readme_states_the_same_accuracy(kind: str, correct: int) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    name = {"vit": "ViT", "swin": "Swin"}[kind]
    assert f"{name}: {correct} of the {SIZES['test']} test images ({100 * correct / SIZES['test']:.1f} %)" in text


def test_model_is_float32_in_eval_mode_and_fresh_each_time(kind: str) -> None:
    model = MODELS[kind]()
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        model.norm.weight.zero_()
    assert MODELS[kind]().norm.weight.abs().sum() > 0


def test_metadata_says_how_to_build_the_model(kind: str, metadata: dict[str, str]) -> None:
    config: dict[str, Any] = json.loads(metadata["config"])
    assert metadata["seed"] == "0"
    assert MODELS[kind]().embed_dim == config["embed_dim"]
    if kind == "swin":  # windows are shifted, mask and all
        assert any(any(block.shift_size) for stage in load_digits_swin().layers for block in stage.blocks)


@pytest.mark.parametrize("split", SIZES)
def test_images_have_the_stated_shape_dtype_and_range(split: str) -> None:
    images, labels = digits_images(split)
    assert (images.shape, images.dtype) == ((SIZES[split], 1, 32, 32), torch.float32)
    assert (images.min(), images.max()) == (-1, 1)
    assert (labels.shape, labels.dtype) == ((SIZES[split],), torch.int64)


@pytest.mark.parametrize("split", SIZES)
def test_split_is_balanced_over_the_ten_digits(split: str) -> None:
    counts = torch.bincount(digits_images(split)[1], minlength=10)
    assert len(counts) == 10
    assert all(abs(count - SIZES[split] / 10) <= 0.1 * SIZES[split] / 10 for count in counts.tolist())


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be 'calibration' or 'test', got 'train'"):
        digits_images("train")  # type: ignore[arg-type]


def test_no_test_image_is_a_calibration_image(arrays: dict[str, np.ndarray]) -> None:
    # All 1797 images of the data set differ, so rows and pixels must both be disjoint.
    seen = {image.tobytes() for image in arrays["calibration_images"]}
    assert not np.intersect1d(arrays["calibration_rows"], arrays["test_rows"]).size
    assert not any(image.tobytes() in seen for image in arrays["test_images"])


@pytest.mark.parametrize("split", SIZES)
def test_stored_images_are_the_stated_rows_of_the_data_set(split: str, arrays: dict[str, np.ndarray]) -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()  # bundled with scikit-learn, no network
    rows = arrays[f"{split}_rows"]
    np.testing.assert_array_equal(arrays[f"{split}_images"], digits.images[rows])
    np.testing.assert_array_equal(arrays[f"{split}_labels"], digits.target[rows])


def test_preprocessing_keeps_constant_images_and_the_block_centres_of_a_ramp() -> None:
    constant = preprocess_digits(torch.full((1, 8, 8), 4, dtype=torch.uint8))
    assert (constant == -0.5).all()
    ramp = preprocess_digits(torch.arange(8, dtype=torch.uint8).expand(1, 8, 8))
    blocks = ramp.unfold(3, 4, 4).mean(dim=(2, 4))[0, 0, 1:7]
    torch.testing.assert_close(blocks, torch.arange(1, 7) / 8 - 1)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("digits_vit.safetensors", 1_000_000), ("digits_swin.safetensors", 600_000), ("digits.npz", 100_000)],
)
def test_file_is_small(name: str, limit: int) -> None:
    assert len((FOLDER / name).read_bytes()) <= limit
