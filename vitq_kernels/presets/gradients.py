"""Inputs of a float model's sites with how much each output matters: the diagonal Fisher information (PTQ4ViT)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitq_kernels.presets.float_stream import MATMUL_PARTS, tokens_of
from vitq_kernels.presets.preset import Widths
from vitq_kernels.presets.token_sample import sample_tokens


@dataclass
class LinearView:
    """A linear on some of its tokens; the extremes are over all."""

    x: Tensor  # [T, K]
    importance: Tensor  # [T, N], squared gradients of its outputs times the tokens that one stands for
    largest: Tensor  # [], largest magnitude
    highest: Tensor  # [], largest number


@dataclass
class MatmulView:
    """A product ``first second^T`` of attention on some images; the extremes are over all."""

    first: Tensor  # [B, H, T, K]
    second: Tensor  # [B, H, N, K]
    importance: Tensor  # [B, H, T, N], squared gradients of its elements
    largest_first: Tensor  # [H], largest magnitude
    largest_second: Tensor  # [H]


@dataclass
class _Seen:
    """What hooks collected of a place."""

    kept: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # of tokens
    gradients: list[Tensor] = field(default_factory=list)
    largest: list[Tensor] = field(default_factory=list)  # of each batch, per head where there are heads
    highest: list[Tensor] = field(default_factory=list)


def own_prediction_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """``-sum log p(y)`` with a label y drawn from the prediction p itself, one an image.

    The square of its gradient is in the mean the diagonal Fisher information, which is the (Gauss-Newton) Hessian of
    the divergence from the prediction. PTQ4ViT's code takes the gradient of that divergence at its minimum, which is
    zero but for float32's rounding.
    """
    labels = torch.multinomial(logits.detach().float().softmax(-1).cpu(), 1, generator=generator)
    return -logits.log_softmax(-1).gather(1, labels.to(logits.device)).sum()


def observe(
    model: nn.Module,
    widths: Widths,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    *,
    tokens: int,
    attention_images: int,
) -> tuple[dict[str, LinearView], dict[str, MatmulView], dict[str, MatmulView]]:
    """Runs a simulated model without quantizers forward and backward over the images.

    Args:
        model: simulated.
        widths: whose places are looked at.
        batches: calibration images.
        generator: draws labels and tokens.
        tokens: kept of every linear, about.
        attention_images: kept of every attention.

    Returns:
        Linears by site; the scores ``q k^T`` and the outputs ``p v`` by attention, as ``blocks.0.attn``.
    """
    images = sum(len(batch) for batch in batches)
    seen = {place: _Seen() for place in widths.activations}
    hooks = []
    for place, view in list(seen.items()):
        site, _, part = place.rpartition(".")
        if part in MATMUL_PARTS:
            hooks.append(model.get_submodule(place).register_forward_hook(_whole_images(view, attention_images)))
        else:
            hook = _some_tokens(view, tokens / images, generator)
            hooks.append(model.get_submodule(site).register_forward_hook(hook))
        if place.endswith("attn.proj.input"):
            seen[f"{site} out"] = _Seen()  # what leaves the second matmul enters proj
            hooks.append(
                model.get_submodule(place).register_forward_hook(_whole_images(seen[f"{site} out"], attention_images))
            )
    try:
        with torch.enable_grad():
            for batch in batches:
                own_prediction_loss(model(batch.clone().requires_grad_()), generator).backward()
    finally:
        for hook in hooks:
            hook.remove()
    return _views(model, widths, seen)


def _some_tokens(view: _Seen, an_image: float, generator: torch.Generator) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        x = arguments[0].detach()
        flat = tokens_of(module, x)
        some = sample_tokens(flat, max(1, round(an_image * len(x))), generator)
        view.kept.append(flat[some.rows])
        view.weights.append(some.weights)
        view.largest.append(x.abs().max())
        view.highest.append(x.max())
        of_patches = out.dim() == 4
        out.register_hook(
            lambda g: view.gradients.append((g.flatten(2).mT if of_patches else g).flatten(0, -2)[some.rows])
        )

    return hook


def _whole_images(view: _Seen, images: int) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        x = arguments[0].detach()
        wanted = images - sum(len(t) for t in view.kept)
        view.largest.append(x.abs().amax([d for d in range(x.dim()) if d != 1]))
        if wanted > 0:
            view.kept.append(x[:wanted])
            out.register_hook(lambda g: view.gradients.append(g[:wanted]))

    return hook


def _views(
    model: nn.Module, widths: Widths, seen: dict[str, _Seen]
) -> tuple[dict[str, LinearView], dict[str, MatmulView], dict[str, MatmulView]]:
    linears, scores, outputs = {}, {}, {}
    for site in widths.linears:
        view = seen[f"{site}.input"]
        importance = torch.cat(view.gradients).square() * torch.cat(view.weights)[:, None]
        linears[site] = LinearView(
            torch.cat(view.kept), importance, torch.stack(view.largest).max(), torch.stack(view.highest).max()
        )
    for place in widths.probabilities:
        name = place.rpartition(".")[0]
        q, k, v, p = (seen[f"{name}.{part}"] for part in MATMUL_PARTS)
        query, key, value, probability = (torch.cat(part.kept) for part in (q, k, v, p))
        attention = model.get_submodule(name)
        g = torch.cat(p.gradients)
        of_scores = probability * (g - (g * probability).sum(-1, keepdim=True)) * attention.softmax_scale
        of_outputs = torch.cat(seen[f"{name}.proj out"].gradients).unflatten(-1, (attention.num_heads, -1))
        most = [torch.stack(part.largest).amax(0) for part in (q, k, p, v)]
        scores[name] = MatmulView(query, key, of_scores.square(), most[0], most[1])
        outputs[name] = MatmulView(probability, value.mT, of_outputs.transpose(1, 2).square(), most[2], most[3])
    return linears, scores, outputs
