"""How much of a decision passes through each site, and through each output row of a linear: layer-wise relevance.

The model runs once in the functions of a composite (relevance_program.py), and one backward carries the relevance of
one logit from the head to the pixels. Nothing in the model is patched, hooked or changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.distributed import in_order
from vitq_kernels.fisher import FISHER, drawn_classes, log_probability_start
from vitq_kernels.lrp_rules import COMPOSITES
from vitq_kernels.models import UnsupportedModelError, model_parts, model_sites
from vitq_kernels.relevance_program import run_with_rules
from vitq_kernels.relevance_target import Target, feature_gradient
from vitq_kernels.spec import Site

Method = Literal["attnlrp", "chefer", "fisher"]
METHODS = {**COMPOSITES, FISHER.name: FISHER}
Tokens = Literal["image", "class", "all"]


@dataclass(frozen=True)
class Relevance:
    """Relevance per site, averaged over images. Every number is taken at the OUTPUT of the site.

    Sites are those of ``model_sites``: qk is the score matrix before softmax, av the attention output before ``proj``.
    """

    method: Method
    tokens: Tokens  # which tokens were counted (rows of query tokens at qk); heads have no tokens and always count
    images: int
    flow: Mapping[str, float]  # Σ|R| at the site over Σ|R| at the logits, per image (methods.md 1); fisher: Σ in nats
    mean_score: Mapping[str, float]  # mean of the signed R, over Σ_sites |mean| (D1, LRP-QViT's literal score)
    row_flow: Mapping[str, Sequence[float]]  # flow of each output row of each linear; a site's rows add up to its flow
    target: Target = "logit"  # where it started; "logits" above are then the features

    def __post_init__(self) -> None:
        _check_choice("method", self.method, tuple(METHODS))
        _check_choice("tokens", self.tokens, get_args(Tokens))
        _check_choice("target", self.target, get_args(Target))
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise ValueError(f"Relevance.images must be a positive integer, got {self.images!r}")
        object.__setattr__(self, "row_flow", {name: tuple(rows) for name, rows in self.row_flow.items()})
        if list(self.flow) != list(self.mean_score) or not set(self.row_flow) <= set(self.flow):
            raise ValueError("Relevance.flow, mean_score and row_flow must name the same sites in the same order")
        for argument, signed, values in (
            ("flow", False, self.flow.items()),
            ("mean_score", True, self.mean_score.items()),
            ("row_flow", False, ((name, value) for name, rows in self.row_flow.items() for value in rows)),
        ):
            for name, value in values:
                if not isinstance(value, float | int) or not math.isfinite(value) or (value < 0 and not signed):
                    kind = "a finite number" if signed else "a finite number >= 0"
                    raise ValueError(f"Relevance.{argument} of {name} must be {kind}, got {value!r}")

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Relevance:
        """Reads ``to_json`` text; raises ValueError that says what is wrong with it."""
        try:
            payload = {"target": "logit", **json.loads(text)}  # files from before there were others
            return cls(**{f.name: payload[f.name] for f in fields(cls)})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a relevance: {type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        of = "relevance" if self.target == "logit" else f"relevance of {self.target}"
        lines = [f"{self.method} {of}, {self.tokens} tokens, {self.images} images"]
        lines.append(f"{'site':24} {'flow':>10} {'mean score':>11} {'rows':>6} {'in top 10% of rows':>19}")
        for name, flow in self.flow.items():
            rows = sorted(self.row_flow.get(name, ()), reverse=True)
            top = f"{sum(rows[: -(-len(rows) // 10)]) / flow:.0%}" if rows and flow else "-"
            lines.append(f"{name:24} {flow:10.4g} {self.mean_score[name]:11.3g} {len(rows) or '-':>6} {top:>19}")
        return "\n".join(lines)


def relevance(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    method: Method = "attnlrp",
    batch_size: int = 16,
    tokens: Tokens = "all",
    labels: Tensor | None = None,
    target: Target = "logit",
    references: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Relevance:
    """Relevance of every site, and of every output row of every linear, for the decisions on ``images``.

    In an initialised process group the passes over the images, the same ones on every process, are shared between the
    processes (distributed.py), and every process returns the whole relevance.

    Args:
        model: of a supported family, with float32 or float64 weights, every block of which is supported. Its
            parameters, buffers, gradients, flags and hooks come back as they were; dropout is off during the run.
        images: normalised images, float [n, C, H, W], or an iterable of such batches; held in memory. Every image is
            attributed by itself: neither batches nor their order change its relevance beyond float rounding.
        method: "attnlrp" (Achtibat et al. 2024), relevance = value x modified gradient, starting from the logit; or
            "chefer" (Chefer et al. 2021, the rules LRP-QViT uses), starting from 1 at the logit; or "fisher"
            (fisher.py), (value x gradient)^2 of the log-probability of a class drawn from the prediction, in nats.
        batch_size: images of one pass, positive.
        tokens: "image" counts patch tokens, "class" the class, distillation and register tokens, "all" both. The patch
            embedding has patch tokens only.
        labels: integers [n], the class whose logit is explained; None for the model's own decision, the largest logit.
            A flow is a fraction of that logit, so a label whose logit is near 0 weighs its image heavily.
        target: what is explained: "logit", of the class above, or, for feature extractors too, "feature_norm" or
            "similarity" of the pooled feature (relevance_target.py). Heads then take no part: their flows are 0.
        references: float [n, C], for "similarity": what each feature is compared with, such as the embedding of a
            text; None for the float feature itself.
        progress: called after each pass with the images done and their total.

    Raises:
        UnsupportedModelError: a part of the model has no rule, or there is no classifier; the message names the part.
        ValueError: another argument is not as above; the message names it.
    """
    rules = METHODS[_check_choice("method", method, tuple(METHODS))]
    _check_choice("tokens", tokens, get_args(Tokens))
    parts = model_parts(model, strict=True)
    weight = parts.patch_proj.weight
    _check_choice("target", target, get_args(Target))
    if target == "logit" and not parts.heads:
        raise UnsupportedModelError(
            "head: the model has no classifier whose logit target='logit' could explain; "
            "give target='feature_norm' or 'similarity'"
        )
    if target != "logit" and (rules is FISHER or labels is not None):
        other = "labels" if labels is not None else "method 'fisher'"
        raise ValueError(f"relevance: target must be 'logit' with {other}, which are of classes, got {target!r}")
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"relevance: model must have float32 or float64 weights, got {weight.dtype}")
    if tokens == "class" and parts.prefix_tokens == 0:
        raise ValueError("relevance: tokens must be 'image' or 'all' for a model without a class token, got 'class'")
    batches = _batches(images, parts.patch_proj.in_channels, batch_size)
    count = sum(len(batch) for batch in batches)
    classes = next(iter(parts.heads.values())).out_features if parts.heads else 0
    if labels is not None:
        _check_labels(labels, count, classes)
    if references is not None:
        _check_references(references, count, target)
    sites = model_sites(model)

    def attribute(part: tuple[Tensor, Tensor | None]) -> tuple[int, _Totals]:
        batch, label = part  # a target's references travel as labels do
        totals = _Totals(sites, tokens)
        pixels = batch.detach().to(weight.device, weight.dtype, copy=True).requires_grad_()
        logits = run_with_rules(parts, rules, pixels, totals.add, features=target != "logit")
        if target != "logit":
            if label is not None and label.shape != logits.shape:
                width, got = logits.shape[1], list(label.shape)
                raise ValueError(f"relevance: references must be float [n, {width}], one an image, got a batch {got}")
            gradient = feature_gradient(logits, target, label)
            value = logits.detach() * gradient
            start = value if rules is METHODS["chefer"] else gradient
            totals.start = value.abs().sum(1).cpu()
        elif rules is FISHER:
            label = drawn_classes(logits) if label is None else label.to(weight.device).long()
            start = log_probability_start(logits, label)
            totals.start = torch.ones(len(batch))  # nats: images count by what their decisions can lose
        else:
            label = logits.argmax(1) if label is None else label.to(weight.device)
            start = F.one_hot(label.long(), classes).to(weight.dtype)
            totals.start = rules.relevance(logits.detach(), start).abs().sum(1).cpu()
        torch.autograd.grad(logits, pixels, start)  # the sites are visited on the way
        return len(batch), totals

    chosen: Sequence[Tensor | None] = [None] * len(batches)
    if (given := references if labels is None else labels) is not None:
        chosen = given.split([len(batch) for batch in batches])
    done = 0
    # A caller's no_grad, inference_mode or autocast must not reach the pass; inference_mode(False) also ends no_grad.
    with _eval_mode(parts.model), torch.inference_mode(False), torch.autocast(weight.device.type, enabled=False):
        totals = _Totals(sites, tokens)
        for size, part in in_order(list(zip(batches, chosen, strict=True)), attribute):
            totals.merge(part)
            done += size
            if progress is not None:
                progress(done, count)
    return replace(totals.result(method, count), target=target)


class _Totals:
    """Sums over images of what ``Relevance`` reports, in float64."""

    def __init__(self, sites: Sequence[Site], tokens: Tokens) -> None:
        self.tokens = tokens
        self.start = torch.empty(0)  # on the CPU [B], Σ|R| at the logits of the batch at hand
        self.flow = dict.fromkeys((site.name for site in sites), 0.0)
        self.mean = dict(self.flow)
        self.rows = {site.name: torch.zeros(site.rows, dtype=torch.float64) for site in sites if site.has_weight}

    def add(self, name: str, relevance: Tensor, prefix: int) -> None:
        if relevance.ndim > 2 and self.tokens != "all":
            counted = slice(prefix, None) if self.tokens == "image" else slice(0, prefix)
            relevance = relevance[..., counted, :]
        rows = relevance.abs().flatten(1, -2).sum(1) if relevance.ndim > 2 else relevance.abs()
        start = self.start[:, None].double()
        flow = torch.where(start > 0, rows.double().cpu() / start, 0.0).sum(0)
        self.flow[name] += float(flow.sum())
        if name in self.rows:
            self.rows[name] += flow
        if relevance.numel():  # no class token among the patches: 0
            self.mean[name] += float(relevance.flatten(1).mean(1).double().sum())

    def merge(self, other: _Totals) -> None:
        for name, flow in other.flow.items():
            self.flow[name] += flow
            self.mean[name] += other.mean[name]
        for name, rows in other.rows.items():
            self.rows[name] += rows

    def result(self, method: Method, images: int) -> Relevance:
        scale = sum(abs(value) for value in self.mean.values()) or 1.0
        return Relevance(
            method,
            self.tokens,
            images,
            {name: value / images for name, value in self.flow.items()},
            {name: value / scale for name, value in self.mean.items()},
            {name: tuple((rows / images).tolist()) for name, rows in self.rows.items()},
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def _check_choice(argument: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"relevance: {argument} must be one of {choices}, got {value!r}")
    return str(value)


def _check_references(references: Tensor, count: int, target: Target) -> None:
    if target != "similarity":
        raise ValueError(f"relevance: references are for target 'similarity', got target {target!r}")
    if not references.is_floating_point() or references.ndim != 2 or len(references) != count:
        got = f"{references.dtype} {list(references.shape)}"
        raise ValueError(f"relevance: references must be float [{count}, C], one an image, got {got}")


def _check_labels(labels: Tensor, count: int, classes: int) -> None:
    if labels.is_floating_point() or labels.shape != (count,):
        got = f"{labels.dtype} {list(labels.shape)}"
        raise ValueError(f"relevance: labels must be integers [{count}], one an image, got {got}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"relevance: labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")


def _batches(images: Tensor | Iterable[Tensor], channels: int, batch_size: int) -> list[Tensor]:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"relevance: batch_size must be a positive integer, got {batch_size!r}")
    result = []
    for index, batch in enumerate([images] if isinstance(images, Tensor) else images):
        name = "images" if isinstance(images, Tensor) else f"images[{index}]"
        if not isinstance(batch, Tensor) or not batch.is_floating_point() or batch.shape[1:-2] != (channels,):
            got = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(f"relevance: {name} must be a float tensor [n, {channels}, H, W], got {got}")
        if not bool(torch.isfinite(batch).all()):
            raise ValueError(f"relevance: {name} must be finite, got NaN or Inf")
        result += [part for part in batch.split(batch_size) if len(part)]
    if not result:
        raise ValueError("relevance: images must hold at least one image, got none")
    return result
