"""Measures sensitivities: the simulated model runs again and again, each time with one site, or two, at another width.

What lies before the first changed block is the same in all those runs, so it is computed once: only the tokens that
enter the block at hand are kept, and every run starts there.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from vitq_kernels.calibration import image_batches
from vitq_kernels.config import QuantConfig
from vitq_kernels.distributed import in_order
from vitq_kernels.models import AttentionParts, answer, model_parts
from vitq_kernels.sensitivity import Part, Sensitivity, check_candidates
from vitq_kernels.sensitivity_cache import Changes, MeasurementCache, fingerprint
from vitq_kernels.sensitivity_quantizers import SiteForm, SiteQuantizers
from vitq_kernels.simulation import simulated
from vitq_kernels.spec import MAX_BITS, MIN_BITS, Site, check_bits


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    part: Part = "weight",
    baseline: int | None = MAX_BITS,
    candidates: Sequence[int] = tuple(range(MIN_BITS, MAX_BITS + 1)),
    sites: Sequence[str] | None = None,
    pairs: bool = False,
    pair_candidates: Sequence[int] = (2, 3, 4),
    config: QuantConfig | None = None,
    batch_size: int = 16,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """Mean KL(float, quantized) on unlabelled images with one site of the blocks at a time at every candidate width.

    Sites compute in float what conversion would make of them (sensitivity_quantizers.py); ranges and covariances are
    those of the same images in the float model. At the baseline's own width nothing is measured: it is the baseline.
    In an initialised process group the runs are shared between the processes (distributed.py).

    Args:
        model: of a supported family, with float32 or float64 weights, every block of which is supported. It is left as
            it is.
        images: normalised images, float [n, C, H, W], or batches of them; held in memory.
        part: "weight": sites are the linears of the blocks, activations stay float. "activation": every site of the
            blocks, weights stay float; a linear quantizes its input, qk the codes of q, k and v, av the log2 codes of
            the probabilities. "both": every site of the blocks, weight and activation at the same width.
        baseline: width of that part at the other sites of the blocks; patch embedding and head then have 8 bits. None:
            all other sites stay float.
        candidates: widths in 2..8, rising.
        sites: names of the sites to measure; None for all that the part has.
        pairs: also measure every pair of those sites in the same block (methods.md 2.3), at ``pair_candidates``.
        pair_candidates: some of the candidates. Runs grow with the square of their number, and interactions are
            largest at the narrow widths.
        config: how conversion quantizes.
        batch_size: images of one pass.
        cache: a file that keeps every measurement as soon as it is made. A later call with the same model, images and
            settings goes on from it, also with other candidates, sites or pairs.
        progress: called with (runs done, runs in all), those of the cache included.

    Raises:
        UnsupportedModelError: a part of the model has no integer form; the message names the part.
        ValueError: an argument is not as above, or ``cache`` holds other measurements; the message names it.
    """
    if part not in get_args(Part):
        raise ValueError(f"sensitivity: part must be one of {get_args(Part)}, got {part!r}")
    if baseline is not None:
        check_bits(baseline, "sensitivity: baseline")
    candidates = check_candidates("sensitivity: candidates", candidates)
    pair_candidates = check_candidates("sensitivity: pair_candidates", pair_candidates) if pairs else ()
    if not set(pair_candidates) <= set(candidates):
        raise ValueError(f"sensitivity: pair_candidates must be among candidates {candidates}, got {pair_candidates}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"sensitivity: batch_size must be a positive integer, got {batch_size!r}")
    parts = model_parts(model, strict=True)
    weight = parts.patch_proj.weight
    if weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"sensitivity: model must have float32 or float64 weights, got {weight.dtype}")
    chosen = _chosen_sites(parts.sites, part, sites)
    batches = [batch.to(weight.dtype) for batch in image_batches(images, batch_size, weight.device)]
    config = config or QuantConfig()
    heads = [_attention_settings(block.attn) for block in parts.blocks]
    measured = MeasurementCache(cache, fingerprint(model, batches, f"{part} {baseline} {config} {heads}"))

    def changes(*widths: tuple[Site, int]) -> Changes:
        return tuple((site.name, bits) for site, bits in widths if bits != baseline)

    blocks = [[site for site in step.sites if site in chosen] for step in parts.steps]
    neighbours = [pair for members in blocks for pair in combinations(members, 2)] if pairs else []
    runs = [changes()] if baseline is not None else []
    for members in blocks:  # in forward order, so that the tokens before the block move on with the runs
        runs += [changes((site, bits)) for site in members for bits in candidates]
        for a, b in neighbours:
            if a in members:
                runs += [changes((a, i), (b, j)) for i in pair_candidates for j in pair_candidates]
    runs = list(dict.fromkeys(runs))
    todo = [run for run in runs if run not in measured.known]
    if progress:
        progress(len(runs) - len(todo), len(runs))
    if todo:
        bench = _Bench(model, batches, part, baseline, config)
        for done, (run, kl) in enumerate(in_order(todo, lambda run: (run, bench.kl(run))), start=1):
            measured.add(run, kl)
            if progress:
                progress(len(runs) - len(todo) + done, len(runs))
    known = measured.known if baseline is not None else {**measured.known, (): 0.0}
    tables: dict[str, dict[str, tuple[tuple[float, ...], ...]]] = {}
    for a, b in neighbours:
        table = tuple(tuple(known[changes((a, i), (b, j))] for j in pair_candidates) for i in pair_candidates)
        tables.setdefault(a.name, {})[b.name] = table
    return Sensitivity(
        part,
        baseline,
        candidates,
        sum(len(batch) for batch in batches),
        known[()],
        {site.name: tuple(known[changes((site, bits))] for bits in candidates) for site in chosen},
        pair_candidates,
        tables,
    )


def _chosen_sites(sites: Sequence[Site], part: Part, names: Sequence[str] | None) -> list[Site]:
    """Sites of the blocks that have the part, in forward order."""
    able = [site for site in sites if site.in_block and (site.has_weight or part != "weight")]
    if names is None:
        return able
    if unknown := [name for name in names if name not in {site.name for site in able}]:
        raise ValueError(f"sensitivity: sites must be sites of the blocks with a {part} width, got {unknown[:3]}")
    return [site for site in able if site.name in names]


class _Bench:
    """The simulated model at the baseline, its sites' forms, and the tokens that enter the block at hand."""

    def __init__(
        self, model: nn.Module, batches: list[Tensor], part: Part, baseline: int | None, config: QuantConfig
    ) -> None:
        model = copy.deepcopy(model).requires_grad_(False).eval()
        self.model = simulated(model)
        parts = model_parts(model)
        self.sites = {site.name: site for site in parts.sites}
        self.step_of = {site.name: i for i, step in enumerate(parts.steps) for site in step.sites}
        self.reference = [answer(self.model, batch).double().log_softmax(-1) for batch in batches]
        self.quantizers = SiteQuantizers(model, batches, part, config)
        self.baseline: dict[str, SiteForm] = {}
        for name, site in self.sites.items():
            bits = baseline if site.in_block or baseline is None else MAX_BITS
            self.baseline[name] = self.quantizers.form(site, bits)
            self.baseline[name].put(name, self.model)
        # The program of the parts, on the copy's modules.
        self.parts = replace(self.quantizers.parts, model=self.model)
        self.tokens = [self.parts.tokens(batch) for batch in batches]
        self.steps = [self.parts.called(step) for step in parts.steps]
        self.step = 0  # which step they enter
        self.forms: dict[tuple[str, int], SiteForm] = {}  # of the sites of that step, as far as made

    def kl(self, changes: Changes) -> float:
        """Mean KL of the model with these sites at these widths. Steps of later calls must not come before."""
        first = self.step_of[changes[0][0]] if changes else 0
        while self.step < first:
            self.tokens = [self.steps[self.step](tokens) for tokens in self.tokens]
            self.step += 1
            self.forms.clear()
        for name, bits in changes:
            if (name, bits) not in self.forms:
                self.forms[name, bits] = self.quantizers.form(self.sites[name], bits)
            self.forms[name, bits].put(name, self.model)
        total = 0.0
        for tokens, reference in zip(self.tokens, self.reference, strict=True):
            for step in self.steps[first:]:
                tokens = step(tokens)
            answer = self.parts.logits(tokens).double().log_softmax(-1)
            total += float((reference.exp() * (reference - answer)).sum())
        for name, _ in changes:
            self.baseline[name].put(name, self.model)
        return total / sum(len(reference) for reference in self.reference)


def _attention_settings(attn: AttentionParts) -> tuple[object, ...]:
    """What of an attention neither weights nor names tell."""
    scale, bias = attn.softmax_scale, attn.bias_table
    return (
        attn.num_heads,
        scale.flatten().tolist() if isinstance(scale, Tensor) else scale,
        *filter(None, [attn.windows]),
        # of Swin V2, made for the windows of its pretraining
        *([] if bias is None else [hashlib.sha256(bias.detach().cpu().contiguous().numpy().tobytes()).hexdigest()]),
    )
