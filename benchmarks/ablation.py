"""What each ingredient of conversion is worth on the real ViT-Tiny: all of them, and all but one.

    python -m benchmarks.ablation --assets ../shared/assets

writes ``results/vit_tiny_ablation.csv`` (W4A4 and W4A8, one ingredient out at a time) and
``results/vit_tiny_softmax.csv`` (the width of the softmax code, 3 to 8 bits, at W8A8 and W4A8).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import vitq_kernels as vitq
from benchmarks.vit_tiny import RESULTS, VitTiny, write_rows
from vitq_kernels import attention_converter, site_converter
from vitq_kernels.observers import WIDTHS

# Settings that take one ingredient out.
SETTINGS: dict[str, dict[str, Any]] = {
    "all ingredients": {},
    "rounding to nearest, no GPTQ": {"gptq": False},
    "no coordinate descent": {"sweeps": 0},
    "no bias correction and no fit to the float model": {"bias_correction": False},
    "no fit to the float model": {"compensation": None},
    "class token counts as any other": {"class_token_weight": 1.0},
    "even codes after GELU": {"gelu_levels": False},
    "no channel scales after LayerNorm": {"reparam_exponent": 0.0},
    "channel-wise scales after LayerNorm": {"reparam_exponent": 1.0},
    "no channel scales after GELU": {"gelu_exponent": 0.0, "gelu_levels": False},
    "no channel scales of values": {"value_exponent": 0.0},
    "ranges that clip nothing": {"observer": "minmax"},
    "ranges of least squared error": {"observer": "mse"},
}


def unequalised(q_radius: Tensor, k_radius: Tensor, heads: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales of q and k by head alone: what ``query_key_scales`` gives without equalisation."""
    half = 2.0 ** (bits - 1) - 0.5
    q, k = ((r.view(heads, -1) * 0 + r.view(heads, -1).amax(1, keepdim=True)) / half for r in (q_radius, k_radius))
    return q.flatten().float(), k.flatten().float(), (q[:, 0] * k[:, 0]).float()


def one_step_a_layer(stats: vitq.CalibrationStats) -> vitq.CalibrationStats:
    """Statistics by which all heads of a layer take the same step tau."""
    shared = {name: error.sum(-1, keepdim=True).expand_as(error) for name, error in stats.tau_error.items()}
    return replace(stats, tau_error=shared)


# Ingredients without a setting are taken out by another function in their place.
REPLACED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "q and k not equalised": lambda: patch.object(attention_converter, "query_key_scales", unequalised),
    "class-specific channels keep their ranges": lambda: patch.object(site_converter, "CLASS_MARGIN", 1.0),
}


def ablation(vit: VitTiny, weight_bits: int, activation_bits: int) -> list[dict[str, Any]]:
    """One row an ingredient."""
    plan = vitq.BitAllocation.uniform(vit.sites, weight_bits, activation_bits)
    rows = []

    def add(label: str, config: vitq.QuantConfig, without: AbstractContextManager[Any]) -> None:
        with without:
            rows.append(vit.measure({"widths": f"W{weight_bits}A{activation_bits}", "case": label}, plan, config))

    for label, setting in SETTINGS.items():
        add(label, vitq.QuantConfig(**setting), nullcontext())
    for label, without in REPLACED.items():
        add(label, vitq.QuantConfig(), without())
    with patch.object(vit, "stats", one_step_a_layer(vit.stats)):
        add("one step of the softmax code for all heads", vitq.QuantConfig(), nullcontext())
    return rows


def softmax_widths(vit: VitTiny) -> list[dict[str, Any]]:
    """One row a width of the log2 code of attention's probabilities."""
    rows = []
    for weight_bits in (8, 4):
        uniform = vitq.BitAllocation.uniform(vit.sites, weight_bits, 8).sites
        for bits in WIDTHS[1:]:
            sites = {n: replace(s, activation=bits) if n.endswith(".av") else s for n, s in uniform.items()}
            case = {"widths": f"W{weight_bits}A8", "softmax_bits": bits}
            rows.append(vit.measure(case, vitq.BitAllocation(sites)))
    return rows


def main() -> None:
    """Measures and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder with the trained weights and the images")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vit = VitTiny(arguments.assets)
    write_rows(arguments.out / "vit_tiny_softmax.csv", softmax_widths(vit))
    write_rows(arguments.out / "vit_tiny_ablation.csv", ablation(vit, 4, 4) + ablation(vit, 4, 8))


if __name__ == "__main__":
    main()
