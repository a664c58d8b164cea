"""Ranges of every activation, from a few images: hooks that watch the float model and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitq_kernels.files import replaced_file
from vitq_kernels.models import BlockParts, model_parts
from vitq_kernels.observers import ChannelSample, InputMoments, RangeStats, tau_errors
from vitq_kernels.windows import Windows

SAMPLE_TOKENS = 4096  # tokens kept per tensor for percentiles: 126 MB a block of ViT-B
ATTENTION_IMAGES = 8  # images kept whole for the choice of tau
_RANGE_GROUPS = ("inputs", "qkv")
_TENSOR_GROUPS = ("output_mean", "tau_error", "qkv_mean")


@dataclass(frozen=True)
class CalibrationStats:
    """What conversion needs to know of the float model's activations. Keys are site names."""

    # Of each linear, per input channel; image channels for the patch embedding. Where a norm stands between attention
    # and proj, also of what enters that norm, under the name of the av site.
    inputs: Mapping[str, RangeStats]
    output_mean: Mapping[str, Tensor]  # of each linear, float32 [N], over all tokens and images
    qkv: Mapping[str, RangeStats]  # of q, k and v as attention multiplies them, by the qkv linear, [3 * H * D]
    tau_error: Mapping[str, Tensor]  # of each av site, [len(WIDTHS), steps, H], output error per log2_steps entry
    images: int = 0
    qkv_mean: Mapping[str, Tensor] = field(default_factory=dict)  # where q or k are normed or turned, [3 * H * D]

    def mean_of_qkv(self, site: str) -> Tensor:
        """Mean of q, k and v as attention multiplies them, float32 [3 * H * D]."""
        return self.qkv_mean.get(site, self.output_mean[site])

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {}
        for group in _RANGE_GROUPS:
            for name, stats in getattr(self, group).items():
                for part in ("low", "high", "error"):
                    tensors[f"{group}/{name}/{part}"] = getattr(stats, part).contiguous()
        for group in _TENSOR_GROUPS:
            for name, tensor in getattr(self, group).items():
                tensors[f"{group}/{name}"] = tensor.contiguous()
        with replaced_file(path) as temporary:
            save_file(tensors, str(temporary), {"images": str(self.images)})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStats:
        """The inverse of ``save``."""
        with safe_open(str(path), framework="pt") as file:
            images = int(file.metadata()["images"])
        groups: dict[str, dict[str, Any]] = {g: {} for g in _RANGE_GROUPS + _TENSOR_GROUPS}
        for key, tensor in load_file(str(path)).items():
            group, name, *part = key.split("/")
            if part:
                groups[group].setdefault(name, {})[part[0]] = tensor
            else:
                groups[group][name] = tensor
        for group in _RANGE_GROUPS:
            groups[group] = {name: RangeStats(**parts) for name, parts in groups[group].items()}
        return cls(**groups, images=images)

    def __str__(self) -> str:
        lines = [f"calibrated on {self.images} images", f"{'input of':24} {'lowest':>10} {'highest':>10}"]
        for name, stats in self.inputs.items():
            lines.append(f"{name:24} {stats.low.min().item():10.4g} {stats.high.max().item():10.4g}")
        return "\n".join(lines)


