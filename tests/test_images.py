"""Folders of images: which files and classes are found, which are chosen, and timm's own transform on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitq_kernels.images import ImageFolder, eval_transform, load_folder, read_image


def draw(path: Path, value: int = 0, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    """An image whose pixels all differ; ``value`` tells images apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size)
    bands = len(image.getbands())
    pixels = (np.arange(size[0] * size[1] * bands) * 7 + value) % 256
    shape = (size[1], size[0]) if bands == 1 else (size[1], size[0], bands)
    Image.fromarray(pixels.astype(np.uint8).reshape(shape)).save(path)
    return path


def first_pixel(image: Image.Image) -> Tensor:
    """The simplest transform: which image it was."""
    return torch.tensor(np.asarray(image)[0, 0, :1])


def names(folder: ImageFolder, root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in folder.files]


@pytest.fixture
def hundred(tmp_path: Path) -> ImageFolder:
    """A hundred labelled files that are not there: choosing reads none."""
    return ImageFolder(tuple(tmp_path / f"{i}.png" for i in range(100)), tuple(i % 7 for i in range(100)))


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for name in ("zebra/1.png", "ant/b.JPG", "ant/a.png", "cat/x.webp"):
        draw(tmp_path / name)
    (tmp_path / "notes").mkdir()  # holds no images: no class
    (tmp_path / "ant" / "notes.txt").touch()
    found = ImageFolder.scan(tmp_path)
    assert names(found, tmp_path) == ["ant/a.png", "ant/b.JPG", "cat/x.webp", "zebra/1.png"]
    assert found.labels == (0, 0, 1, 2)


def test_subfolders_of_whole_numbers_are_the_classes(tmp_path: Path) -> None:
    for name in ("10/a.png", "9/a.png", "007/a.png"):
        draw(tmp_path / name)
    found = ImageFolder.scan(tmp_path)
    assert dict(zip(names(found, tmp_path), found.labels, strict=True)) == {
        "10/a.png": 10,
        "9/a.png": 9,
        "007/a.png": 7,
    }


@pytest.mark.parametrize("other", ["cat", "²", "-1"])
def test_one_other_name_makes_all_of_them_names(other: str, tmp_path: Path) -> None:
    for name in ("10", "9", other):
        draw(tmp_path / name / "a.png")
    assert sorted(ImageFolder.scan(tmp_path).labels) == [0, 1, 2]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpeg", "c.txt"):
        draw(tmp_path / name) if name != "c.txt" else (tmp_path / name).touch()
    found = ImageFolder.scan(str(tmp_path))
    assert names(found, tmp_path) == ["a.jpeg", "b.png"]
    assert found.labels is None


def test_labels_csv_comes_before_subfolders(tmp_path: Path) -> None:
    for name in ("0/a.png", "1/b.png", "c.png"):
        draw(tmp_path / name)
    (tmp_path / "labels.csv").write_text("label,file,remark\n 5 ,1/b.png,x\n\n3,c.png,\n")
    found = ImageFolder.scan(tmp_path)
    assert names(found, tmp_path) == ["1/b.png", "c.png"]
    assert found.labels == (5, 3)


def test_labels_csv_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    draw(tmp_path / "é,1.png")
    (tmp_path / "labels.csv").write_bytes('\ufefffile,label\r\n"é,1.png",4\r\n'.encode())
    assert ImageFolder.scan(tmp_path).labels == (4,)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (b"", r"must have columns file,label, got None"),
        (b"file\na.png\n", r"must have columns file,label, got \['file'\]"),
        (b"file,label\n", r"must name at least one image, got none"),
        (b"file,label\na.png,1\nb.png,2\n", r"line 3: file 'b.png' is not in the folder"),
        (b"file,label\n\n\nb.png,2\n", r"line 4: file 'b.png' is not in the folder"),
        (b"label,file\n3\n", r"line 2: file None is not in the folder"),
        (b"file,label\n,3\n", r"line 2: file '' is not in the folder"),
        (b"file,label\na.png\n", r"line 2: label must be a whole number, got None"),
        (b"file,label\na.png,\n", r"line 2: label must be a whole number, got ''"),
        (b"file,label\na.png,1.0\n", r"line 2: label must be a whole number, got '1.0'"),
        (b"file,label\na.png,-1\n", r"line 2: label must be a whole number, got '-1'"),
        ("file,label\na.png,²\n".encode(), r"line 2: label must be a whole number, got '²'"),
        (b"file,label\na.png,\xff\n", r"is not a table of text: .*can't decode"),
        (b"file,label\n" + b"a" * 200_000 + b",1\n", r"is not a table of text: field larger"),
    ],
    ids=[
        "empty",
        "no-label-column",
        "no-rows",
        "unknown-file",
        "blank-lines",
        "no-file",
        "empty-file",
        "no-label",
        "empty-label",
        "fraction",
        "negative",
        "superscript",
        "no-text",
        "endless-field",
    ],
)
def test_bad_labels_csv_is_named_with_its_line(table: bytes, message: str, tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_bytes(table)
    with pytest.raises(ValueError, match=rf"labels\.csv {message}"):
        ImageFolder.scan(tmp_path)


def test_missing_folder_and_file_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", draw(tmp_path / "a.png")):
        with pytest.raises(ValueError, match=rf"image folder {path} does not exist or is not a folder"):
            ImageFolder.scan(path)


@pytest.mark.parametrize("inside", [(), ("notes.txt",), ("class/notes.txt",), ("class/more/a.png",)])
def test_folder_without_images_is_named(inside: tuple[str, ...], tmp_path: Path) -> None:
    for name in inside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"image folder {tmp_path} must hold images \(\.jpg, .*\), got none"):
        ImageFolder.scan(tmp_path)


