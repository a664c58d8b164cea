"""The embedded models and images: a small ViT, that of ``vitq demo``, and a small Swin, trained on handwritten digits.

Origin, licence and accuracy: ``README.md`` beside this file. Made by ``benchmarks/train_digits.py``.
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

__all__ = ["digits_images", "load_digits_swin", "load_digits_vit", "preprocess_digits"]


def preprocess_digits(pixels: Tensor) -> Tensor:
    """Model input = 4x bilinear upsampling of pixel / 8 - 1.

    The data set's 8x8 pixels are counts over 4x4 blocks of a 32x32 bitmap; upsampling returns to that grid,
    so that patch 8 gives 16 tokens and the patch embedding is a GEMM with K = 64 instead of K = 4.

    Args:
        pixels: counts, uint8 [n, 8, 8], in [0, 16].
    Returns:
        float32 [n, 1, 32, 32], in [-1, 1], background -1.
    """
    unit = pixels[:, None].float() / 8 - 1
    return F.interpolate(unit, scale_factor=4, mode="bilinear", align_corners=False)


def load_digits_vit() -> VisionTransformer:
    """The embedded timm ViT (10 digits) in eval mode, float32 on the CPU.

    Example:
        >>> load_digits_vit().embed_dim
        64
    """
    from timm.models.vision_transformer import VisionTransformer  # slow to import: only who asks for it pays

    return _trained(VisionTransformer, "digits_vit.safetensors")


def load_digits_swin() -> SwinTransformer:
    """The embedded timm Swin (10 digits) in eval mode, float32 on the CPU.

    Example:
        >>> load_digits_swin().embed_dim
        32
    """
    from timm.models.swin_transformer import SwinTransformer

    return _trained(SwinTransformer, "digits_swin.safetensors")


def _trained(cls: type[nn.Module], name: str) -> Any:
    with as_file(files(__name__) / name) as path:
        with safe_open(path, framework="pt") as file:
            config = json.loads(file.metadata()["config"])
        state = load_file(path)
    model = cls(**config)
    model.load_state_dict(state, strict=True)
    return model.eval()


def digits_images(split: Literal["calibration", "test"]) -> tuple[Tensor, Tensor]:
    """Images as the model takes them, and their labels.

    Args:
        split: "calibration" (128 images the model was trained on) or "test" (500 images it never saw).
    Returns:
        images: float32 [n, 1, 32, 32], in [-1, 1]; see `preprocess_digits`.
        labels: int64 [n], in [0, 9].
    Raises:
        ValueError: split is neither of the two.
    """
    if split not in ("calibration", "test"):
        raise ValueError(f"digits_images: split must be 'calibration' or 'test', got {split!r}")
    with (files(__name__) / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        pixels, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    return preprocess_digits(torch.from_numpy(pixels)), torch.from_numpy(labels).long()
