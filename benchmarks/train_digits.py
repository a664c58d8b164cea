"""Trains an embedded model, the ViT of ``vitq demo`` or a Swin, and writes it to ``vitq_kernels/data/``.

    python -m benchmarks.train_digits vit              # 3 to 6 minutes on one thread; writes the images too
    python -m benchmarks.train_digits swin             # likewise, but for the images
    python -m benchmarks.train_digits vit --validate   # the run that settings are judged by; writes nothing

The 500 test images are set aside before anything else and judge only the finished weights; no choice depends
on them. Settings are chosen with ``--validate``, which trains on 1097 images of the train split and reports
the other 200. Nothing is selected during a run: the weights are the moving average at the end of a fixed
schedule.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vitq_kernels.data
from vitq_kernels.data import preprocess_digits

SEED = 0
TEST_IMAGES = 500
VALIDATION_IMAGES = 200
CALIBRATION_IMAGES = 128
CLASSES = {"vit": VisionTransformer, "swin": SwinTransformer}
SHARED = {"img_size": 32, "in_chans": 1, "num_classes": 10, "mlp_ratio": 4.0, "qkv_bias": True}
# Heads of 32 channels: the K of one int8 mma.m16n8k32.
CONFIGS = {
    "vit": {**SHARED, "patch_size": 8, "global_pool": "token", "embed_dim": 64, "depth": 4, "num_heads": 2},
    # Maps of 8x8 in four windows, shifted in every second block, and of 4x4 in one.
    "swin": {**SHARED, "patch_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4},
}


@dataclass(frozen=True)
class Schedule:
    """Optimisation settings, those of the ViT; the Swin took them over untried.

    On the 200 validation images 198 are right with these, 198 with 400 epochs, 197 with lr 2e-3 and weight
    decay 0.1: no difference beyond noise, so the shortest run with the plain values stays.
    """

    epochs: int = 240
    warmup_epochs: int = 10
    batch: int = 64
    lr: float = 1e-3  # peak of the cosine
    weight_decay: float = 0.05
    drop_path: float = 0.05
    label_smoothing: float = 0.1
    ema_decay: float = 0.998  # averages about 500 steps, 25 epochs


@dataclass(frozen=True)
class Splits:
    """Rows of scikit-learn's data set, each int64 [n], sorted; stratified by label."""

    train: np.ndarray
    validation: np.ndarray  # part of train
    calibration: np.ndarray  # part of train
    test: np.ndarray  # disjoint from train


def make_splits(labels: np.ndarray) -> Splits:
    """Stratified rows for each use, fixed by `SEED`."""

    def part(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        rest, taken = train_test_split(rows, test_size=count, stratify=labels[rows], random_state=SEED)
        return np.sort(rest), np.sort(taken)

    train, test = part(np.arange(len(labels)), TEST_IMAGES)
    _, validation = part(train, VALIDATION_IMAGES)
    _, calibration = part(train, CALIBRATION_IMAGES)
    return Splits(train, validation, calibration, test)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, scale, shear, shift and contrast noise of each image, drawn from `generator`.

    Args:
        images: float32 [n, 1, 32, 32], background -1.
    Returns:
        float32 [n, 1, 32, 32], in [-1, 1].
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, shear, scale = uniform(math.radians(12)), uniform(0.15), 1 + uniform(0.1)
    shift_x, shift_y = uniform(0.2), uniform(0.2)  # of half the width: 3.2 of 32, 0.8 of the 8 source pixels
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([cos, shear - sin, shift_x, sin, cos, shift_y], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Zero padding must mean background, so sample (x + 1) and come back.
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    noise = torch.randn(len(images), 1, 8, 8, generator=generator) * 0.1  # per source pixel, then upsampled
    return (moved + F.interpolate(noise, scale_factor=4, mode="bilinear", align_corners=False)).clamp(-1, 1)


def train(kind: str, images: Tensor, labels: Tensor, schedule: Schedule) -> nn.Module:
    """The moving average of the weights after the whole schedule, in eval mode.

    Args:
        kind: of model, a key of ``CONFIGS``.
        images: float32 [n, 1, 32, 32].
        labels: int64 [n].
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = CLASSES[kind](**CONFIGS[kind], drop_path_rate=schedule.drop_path)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    # Decay the matrices only; cls_token and pos_embed are [1, ...], and relative positions are a bias.
    decayed, other = [], []
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and p.shape[0] > 1 and not name.endswith("bias_table")
        (decayed if is_matrix else other).append(p)
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=schedule.lr,
        betas=(0.9, 0.98),
    )
    steps_per_epoch = len(images) // schedule.batch
    steps, warmup = schedule.epochs * steps_per_epoch, schedule.warmup_epochs * steps_per_epoch

    def lr_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
    start, loss_sum = time.perf_counter(), 0.0
    for epoch in range(schedule.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps_per_epoch * schedule.batch].split(schedule.batch):
            logits = model(augment(images[rows], generator))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=schedule.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            lr.step()
            loss_sum += loss.item()
            for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(value.detach(), 1 - schedule.ema_decay)
        if (epoch + 1) % 20 == 0:
            seconds = time.perf_counter() - start
            print(
                f"epoch {epoch + 1:3d} | loss {loss_sum / (20 * steps_per_epoch):.4f} | {seconds:.0f} s",
                flush=True,
            )
            loss_sum = 0.0
    return average


@torch.no_grad()
def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Images whose largest logit is at their label."""
    return int((model(images).argmax(dim=1) == labels).sum())


def main() -> None:
    """Parses the command line, trains, and writes the files unless validating."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=CONFIGS)
    parser.add_argument("--validate", action="store_true", help="judge on 200 train images, write nothing")
    parser.add_argument("--out", type=Path, default=Path(vitq_kernels.data.__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)  # sums are split by thread, so more threads would give other weights

    digits = load_digits()
    pixels, labels = digits.images.astype(np.uint8), digits.target.astype(np.uint8)
    inputs, targets = preprocess_digits(torch.from_numpy(pixels)), torch.from_numpy(labels).long()
    splits = make_splits(labels)

    seen = np.setdiff1d(splits.train, splits.validation) if args.validate else splits.train
    judged = splits.validation if args.validate else splits.test
    start = time.perf_counter()
    model = train(args.kind, inputs[seen], targets[seen], Schedule())
    seconds = time.perf_counter() - start
    correct = count_correct(model, inputs[judged], targets[judged])
    name = "validation" if args.validate else "test"
    parameters = sum(p.numel() for p in model.parameters())
    top1 = correct / len(judged)
    print(f"{parameters} parameters | {name} {correct}/{len(judged)} = {top1:.3f} | {seconds:.0f} s")
    if args.validate:
        return

    metadata = {"config": json.dumps(CONFIGS[args.kind]), "seed": str(SEED), "float_top1": str(top1)}
    # Not save_file: it makes the file readable by its owner alone, and that mode would travel into the wheel.
    (args.out / f"digits_{args.kind}.safetensors").write_bytes(save(model.state_dict(), metadata))
    if args.kind != "vit":
        return
    stored = {"calibration": splits.calibration, "test": splits.test}
    arrays = {f"{split}_rows": rows.astype(np.int16) for split, rows in stored.items()}
    arrays |= {f"{split}_images": pixels[rows] for split, rows in stored.items()}
    arrays |= {f"{split}_labels": labels[rows] for split, rows in stored.items()}
    np.savez_compressed(args.out / "digits.npz", **arrays)


if __name__ == "__main__":
    main()
