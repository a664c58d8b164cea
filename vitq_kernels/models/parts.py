"""The vocabulary of models: what every family is cut into. Whose attributes the parts were is the families' business.

A model is a patch embedding, a row of steps on a stream of tokens, and an end with the classifiers. A step is a block
of attention and MLP, a merging of patches, or a module that stays in float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from vitq_kernels.models.block_parts import BlockParts, linear_site
from vitq_kernels.spec import Site


class UnsupportedModelError(ValueError):
    """The model, or a part of it, has no integer form here; the message names the part."""


@dataclass(frozen=True)
class MergingParts:
    """Patch merging ``reduction(norm(patches of 2x2 tokens))``: a map [B, H, W, C] to [B, H/2, W/2, N], rounded up.

    With ``post_norm`` it is ``norm(reduction(patches))``. Its site is ``<name>.reduction``.
    """

    name: str  # of the module in the model, "layers.1.downsample"
    tokens: int  # that come out, of an image of the model's own size
    norm: nn.Module  # of [4 * C], or with post_norm of [N]
    reduction: nn.Linear
    post_norm: bool = False

    @property
    def arguments(self) -> dict[str, Tensor]:
        """None beside the tokens."""
        return {}

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear under its site's name."""
        return {f"{self.name}.reduction": self.reduction}

    @property
    def sites(self) -> Iterator[Site]:
        """The one site."""
        for name, linear in self.linears.items():
            yield linear_site(name, "reduction", linear, self.tokens)


@dataclass(frozen=True)
class FloatStep:
    """A module on the stream of tokens that stays in float."""

    name: str  # of the module in the model
    arguments: Mapping[str, Tensor] = field(default_factory=dict)  # of its call beside the tokens

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """None that is quantized."""
        return {}

    @property
    def sites(self) -> Iterator[Site]:
        """None."""
        yield from ()


Step = BlockParts | MergingParts | FloatStep


@dataclass(frozen=True)
class ModelParts(ABC):
    """A model cut into what is quantized and what stays float. Families fill in how its ends compute.

    Tokens are [B, S, C], or a map [B, H, W, C]. Every step is the module of its name, called with the tokens and the
    step's arguments.
    """

    # Whether the family's ``describe`` tells what is in ``left_in_float`` too, so that a checkpoint can hold it.
    float_is_described: ClassVar[bool] = False

    model: nn.Module
    patch_name: str  # of the patch convolution's module and site
    patch_proj: nn.Conv2d
    patches: int  # of an image of the model's own size
    steps: tuple[Step, ...]  # in forward order
    heads: Mapping[str, nn.Linear]  # classifiers by name; empty without one
    left_in_float: Mapping[str, str]  # module name -> why it has no integer form
    prefix_tokens: int = 0  # class, distillation and register tokens that stand before the patch tokens
    read_tokens: int = 0  # how many of the first tokens the classifier reads, or 0 where it pools all
    token_map: bool = False  # whether tokens are a map

    @property
    def blocks(self) -> tuple[BlockParts, ...]:
        """The steps that are blocks."""
        return tuple(step for step in self.steps if isinstance(step, BlockParts))

    def called(self, step: Step) -> Callable[[Tensor], Tensor]:
        """A step as a function of the tokens alone, of an image of the model's own size."""
        return partial(self.model.get_submodule(step.name), **step.arguments)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears of all steps under their sites' names, in forward order."""
        return {name: linear for step in self.steps for name, linear in step.linears.items()}

    @property
    def readers(self) -> dict[str, nn.Module]:
        """Of the linears, as of ``BlockParts``."""
        return {**self.linears, **{name: module for block in self.blocks for name, module in block.readers.items()}}

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site in forward order; MACs are per image at the model's own image size."""
        conv = self.patch_proj
        macs = self.patches * conv.weight.numel()
        first = Site(self.patch_name, "patch_embed", conv.out_channels, conv.weight[0].numel(), macs)
        # a head sees one pooled token
        heads = [linear_site(name, "head", head, 1) for name, head in self.heads.items()]
        return (first, *(site for step in self.steps for site in step.sites), *heads)

    @abstractmethod
    def tokens(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to the tokens that enter the first step; the patch tokens are the last ones."""

    @abstractmethod
    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens after the last step to logits [B, classes], or pooled features without a classifier."""

    # The same way cut finer, for a program that replaces every norm and linear (relevance_program.py).

    @property
    @abstractmethod
    def norms(self) -> dict[str, nn.Module]:
        """The norms outside the steps, nn.Identity where the model has none.

        "patch_embed.norm" of patches, "norm_pre" of what enters the first step, "norm" of what leaves the last, and
        "fc_norm" of what a head reads.
        """

    @abstractmethod
    def pixels(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] as ``patch_proj`` takes them: zero-padded to whole patches where the model does so.

        Raises:
            ValueError: the model does not take images of this size.
        """

    @abstractmethod
    def embed(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [B, P, C] of a ``grid`` of (rows, columns) to the tokens [B, S, C] that enter ``norm_pre``."""

    @abstractmethod
    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens after ``norm`` to what each head reads after ``fc_norm``, [B, C] where the model pools.

        The logits are the mean of the heads' outputs.
        """
