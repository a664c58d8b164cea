"""What the families of Hugging Face transformers share: a trunk inside a model, cut into blocks of timm."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitq_kernels.models.hf_layers import LayerNames, LayerOfBlock, timm_block, twin
from vitq_kernels.models.parts import FloatStep, ModelParts, Step, UnsupportedModelError
from vitq_kernels.models.timm_layers import classifiers
from vitq_kernels.models.vit import block_parts, why_no_block


@dataclass(frozen=True)
class HfParts(ModelParts):
    """A vision model of transformers, its layers in timm's form; tokens are [B, S, C].

    ``model`` is no model of the caller's: a twin of it, whose layers were replaced, on the same parameters.
    """

    float_is_described: ClassVar[bool] = True

    trunk_name: str = ""  # of the module with embeddings and layers; "" for the model itself

    @property
    def trunk(self) -> nn.Module:
        """The module with embeddings and layers."""
        return self.model.get_submodule(self.trunk_name)

    def tokens(self, images: Tensor) -> Tensor:
        """Of the base class."""
        return self.norms["norm_pre"](self.trunk.embeddings(images))

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the base class."""
        norms = self.norms
        inputs = {name: norms["fc_norm"](x) for name, x in self.head_inputs(norms["norm"](tokens)).items()}
        outputs = [self.model.get_submodule(name)(x) if name in self.heads else x for name, x in inputs.items()]
        return sum(outputs) / len(outputs) if len(outputs) > 1 else outputs[0]

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Of the base class."""
        none = nn.Identity()
        return {"patch_embed.norm": none, "norm_pre": none, "norm": self.trunk.layernorm, "fc_norm": none}

    @property
    @abstractmethod
    def fixed_size(self) -> bool:
        """True if forward without further arguments takes images of the model's own size alone."""

    def pixels(self, images: Tensor) -> Tensor:
        """Of the base class."""
        size, own = tuple(images.shape[-2:]), pair(self.trunk.config.image_size)
        if self.fixed_size and size != own:
            raise ValueError(f"images must be {own} pixels for this model, got {size}")
        return images

    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of the base class."""
        tokens = [token.expand(len(patches), 1, -1) for token in self.prefix()]
        return self.add_positions(torch.cat([*tokens, patches], dim=1), grid)

    @abstractmethod
    def prefix(self) -> Sequence[Tensor]:
        """The tokens before the patches, each [C] or with dimensions of 1 in front."""

    @abstractmethod
    def add_positions(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens [B, S, C] of a ``grid`` of (rows, columns) of patches, and their position embeddings."""

    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Of the base class."""
        return dict.fromkeys(self.heads or ("features",), tokens[:, 0])


def pair(size: Any) -> tuple[int, int]:
    """(rows, columns) of a size in a config, which may be one number for both."""
    rows, columns = size if isinstance(size, Sequence) else (size, size)
    return rows, columns


def cut_trunk(
    kind: type[HfParts],
    model: nn.Module,
    trunk_name: str,
    *,
    layers: str,
    patch: str,
    names: LayerNames,
    layer_class: type[LayerOfBlock],
    heads: Sequence[str] = (),
    left: Mapping[str, str] | None = None,
    prefix_tokens: int = 1,
    read_tokens: int = 1,
) -> HfParts:
    """Parts of a twin of ``model`` whose layers are blocks of timm; of the model itself if it is such a twin.

    Args:
        kind: class of the parts.
        model: of transformers.
        trunk_name: of the trunk in the model.
        layers: name of the list of layers in the trunk.
        patch: name of the patch convolution in the trunk.
        names: where the modules of a layer are.
        layer_class: what holds a block in place of a layer.
        heads: names of classifiers in the model.
        left: further parts that stay in float, and why.
        prefix_tokens, read_tokens: as of ``ModelParts``.

    Raises:
        UnsupportedModelError: the model is not laid out as in the transformers that is known, or its patch embedding
            has no integer form.
    """
    conv = model.get_submodule(trunk_name).get_submodule(patch)
    if type(conv) is not nn.Conv2d or conv.stride != conv.kernel_size or any(_padding(conv)) or conv.groups != 1:
        raise UnsupportedModelError(f"{patch} must be a Conv2d over whole patches, got {conv}")
    trunk_prefix = f"{trunk_name}." if trunk_name else ""
    paths = [f"{trunk_prefix}{layers}.{i}" for i in range(len(model.get_submodule(f"{trunk_prefix}{layers}")))]
    if not all(isinstance(model.get_submodule(path), LayerOfBlock) for path in paths):
        model = twin(model)
        for path in paths:
            model.set_submodule(path, layer_class(timm_block(path, model.get_submodule(path), names)))
    trunk = model.get_submodule(trunk_name)
    trunk.get_submodule(patch).padding = (0, 0)  # SigLIP says "valid", which a gradient does not take
    rows, columns = pair(trunk.config.image_size)
    patches = (rows // conv.kernel_size[0]) * (columns // conv.kernel_size[1])
    steps: list[Step] = []
    reasons = dict(left or {})
    for path in paths:
        block = model.get_submodule(f"{path}.block")
        if reason := why_no_block(block):
            steps.append(FloatStep(f"{path}.block"))
            reasons[f"{path}.block"] = reason
        else:
            steps.append(block_parts(f"{path}.block", block, patches + prefix_tokens))
    found, others = classifiers(model, heads)
    return kind(
        model,
        f"{trunk_prefix}{patch}",
        trunk.get_submodule(patch),
        patches,
        tuple(steps),
        found,
        reasons | others,
        prefix_tokens,
        read_tokens,
        trunk_name=trunk_name,
    )


def _padding(conv: nn.Conv2d) -> tuple[int, ...]:
    return (0, 0) if conv.padding == "valid" else conv.padding


def described(config: Any, fields: Sequence[str], labels: bool) -> dict[str, Any]:
    """These fields of a config as JSON holds them, with the names of the classes where the model has some."""
    result = {name: getattr(config, name) for name in fields}
    result = {name: list(value) if isinstance(value, tuple) else value for name, value in result.items()}
    if labels:
        result["id2label"] = {str(number): label for number, label in config.id2label.items()}
    return {"config": result}


def rebuilt(kind: type[nn.Module], config_class: type, config: Mapping[str, Any]) -> nn.Module:
    """A model of transformers from what ``described`` made: constructors of known classes, and nothing else, run."""
    fields = dict(config["config"])
    if "id2label" in fields:
        fields["id2label"] = {int(number): str(label) for number, label in fields["id2label"].items()}
        fields["label2id"] = {label: number for number, label in fields["id2label"].items()}
    return kind(config_class(**fields))