def test_sample_is_chosen_by_the_seed_alone(hundred: ImageFolder) -> None:
    assert hundred.sample(10, 3) == hundred.sample(10, 3)
    assert hundred.sample(10, 3) != hundred.sample(10, 4)
    torch.manual_seed(99)
    assert hundred.sample(10, 3) == hundred.sample(10, 3)


def test_sample_keeps_order_and_labels_and_has_no_image_twice(hundred: ImageFolder) -> None:
    chosen = hundred.sample(30, 0)
    places = [hundred.files.index(file) for file in chosen.files]
    assert places == sorted(set(places))
    assert len(places) == 30
    assert chosen.labels == tuple(hundred.labels[place] for place in places)


def test_every_image_can_be_chosen(hundred: ImageFolder) -> None:
    assert {file for seed in range(60) for file in hundred.sample(10, seed).files} == set(hundred.files)


@pytest.mark.parametrize("limit", [None, 100, 1000])
def test_sample_of_all_is_the_folder(limit: int | None, hundred: ImageFolder) -> None:
    assert hundred.sample(limit, 5) == hundred


def test_sample_of_unlabelled_files_has_no_labels(hundred: ImageFolder) -> None:
    assert ImageFolder(hundred.files, None).sample(5, 0).labels is None


@pytest.mark.parametrize("limit", [0, -1])
def test_sample_of_none_is_refused(limit: int, hundred: ImageFolder) -> None:
    with pytest.raises(ValueError, match=f"number of images must be positive, got {limit}"):
        hundred.sample(limit, 0)


@pytest.mark.parametrize("labels", [(4, 3, 2, 1, 0), None], ids=["labelled", "unlabelled"])
def test_batches_hold_every_image_once_in_order(labels: tuple[int, ...] | None, tmp_path: Path) -> None:
    folder = ImageFolder(tuple(draw(tmp_path / f"{i}.png", i) for i in range(5)), labels)
    batches = list(folder.batches(first_pixel, 2))
    assert [x.tolist() for x, _ in batches] == [[[0], [1]], [[2], [3]], [[4]]]
    expected = [None] * 3 if labels is None else [[4, 3], [2, 1], [0]]
    assert [None if y is None else y.tolist() for _, y in batches] == expected
    assert all(y is None or y.dtype == torch.int64 for _, y in batches)


def test_batches_decode_one_batch_at_a_time(tmp_path: Path) -> None:
    folder = ImageFolder((draw(tmp_path / "0.png"), tmp_path / "missing.png"), None)
    batches = folder.batches(first_pixel, 1)
    assert len(batches) == 2
    batches[0]
    with pytest.raises(ValueError, match=r"image \S+missing.png does not decode"):
        batches[1]


def test_load_folder_gives_the_sample_in_one_tensor(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / "01"[i % 2] / f"{i}.png", i)
    images, labels = load_folder(tmp_path, first_pixel, 4, seed=1)
    chosen = ImageFolder.scan(tmp_path).sample(4, 1)
    assert images.flatten().tolist() == [int(file.stem) for file in chosen.files]
    assert labels.tolist() == list(chosen.labels)
    assert len(load_folder(tmp_path, first_pixel)[0]) == 6


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_tiny_patch16_384"])
def test_transform_is_timms_own_for_the_model(name: str, tmp_path: Path) -> None:
    model = VisionTransformer(img_size=1, patch_size=1, embed_dim=4, depth=0, num_heads=1)
    config = model.pretrained_cfg = timm.get_pretrained_cfg(name).to_dict()
    model.patch_embed.img_size = config["input_size"][1:]
    image = Image.open(draw(tmp_path / "a.png", size=(500, 375)))
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    expected = create_transform(**{key: config[key] for key in keys})(image)
    actual = eval_transform(model)(image)
    assert actual.shape == config["input_size"]
    assert torch.equal(actual, expected)


