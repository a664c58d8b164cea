"""Where relevance starts: a class's logit, or what a feature extractor says, which has no classes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Target = Literal["logit", "feature_norm", "similarity"]


def feature_gradient(features: Tensor, target: Target, references: Tensor | None) -> Tensor:
    """Gradient [B, C] of the target by the features [B, C], the pooled ones that a classifier would read.

    "feature_norm" is ``|f|``, with gradient ``f / |f|`` (0 at 0). "similarity" is ``f . r`` with a constant r, a row of
    ``references`` [B, C], or the feature itself without them: the model's similarity to its own float feature. Value
    times gradient adds up to the target in both. Without references the two differ by a factor an image alone, so that
    flows, which are fractions of the start, are the same; the mean scores weigh images by it.
    """
    f = features.detach()
    if target == "similarity":
        return f if references is None else references.to(f.device, f.dtype)
    norm = f.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, f / norm, 0.0)
