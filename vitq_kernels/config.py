"""How conversion quantizes, apart from the widths."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from vitq_kernels.spec import SiteKind

Observer = Literal["minmax", "percentile", "mse"]
# From this width on, a range that clips nothing beats the one of least squared error: at 8 bits the few clipped values
# are the massive activations (KL of ViT-Tiny with only fc2's input quantized .0044 against .0173, q and k .0001
# against .0056).
MINMAX_BITS = 6
LEVEL_BITS = 5  # up to this width post-GELU codes choose among levels of their own (methods.md 3)


@dataclass(frozen=True)
class QuantConfig:
    """How conversion quantizes, apart from the widths. The defaults are what measured best (methods.md)."""

    observer: Observer | None = None  # range of every activation; None: min-max from 6 bits on, least squares below
    percentile: float = 0.9999  # used by observer="percentile"
    # How far a weight's columns follow the scales of its input channels (methods.md 3), after LayerNorm, GELU,
    # attention and pooling: 1 is channel-wise, 0 per tensor. None: by the width of the activations (``exponent``).
    reparam_exponent: float | None = None
    gelu_exponent: float = 0.75
    value_exponent: float | None = None
    head_exponent: float = 0.5
    gelu_levels: bool = True  # codebooks for post-GELU activations of LEVEL_BITS and fewer
    class_token_weight: float = 8.0  # of the tokens that the classifier reads, in the second moments (methods.md 4)
    gptq: bool = True  # round weights against the calibrated inputs' second moments instead of to nearest
    sweeps: int = 3  # of coordinate descent over the rounded weights; needs gptq
    bias_correction: bool = True  # set biases so that mean outputs are the float model's
    # Ridge of the weights' least-squares fit to the float model (methods.md 4). No fit: None, or no bias_correction.
    compensation: float | None = 3.0
    reconstruction: int = 0  # iterations of block reconstruction after each block (reconstruction.py); 0: none

    def __post_init__(self) -> None:
        if self.observer is not None and self.observer not in get_args(Observer):
            raise ValueError(f"QuantConfig.observer must be one of {get_args(Observer)}, got {self.observer!r}")
        if not 0.5 < self.percentile <= 1.0:
            raise ValueError(f"QuantConfig.percentile must be in (0.5, 1], got {self.percentile!r}")
        if self.compensation is not None and not 0 < self.compensation < math.inf:
            raise ValueError(f"QuantConfig.compensation must be None or positive, got {self.compensation!r}")
        for name in ("sweeps", "reconstruction"):
            if getattr(self, name) < 0:
                raise ValueError(f"QuantConfig.{name} must not be negative, got {getattr(self, name)!r}")

    def exponent(self, kind: SiteKind, bits: int) -> float:
        """Of the input of a linear of a kind, with activations of a width.

        Wide activations have resolution to spare and leave the weights their columns; narrow ones need it all. KL
        of ViT-Tiny at W6A6: .064 with .5 for both, .059 with .75; at W4A8: .144 with .5, .157 with 1 and .75.
        """
        after_norm, value = (0.5, 0.5) if bits > 6 else (0.75, 0.75) if bits == 6 else (1.0, 0.75)
        after_norm = after_norm if self.reparam_exponent is None else self.reparam_exponent
        value = value if self.value_exponent is None else self.value_exponent
        exponents = {"patch_embed": 1.0, "qkv": after_norm, "fc1": after_norm, "reduction": after_norm, "proj": value}
        return {**exponents, "fc2": self.gelu_exponent, "head": self.head_exponent}[kind]