def small_model(**config: object) -> VisionTransformer:
    model = VisionTransformer(img_size=(24, 16), patch_size=8, embed_dim=4, depth=0, num_heads=1)
    model.pretrained_cfg = {"input_size": (3, 24, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, **config}
    return model


def test_transform_resizes_crops_and_normalises(tmp_path: Path) -> None:
    """Against plain PIL: resize so that the crop is the given share, cut out the centre, normalise."""
    image = Image.open(draw(tmp_path / "a.png", size=(50, 40)))
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=4, depth=0, num_heads=1)
    actual = eval_transform(model, mean=mean, std=std, crop=0.8)(image)
    resized = image.resize((25, 20), Image.Resampling.BICUBIC)  # 16 / 0.8 on the short side
    cropped = np.asarray(resized.crop((4, 2, 20, 18)), dtype=np.float64) / 255
    expected = torch.tensor((cropped - mean) / std).movedim(-1, 0)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({"mean": (0.1, 0.2, 0.3)}, {"mean": (0.1, 0.2, 0.3)}),
        ({"std": [0.1, 0.2, 0.3]}, {"std": (0.1, 0.2, 0.3)}),
        ({"crop": 0.6}, {"crop_pct": 0.6}),
    ],
    ids=["mean", "std", "crop"],
)
def test_an_override_is_as_if_the_model_said_so(given: dict, config: dict, tmp_path: Path) -> None:
    image = Image.open(draw(tmp_path / "a.png", size=(50, 40)))
    overridden = eval_transform(small_model(), **given)(image)
    assert torch.equal(overridden, eval_transform(small_model(**config))(image))
    assert not torch.equal(overridden, eval_transform(small_model())(image))


def test_images_get_the_size_of_the_model_not_of_timms_config(tmp_path: Path) -> None:
    """timm.create_model(name, img_size=...) leaves the size in the config as it was."""
    image = Image.open(draw(tmp_path / "a.png", size=(50, 40)))
    assert eval_transform(small_model(input_size=(3, 224, 224)))(image).shape == (3, 24, 16)
    free = small_model(input_size=(3, 40, 40))
    free.patch_embed.strict_img_size = False
    assert eval_transform(free)(image).shape == (3, 40, 40)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean must be 3 numbers, one a channel, got \[0.5, 0.5\]"),
        ({"mean": (0.5, float("inf"), 0.5)}, r"mean must be 3 numbers, one a channel, got \[0.5, inf, 0.5\]"),
        ({"std": (0.5, 0.5, 0.0)}, r"std must be 3 positive numbers, one a channel, got \[0.5, 0.5, 0.0\]"),
        ({"std": (0.5, 0.5, -1.0)}, r"std must be 3 positive numbers"),
        ({"std": (float("nan"),) * 3}, r"std must be 3 positive numbers"),
        ({"crop": 0.0}, r"crop must be a share in \(0, 1\], got 0.0"),
        ({"crop": 1.01}, r"crop must be a share in \(0, 1\], got 1.01"),
        ({"crop": float("nan")}, r"crop must be a share in \(0, 1\], got nan"),
    ],
    ids=["two-means", "mean-inf", "std-zero", "std-negative", "std-nan", "crop-zero", "crop-above-1", "crop-nan"],
)
def test_bad_overrides_are_named(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eval_transform(small_model(), **given)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("1", "png")]
)
def test_every_mode_is_read_as_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.open(draw(tmp_path / "rgb.png", size=(40, 40))).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
        expected = np.asarray(image.convert("RGB"))
    pixels = read_image(path, lambda image: torch.tensor(np.asarray(image)))
    assert torch.equal(pixels, torch.tensor(expected))
    assert read_image(path, eval_transform(small_model())).shape == (3, 24, 16)


def test_grey_is_the_same_in_every_channel(tmp_path: Path) -> None:
    pixels = read_image(draw(tmp_path / "a.png", mode="L"), eval_transform(small_model()))
    assert torch.equal(pixels[0], pixels[2])
    assert pixels.std() > 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "folder"])
def test_an_image_that_does_not_decode_is_named(damage: str, tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", size=(200, 200))
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"no image"}[damage])
    with pytest.raises(ValueError, match=rf"image {path} does not decode: "):
        read_image(path, first_pixel)
