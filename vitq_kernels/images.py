"""Folders of images as normalised tensors, through timm's own evaluation transform."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ImageFolder:
    """Image files and, where the folder tells them, their classes."""

    files: tuple[Path, ...]
    labels: tuple[int, ...] | None

    @classmethod
    def scan(cls, folder: str | Path) -> ImageFolder:
        """Reads a folder's layout: class subfolders, or flat with a ``labels.csv`` (``file,label``), or flat.

        Subfolders are classes in sorted order of their names, as torchvision and timm count them; names that are all
        whole numbers are the classes themselves.

        Raises:
            ValueError: no folder, no images, or a labels.csv that does not fit; the message names the file.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"image folder {folder} does not exist or is not a folder")
        table = folder / "labels.csv"
        classes = sorted(d for d in folder.iterdir() if d.is_dir() and any(_images(d)))
        if table.is_file():
            files, labels = _read_labels(folder, table)
            return cls(files, labels)
        if classes:
            numbered = all(d.name.isdecimal() for d in classes)
            pairs = [(f, int(d.name) if numbered else i) for i, d in enumerate(classes) for f in _images(d)]
            return cls(tuple(f for f, _ in pairs), tuple(label for _, label in pairs))
        flat = tuple(_images(folder))
        if not flat:
            raise ValueError(f"image folder {folder} must hold images ({', '.join(EXTENSIONS)}), got none")
        return cls(flat, None)

    def sample(self, limit: int | None, seed: int) -> ImageFolder:
        """At most ``limit`` of the images, chosen by ``seed``, in folder order."""
        if limit is None or limit >= len(self.files):
            return self
        if limit < 1:
            raise ValueError(f"number of images must be positive, got {limit}")
        chosen = torch.randperm(len(self.files), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
        labels = None if self.labels is None else tuple(self.labels[i] for i in chosen.tolist())
        return ImageFolder(tuple(self.files[i] for i in chosen.tolist()), labels)

    def batches(self, transform: Transform, batch_size: int) -> Sequence[tuple[Tensor, Tensor | None]]:
        """Pairs of images [b, C, H, W] and labels int64 [b] or None, each decoded when it is asked for."""
        return _Batches(self, transform, batch_size)


@dataclass(frozen=True)
class _Batches(Sequence[tuple[Tensor, "Tensor | None"]]):
    folder: ImageFolder
    transform: Transform
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.folder.files) // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        part = slice(index * self.batch_size, (index + 1) * self.batch_size)
        images = torch.stack([read_image(file, self.transform) for file in self.folder.files[part]])
        return images, None if self.folder.labels is None else torch.tensor(self.folder.labels[part])


def read_image(file: Path, transform: Transform) -> Tensor:
    """Decodes one image as RGB; raises ValueError naming the file if it does not decode."""
    return decode_image(file, transform, str(file))


def decode_image(
    source: Path | IO[bytes], transform: Transform, name: str, formats: tuple[str, ...] | None = None
) -> Tensor:
    """Decodes one image as RGB; ``formats``, as PIL calls them, are the ones that are tried (None: all it knows).

    Raises:
        ValueError: the image does not decode; the message has its ``name``.
    """
    try:
        with Image.open(source, formats=formats) as image:
            decoded = image.convert("RGB")
    except UnidentifiedImageError as error:  # whose own text holds the source, of a stream its address
        raise ValueError(f"image {name} does not decode: no known format") from error
    except Exception as error:  # PIL's decoders raise errors of any kind, RuntimeError and struct.error among them
        raise ValueError(f"image {name} does not decode: {error}") from error
    return transform(decoded)


def load_folder(
    folder: str | Path, transform: Transform, limit: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """All (or ``limit``) images of a folder in one tensor [n, C, H, W], and labels int64 [n] or None."""
    chosen = ImageFolder.scan(folder).sample(limit, seed)
    return chosen.batches(transform, len(chosen.files))[0]


def eval_transform(
    model: nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop: float | None = None,
) -> Transform:
    """timm's evaluation transform for a model: resize, centre crop, normalise.

    Args:
        model: a timm model, or one loaded by ``vitq_kernels.load``.
        mean, std: per channel, or None for the model's own.
        crop: share of the resized short side that is kept, or None for the model's own.

    Raises:
        ValueError: an argument differs from the above.
    """
    config: dict[str, Any] = resolve_model_data_config(model)
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) and getattr(embed, "strict_img_size", False):
        config["input_size"] = (config["input_size"][0], *embed.img_size)  # timm's config may be of another size
    channels = config["input_size"][0]
    for name, values in (("mean", mean), ("std", std)):
        if values is not None:
            if len(values) != channels or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                sign = "positive " if name == "std" else ""
                raise ValueError(f"{name} must be {channels} {sign}numbers, one a channel, got {list(values)}")
            config[name] = tuple(values)
    if crop is not None:
        if not 0 < crop <= 1:
            raise ValueError(f"crop must be a share in (0, 1], got {crop}")
        config["crop_pct"] = crop
    transform: Transform = create_transform(**config, is_training=False)
    return transform


def image_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """[C, H, W] of the images that a timm model takes, float or quantized; None where the model does not tell."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    embed: Any = getattr(model, "patch_embed", None)
    channels, *size = config.get("input_size") or (None,)
    channels = getattr(getattr(embed, "proj", None), "in_channels", channels)
    size = getattr(embed, "img_size", None) or size
    return (channels, *size) if channels and size else None


def _images(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in EXTENSIONS)


def _read_labels(folder: Path, table: Path) -> tuple[tuple[Path, ...], tuple[int, ...]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:  # spreadsheets write a byte order mark
            reader = csv.DictReader(handle)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{table} must have columns file,label, got {reader.fieldnames}")
            rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} is not a table of text: {error}") from error
    files, labels = [], []
    for line, row in rows:
        file = folder / (row["file"] or "")
        if not file.is_file():
            raise ValueError(f"{table} line {line}: file {row['file']!r} is not in the folder")
        if not (row["label"] or "").strip().isdecimal():
            raise ValueError(f"{table} line {line}: label must be a whole number, got {row['label']!r}")
        files.append(file)
        labels.append(int(row["label"]))
    if not files:
        raise ValueError(f"{table} must name at least one image, got none")
    return tuple(files), tuple(labels)
