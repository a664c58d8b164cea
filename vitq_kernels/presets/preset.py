"""What a published method is here: its name and paper, how it sets a simulated model up, and what it left open."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitq_kernels.spec import BitAllocation, Site

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Widths:
    """The widths that a method gives to sites, as numbers and tensors."""

    allocation: BitAllocation

    def weight(self, site: str) -> Tensor:
        """Width of every output row, int64 [N], rows in the model's order."""
        groups = self.allocation.sites[site].weight
        assert groups is not None, site
        return torch.tensor(groups.row_bits())

    def activation(self, site: str) -> int:
        """Width of a linear's input; of q, k and v at ``.qk``; of the attention probabilities at ``.av``."""
        return self.allocation.sites[site].activation

    @property
    def linears(self) -> tuple[str, ...]:
        """Sites with weights, in forward order: linears, the patch embedding, heads."""
        return tuple(name for name, site in self.allocation.sites.items() if site.weight is not None)

    @property
    def activations(self) -> dict[str, int]:
        """Every activation quantizer of a simulated model, by module name, to its width.

        ``blocks.0.attn.qkv.input``, ``blocks.0.attn.query``, ``.key``, ``.value``, ``.probability``, ...
        """
        places = {f"{name}.input": self.activation(name) for name in self.linears}
        for name, site in self.allocation.sites.items():
            attention, _, matmul = name.rpartition(".")
            if matmul == "qk":
                places |= {f"{attention}.{part}": site.activation for part in ("query", "key", "value")}
            elif matmul == "av":
                places[f"{attention}.probability"] = site.activation
        return places

    @property
    def probabilities(self) -> dict[str, int]:
        """The part of ``activations`` that quantizes attention probabilities."""
        return {place: bits for place, bits in self.activations.items() if place.endswith(".probability")}

    @property
    def post_norms(self) -> dict[str, str]:
        """Linears that read a LayerNorm inside a block to that norm: qkv and fc1 of every block."""
        ends = {"attn.qkv": "norm1", "mlp.fc1": "norm2"}
        return {
            name: name.removesuffix(end) + norm
            for name in self.linears
            for end, norm in ends.items()
            if name.endswith(end)
        }


# (simulated model, calibration batches on the model's device, widths, random numbers, progress): sets the model's
# quantizers and weights in place, under no_grad.
Apply = Callable[[nn.Module, list[Tensor], Widths, torch.Generator, Progress], None]


@dataclass(frozen=True)
class Preset:
    """A published method of post-training quantization in float simulation."""

    name: str  # "repq-vit"
    paper: str  # authors, venue, arXiv number, and the code that was read, if any
    apply: Apply
    calibration_images: int  # what the paper's experiments use; at most so many are taken
    levels: str  # how many levels its b-bit quantizers really have
    why_simulated: str  # what of it the integer kernels cannot execute
    completed: tuple[str, ...] = ()  # what could not be read or is left open, and what stands there now
    executes: str = "simulated"


@dataclass(frozen=True)
class Simulation:
    """What ``simulate`` did to a model; the model carries it as ``model.simulation``."""

    method: str
    paper: str
    weight_bits: int | None  # None where an allocation gave the widths
    activation_bits: int | None
    levels: str
    why_simulated: str
    completed: tuple[str, ...]
    calibration_images: int  # really used
    seed: int
    model_config: Mapping[str, Any]  # of models.model_config
    allocation: BitAllocation
    sites: tuple[Site, ...]
    executes: str = "simulated"

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights in float32."""
        return 4 * sum(site.rows * site.cols for site in self.sites)

    def to_json(self) -> str:
        """JSON text that ``from_json`` reads back to an equal object."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__}
        data["allocation"] = json.loads(self.allocation.to_json())
        data["sites"] = [asdict(site) for site in self.sites]
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Simulation:
        """Reads ``to_json`` text; raises ValueError that says what is wrong with it."""
        try:
            data = json.loads(text)
            data["completed"] = tuple(data["completed"])
            data["allocation"] = BitAllocation.from_json(json.dumps(data["allocation"]))
            data["sites"] = tuple(Site(**site) for site in data["sites"])
            return cls(**data)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a simulation: {type(error).__name__}: {error}") from error
