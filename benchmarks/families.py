"""Which of timm's models are scored, quantized and run on the kernels: the table of docs/families.md.

    python -m benchmarks.families            # writes it; --check compares instead

Every module of timm's registry that has a model with an attention block gives a row. Where this package knows the
class, a small instance is built by timm's own entry point, scored, quantized at W8A8 and run; elsewhere the row
says what of the model stands in the way. One instance a row: the sizes are made small, the features are the name's.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import vitq_kernels as vitq
from vitq_kernels.models import FAMILY_OF, UnsupportedModelError, model_parts
from vitq_kernels.nn import (
    HiddenCodes,
    InnerNorm,
    PositionBias,
    QuantPostNormBlock,
    QuantPostNormMerging,
    QuantRmsNorm,
    QuantWindowAttention,
    QueryKeyCodes,
)

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
COLUMNAR = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 8}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4, "num_classes": 8}
# By timm's name: what makes a small model of it. These are the rows whose classes the package knows.
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": COLUMNAR,
    "deit_tiny_distilled_patch16_224": COLUMNAR,
    "deit3_small_patch16_224": COLUMNAR,
    "vit_small_patch14_dinov2": COLUMNAR,
    "vit_giant_patch14_reg4_dinov2": COLUMNAR,
    "vit_base_patch32_clip_quickgelu_224": COLUMNAR,
    "vit_base_patch16_siglip_224": COLUMNAR,
    "vit_base_patch16_siglip_gap_224": COLUMNAR,
    "vit_medium_patch16_reg4_gap_256": COLUMNAR,
    "beit3_base_patch16_224": COLUMNAR,
    "aimv2_large_patch14_224": COLUMNAR,
    "vit_wee_patch16_reg1_gap_256": COLUMNAR,
    "vit_small_patch16_18x2_224": COLUMNAR,
    "eva02_tiny_patch14_224": COLUMNAR,
    "eva02_base_patch14_224": COLUMNAR,
    "eva_giant_patch14_224": COLUMNAR,
    "vit_small_patch16_dinov3": COLUMNAR,
    "vit_pe_core_tiny_patch16_384": COLUMNAR,
    "vit_base_patch16_rope_mixed_224": COLUMNAR,
    "beit_base_patch16_224": COLUMNAR,
    "beitv2_base_patch16_224": COLUMNAR,
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
}
FLOAT_STEPS = {
    QueryKeyCodes: "norm or rotation of q and k",
    HiddenCodes: "gate or activation of the MLP",
    InnerNorm: "norm inside attention",
    QuantRmsNorm: "RMSNorm",
    QuantPostNormBlock: "norms behind attention and MLP",
    QuantPostNormMerging: "norm behind merging",
}
INTEGER_OPERANDS = {PositionBias: "bias of positions", QuantWindowAttention: "windows"}
ATTENTION = ("Attention", "Attn")
NO_ATTENTION = ("Eca", "Cbam", "LayerScale", "Squeeze", "SplitAttn", "SelectiveKernel")  # of channels of a convolution


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    module: str  # of timm.models
    example: str  # timm's name
    cls: str
    scored: str
    quantized: str
    kernels: str
    words: str  # what stays in float, or why there is no integer form

    def __str__(self) -> str:
        cells = (self.module, f"`{self.example}`", self.cls, self.scored, self.quantized, self.kernels, self.words)
        return "| " + " | ".join(cells) + " |"


class SeenOps(TorchDispatchMode):
    """The vitq ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith("vitq::"):
            self.names[function.name().removeprefix("vitq::")] = None
        return function(*args, **(kwargs or {}))


def supported_row(name: str, arguments: dict[str, Any]) -> Row:
    """Builds, scores, quantizes and runs a small model of a known class."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    module, cls = timm.models.model_entrypoint(name).__module__.rpartition(".")[2], type(model).__name__
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    try:
        scored = f"{len(vitq.relevance(model, images[:2]).flow)} sites"
    except (UnsupportedModelError, ValueError) as error:
        scored = f"no: {short(error)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            qmodel = vitq.quantize(model, images)
    except UnsupportedModelError as error:
        return Row(module, name, cls, scored, "no", "none", short(error))
    with SeenOps() as seen, torch.no_grad():
        qmodel(images)
    left = model_parts(model).left_in_float
    whole = "all" if not left else f"all but {', '.join(left)}"
    found = {type(part) for part in qmodel.modules()}
    words = [text for kind, text in FLOAT_STEPS.items() if kind in found]
    words += [f"{part}: {reason}" for part, reason in left.items()]
    operands = [text for kind, text in INTEGER_OPERANDS.items() if kind in found]
    return Row(module, name, cls, scored, whole, ", ".join([*seen.names, *operands]), "; ".join(words) or "nothing")


def refused_row(module: str) -> Row | None:
    """Of a module whose first attention model has no known class; None where it has none, or a known one."""
    for name in sorted(timm.list_models(module=module), key=lambda text: (len(text), text))[:1]:
        with torch.device("meta"):
            model = timm.create_model(name)
        blocks = attention_blocks(model)
        if not blocks or type(model).__name__ in FAMILY_OF:
            return None
        try:
            model_parts(model)
        except UnsupportedModelError:
            return Row(module, name, type(model).__name__, "no", "no", "per token", obstacles(model, blocks))
    return None


def attention_blocks(model: nn.Module) -> list[str]:
    """Names of the types of attention in a model."""
    names = dict.fromkeys(type(part).__name__ for part in model.modules())
    return [n for n in names if any(a in n for a in ATTENTION) and not any(a in n for a in NO_ATTENTION)]


def obstacles(model: nn.Module, blocks: list[str]) -> str:
    """What of a model this package has no part for."""
    found = [f"attention of type {', '.join(blocks)}"]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    if len(convolutions) > 1:
        found.append(f"{len(convolutions)} convolutions")
    widths = {m.out_features for m in model.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features}
    if len(widths) > 1:
        found.append(f"stages of {len(widths)} widths")
    return "; ".join(found)


def short(error: Exception) -> str:
    """The first clause of a message, on one line."""
    return str(error).split(";")[0].replace("|", "/").replace("\n", " ")[:120]


def page() -> str:
    """docs/families.md."""
    rows = [supported_row(name, arguments) for name, arguments in SMALL.items()]
    refused = [row for module in timm.list_modules() if (row := refused_row(module)) is not None]
    head = (
        "| timm module | example | class | scored | quantized | kernels | stays in float, or stands in the way |\n"
        "|---|---|---|---|---|---|---|"
    )
    return f"""# Which models run on integers

Made by `python -m benchmarks.families` from timm {timm.__version__}: every row of the first table is a small instance
of the example, built by timm's own entry point, scored by LRP, quantized at W8A8 and run. Products of linears and
attention are integer in all blocks that are quantized; the last column says what lies between in float, and its cost is
in the docstrings of `vitq_kernels/nn/`. Models of Hugging Face transformers are mapped to the same blocks.

{head}
{chr(10).join(map(str, rows))}

## No integer form yet

One example of every other module of timm's registry whose smallest model has an attention block. The kernels for their
linears are those of `replace_linears`, which takes any model and quantizes activations per token, without scores.

{head}
{chr(10).join(map(str, refused))}
"""


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description="Which of timm's models are scored, quantized and run on the kernels.")
    parser.add_argument("--check", action="store_true", help="compare with docs/families.md, write nothing")
    chosen = parser.parse_args(arguments)
    text = page()
    if chosen.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
