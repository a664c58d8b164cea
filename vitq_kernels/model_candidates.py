"""What a quantized model is measured against: the float model in other precisions, eager, compiled, captured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitq_kernels.capture import capture
from vitq_kernels.nn import fuse_layernorm

OURS, OURS_FUSED = "ours", "ours_fused"  # the latter with ``fuse_layernorm``
OWN = (OURS, OURS_FUSED)
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EAGER, COMPILED, MAX_AUTOTUNE, CAPTURED = "eager", "compiled", "max-autotune", "captured"
WAYS = (EAGER, COMPILED, MAX_AUTOTUNE, CAPTURED)
WARM_UP = 3  # the third call of max-autotune is the first that replays its graph
# What is measured where nothing is asked for. A GPU deploys half precision, compiled and in a graph.
AGAINST = {
    "cpu": ("float32", "bfloat16"),
    "cuda": (
        *("ours-captured", "float32", "bfloat16", "float16", "float16-compiled", "float16-max-autotune"),
        "float16-captured",
    ),
}


class CannotRunError(RuntimeError):
    """A candidate that does not run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """A model in a precision, run in a way: ``float16-compiled``; ``float16`` alone is eager."""

    precision: str  # of OWN or PRECISIONS
    way: str = EAGER

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """Raises ValueError for a name that is none."""
        precision, dash, way = name.partition("-")
        way = way if dash else EAGER
        if precision not in (*OWN, *PRECISIONS) or way not in WAYS:
            ways = ", ".join(f"-{way}" for way in WAYS[1:])
            raise ValueError(
                f"a candidate must be {', '.join((*OWN, *PRECISIONS))}, or one of these with {ways}, got {name!r}"
            )
        return cls(precision, way)

    def __str__(self) -> str:
        return self.precision if self.way == EAGER else f"{self.precision}-{self.way}"

    @property
    def is_own(self) -> bool:
        """Whether it is the quantized model."""
        return self.precision in OWN

    def dtype(self, device: str) -> torch.dtype:
        """Of images and residual stream; ours is that of a deployed model, float16 on a GPU."""
        if self.is_own:
            return torch.float16 if torch.device(device).type == "cuda" else torch.float32
        return PRECISIONS[self.precision]

    def build(self, qmodel: nn.Module, float_model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        """A forward of these images [b, C, H, W], warm: compiled and captured before it returns.

        The model is a copy. What is compiled is compiled for this batch alone, as one deploys it.

        Raises:
            CannotRunError: this way cannot run here, or the compiler fails.
        """
        try:
            device = str(images.device)
            original = qmodel if self.is_own else float_model
            model = copy.deepcopy(original).to(device, self.dtype(device)).eval()
            if not fuse_layernorm(model, self.precision == OURS_FUSED) and self.precision == OURS_FUSED:
                raise CannotRunError("the model has no LayerNorm behind a projection to the residual stream")
            run, given = self._made(model, len(images), device), images.to(self.dtype(device))

            def forward() -> Tensor:
                with torch.inference_mode():
                    result: Tensor = run(given)
                return result

            for _ in range(WARM_UP):
                forward()
        except RuntimeError as error:  # a compiler that fails, an op that a device lacks, out of memory
            lines = str(error).splitlines() or [type(error).__name__]
            raise CannotRunError(lines[0][:300]) from error
        return forward

    def _made(self, model: nn.Module, batch: int, device: str) -> Callable[[Tensor], Tensor]:
        if self.way == CAPTURED:
            return captured(model, batch, device)
        if self.way == EAGER:
            return model
        mode = "max-autotune" if self.way == MAX_AUTOTUNE else "default"
        compiled: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True, dynamic=False, mode=mode)
        return compiled


def captured(model: nn.Module, batch: int, device: str) -> Callable[[Tensor], Tensor]:
    """The model in a CUDA graph of one batch."""
    if torch.device(device).type != "cuda":
        raise CannotRunError("CUDA graphs need a GPU")
    return capture(model, batch_sizes=(batch,))


def with_random_weights(model: nn.Module, seed: int) -> nn.Module:
    """The model, its weights set to ordinary numbers in place: of uninitialised ones some may be slow or not finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm) and module.weight is not None:
                module.weight.fill_(1.0)
    return model