class Calibrator:
    """Context manager that watches every forward of a float VisionTransformer.

    ::

        with Calibrator(model) as calibrator:
            calibrator.model(images)
        stats = calibrator.stats()

    ``calibrator.model`` is the model, or the twin of one of transformers (``model_parts``). The model comes back
    untouched: hooks go with the context, also on an exception; weights are only read.
    """

    def __init__(self, model: nn.Module, *, expected_images: int = 64, seed: int = 0) -> None:
        self.parts = model_parts(model)
        self.model = self.parts.model
        self.seen = 0
        self._keep = max(1, SAMPLE_TOKENS // max(1, expected_images))  # tokens of an image
        self._generator = torch.Generator().manual_seed(seed)
        self._inputs: dict[str, ChannelSample] = {}
        self._outputs: dict[str, ChannelSample] = {}
        self._codes: dict[str, ChannelSample] = {}  # of q, k and v where they are not what qkv puts out
        self._whole_qkv: dict[str, list[tuple[Windows | None, Tensor]]] = {}
        self._windows: dict[str, Windows] = {}  # by block, of the map at hand
        self._handles: list[Any] = []

    def __enter__(self) -> Calibrator:
        parts = self.parts
        self._watch(parts.patch_proj, parts.patch_name)
        inside = {linear: block for block in parts.blocks for linear in (block.attn.qkv, block.attn.proj)}
        for block in parts.blocks:
            if block.attn.windows is not None:
                self._watch_map(block)
        readers = parts.readers
        for name, module in parts.linears.items():
            self._watch(module, name, inside.get(module), readers[name])
        for name, head in parts.heads.items():
            self._watch(head, name)
        for block in parts.blocks:
            if block.attn.norm is not None:
                self._watch_input(block.attn.norm, f"{block.name}.attn.av")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch_map(self, block: BlockParts) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            windows = block.attn.windows_of(args[0])
            assert windows is not None
            self._windows[block.name] = windows

        self._handles.append(self.parts.model.get_submodule(block.name).register_forward_pre_hook(hook))

    def _watch(
        self, module: nn.Module, name: str, attention: BlockParts | None = None, reader: nn.Module | None = None
    ) -> None:
        """``attention``: the block whose qkv or proj the module is; ``reader``: as of ``ModelParts``.

        Padding of windows counts only where the integer model's linear sees it: at a qkv that puts out codes.
        """
        image = isinstance(module, nn.Conv2d)
        whole = attention is not None and module is attention.attn.qkv

        def hook(called: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x, y = args[0].detach().float(), (out if called is module else module(args[0])).detach().float()
            windows = None if attention is None else self._windows.get(attention.name)
            if windows is not None:  # [B * W, S, C]
                x, y = (windows.scatter(t.unflatten(0, (-1, windows.count))) for t in (x, y))
                if not whole:
                    x, y = windows.crop(x), windows.crop(y)
            keep = self._keep * x.shape[0]
            if image:
                self.seen += x.shape[0]
                x, y = x.movedim(1, -1), y.movedim(1, -1)
            if attention is not None and whole:
                kept = self._whole_qkv.setdefault(name, [])
                room = ATTENTION_IMAGES - sum(len(t) for _, t in kept)
                if room > 0:
                    kept.append((windows, y[:room]))
                if not attention.attn.fused:
                    codes = torch.cat([attention.attn.merged(t, windows) for t in attention.attn.heads(y, windows)], -1)
                    self._sample(self._codes, name, codes).add(codes.flatten(0, -2), keep, self._generator)
                    if windows is not None:
                        x, y = windows.crop(x), windows.crop(y)
            self._sample(self._inputs, name, x).add(x.flatten(0, -2), keep, self._generator)
            self._sample(self._outputs, name, y).add(y.flatten(0, -2), keep if whole else 0, self._generator)

        self._handles.append((reader or module).register_forward_hook(hook))

    def _watch_input(self, module: nn.Module, name: str) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            keep = self._keep * x.shape[0]
            self._sample(self._inputs, name, x).add(x.flatten(0, -2), keep, self._generator)

        self._handles.append(module.register_forward_pre_hook(hook))

    @staticmethod
    def _sample(samples: dict[str, ChannelSample], name: str, x: Tensor) -> ChannelSample:
        if name not in samples:
            samples[name] = ChannelSample.empty(x.shape[-1], x.device)
        return samples[name]

    def stats(self) -> CalibrationStats:
        """What was seen so far.

        Raises:
            ValueError: nothing was.
        """
        if not self.seen:
            raise ValueError("calibration: at least one image must be seen, got 0")
        return CalibrationStats(
            inputs={name: sample.ranges() for name, sample in self._inputs.items()},
            output_mean={name: sample.mean for name, sample in self._outputs.items()},
            qkv={name: self._codes.get(name, self._outputs[name]).ranges() for name in self._whole_qkv},
            tau_error={f"{block.name}.attn.av": self._tau_error(block) for block in self.parts.blocks},
            images=self.seen,
            qkv_mean={name: sample.mean for name, sample in self._codes.items()},
        )

    def _tau_error(self, block: BlockParts) -> Tensor:
        """Of images of several sizes, the mean over the images."""
        kept, attn = self._whole_qkv[f"{block.name}.attn.qkv"], block.attn
        images = sum(len(tensor) for _, tensor in kept)
        errors = []
        for windows, tokens in dict.fromkeys((windows, tensor.shape[1]) for windows, tensor in kept):
            qkv = torch.cat([t for own, t in kept if (own, t.shape[1]) == (windows, tokens)])
            error = tau_errors(*attn.heads(qkv, windows), attn.softmax_scale, attn.bias_of(windows))
            errors.append(error * (len(qkv) / images))
        return torch.stack(errors).sum(0)


def image_batches(
    images: Tensor | Iterable[Tensor], batch_size: int, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """Images as a list of batches [b, C, H, W] on a device, checked: float, not empty, finite.

    Raises:
        ValueError: names the first bad image.
    """
    batches = list(images.split(batch_size) if isinstance(images, Tensor) and len(images) else images)
    seen = 0
    for batch in batches:
        if batch.dim() != 4 or not batch.is_floating_point():
            raise ValueError(f"images must be float [n, C, H, W], got {batch.dtype} {list(batch.shape)}")
        finite = torch.isfinite(batch).flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"images must be finite, got NaN or Inf in image {seen + int((~finite).nonzero()[0])}")
        seen += len(batch)
    if not seen:
        raise ValueError("images must hold at least one image, got 0")
    return [batch.to(device) for batch in batches]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationStats:
    """Runs the float model over the images and returns what it saw.

    Args:
        model: of a supported family (README, Which models), in eval mode.
        images: float [n, C, H, W], normalised as the model expects; or batches of them.
        batch_size: images a forward.
        seed: of the token sample.
        progress: called with (images done, images in all).

    Raises:
        ValueError: no images, or NaN/Inf in images or activations.
    """
    batches = image_batches(images, batch_size, model_parts(model).patch_proj.weight.device)
    total = sum(len(b) for b in batches)
    with Calibrator(model, expected_images=total, seed=seed) as calibrator:
        for batch in batches:
            calibrator.model(batch)
            if progress:
                progress(calibrator.seen, total)
    return calibrator.stats()


@torch.no_grad()
def input_covariances(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, batch_size: int = 16
) -> dict[str, Tensor]:
    """Covariance of every block linear's float input: site name to float64 [K, K].

    What an error of a weight costs at the output (``rounding.row_errors``).
    """
    parts = model_parts(model)
    batches = image_batches(images, batch_size, parts.patch_proj.weight.device)
    moments: dict[str, InputMoments] = {}
    handles = []
    for name, module in parts.linears.items():
        moment = moments[name] = InputMoments.empty(module.in_features, module.weight.device)

        def hook(_: nn.Module, args: tuple[Tensor, ...], moment: InputMoments = moment) -> None:
            moment.add(args[0].float().flatten(0, -2))

        handles.append(parts.readers[name].register_forward_pre_hook(hook))
    try:
        for batch in batches:
            parts.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: moment.covariance for name, moment in moments.items()}
