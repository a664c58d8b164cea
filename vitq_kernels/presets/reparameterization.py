"""RepQ-ViT's scale reparameterization, and the calibration around it that the methods built on RepQ-ViT share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from vitq_kernels.presets.capture import Fit, fit_in_forward_order
from vitq_kernels.presets.preset import Progress, Widths
from vitq_kernels.presets.quantizers import Uniform
from vitq_kernels.presets.ranges import PERCENTILES, percentile_affine
from vitq_kernels.presets.weights import asymmetric_rows

# (activations [..., C], float weight [N, C], widths of its rows, activation width) to a quantizer per channel
ChannelFit = Callable[[Tensor, Tensor, Tensor, int], Uniform]


def per_tensor(x: Tensor, bits: int) -> Uniform:
    """Asymmetric, one range for the tensor, of RepQ-ViT's percentiles."""
    return Uniform(*percentile_affine(x.flatten(), bits), 0, 2**bits - 1)


def per_channel(x: Tensor, weight: Tensor, row_bits: Tensor, bits: int) -> Uniform:
    """Asymmetric, a range for every channel of x [..., C], of RepQ-ViT's percentiles; the weight is not looked at."""
    return Uniform(*percentile_affine(x.flatten(0, -2).mT.contiguous(), bits), 0, 2**bits - 1)


def fold_channel_scales(
    norm: nn.Module, linear: nn.Module, quantizer: Uniform, scale: Tensor, zero_point: Tensor
) -> None:
    """Moves a quantizer's channels into a LayerNorm and the linear that reads it, and leaves one scale for all.

    With ``r1 = s / s~`` and ``r2 = z - z~``: ``gamma / r1``, ``(beta + s r2) / r1``, ``W r1``, ``b - W (s r2)``. In
    float the function is unchanged; with an integer ``z~`` the codes of the new activations under (s~, z~) are those of
    the old ones under (s, z). Source: RepQ-ViT (arXiv:2212.08254), equations in methods.md 1.4.

    Args:
        norm: with weight and bias [C].
        linear: simulated, its weight [N, C] in float.
        quantizer: scale s and zero point z, each [C].
        scale: s~, [].
        zero_point: z~, []; need not be an integer.
    """
    ratio = (quantizer.scale / scale).double()
    shift = quantizer.scale.double() * (quantizer.zero_point.double() - zero_point.double())
    weight = linear.weight.double()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.double()
    norm.bias.copy_((norm.bias.double() + shift) / ratio)
    norm.weight.copy_(norm.weight.double() / ratio)
    linear.bias = (bias - weight @ shift).to(linear.weight.dtype)
    linear.weight = (weight * ratio).to(linear.weight.dtype)
    linear.input = Uniform(scale, zero_point, quantizer.qmin, quantizer.qmax)


def calibrate_reparameterized(
    model: nn.Module,
    batches: Sequence[Tensor],
    widths: Widths,
    progress: Progress,
    *,
    probabilities: Mapping[str, Fit],
    channels: ChannelFit = per_channel,
    target: Callable[[Tensor], Tensor] = torch.mean,
    percentiles: Sequence[float] = PERCENTILES,
    float_places: Sequence[str] = (),
) -> None:
    """RepQ-ViT's order: weights and activations quantized in one forward, norms folded, folded weights rounded again.

    Args:
        model: simulated; its weights are float.
        batches: calibration images, run as one batch.
        widths: of every site.
        progress: called for every fitted quantizer.
        probabilities: fits of the quantizers of softmax's output, by place.
        channels: fits the quantizer after a LayerNorm, per channel.
        target: of the channels' scales and zero points [C], the one of the tensor [].
        percentiles: candidate ranges of the weights.
        float_places: activation quantizers that stay identities.
    """
    exact = {name: model.get_submodule(name).weight.clone() for name in widths.linears}

    def round_weights(names: Sequence[str]) -> None:
        for name in names:
            linear = model.get_submodule(name)
            linear.weight = asymmetric_rows(linear.weight, widths.weight(name), percentiles)

    fits = dict(probabilities)
    for place, bits in widths.activations.items():
        site = place.removesuffix(".input")
        if site in widths.post_norms:
            fits[place] = partial(channels, weight=exact[site], row_bits=widths.weight(site), bits=bits)
        elif place not in fits and place not in float_places:
            fits[place] = partial(per_tensor, bits=bits)
    round_weights(widths.linears)
    fit_in_forward_order(model, fits, batches, progress)
    for site, norm in widths.post_norms.items():
        linear = model.get_submodule(site)
        linear.weight = exact[site]
        quantizer = linear.input
        fold_channel_scales(
            model.get_submodule(norm), linear, quantizer, target(quantizer.scale), target(quantizer.zero_point)
        )
    round_weights(tuple(widths.post_norms))
