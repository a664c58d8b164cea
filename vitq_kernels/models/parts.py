"""The vocabulary of models: what every family is cut into. Whose attributes the parts were is the families' business.

A model is a patch embedding, a row of steps on a stream of tokens, and an end with the classifiers. A step is a block
of attention and MLP, or a module that stays in float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vitq_kernels.spec import Site, SiteKind


class UnsupportedModelError(ValueError):
    """The model, or a part of it, has no integer form here; the message names the part."""


@dataclass(frozen=True)
class AttentionParts:
    """Multi-head self-attention ``proj(softmax(q k^T * softmax_scale) v)``."""

    qkv: nn.Linear  # rows are [3, H, D]
    proj: nn.Linear
    num_heads: int
    head_dim: int
    softmax_scale: float


@dataclass(frozen=True)
class MlpParts:
    """``fc2(gelu(fc1(x)))``."""

    fc1: nn.Linear
    gelu: str  # "none" (erf) or "tanh"
    fc2: nn.Linear


@dataclass(frozen=True)
class BlockParts:
    """The modules of one pre-norm transformer block ``x + ls1(attn(norm1(x)))``, ``x + ls2(mlp(norm2(x)))``.

    Its sites are ``<name>.attn.qkv``, ``.qk``, ``.av``, ``.proj`` and ``<name>.mlp.fc1``, ``.fc2``.
    """

    name: str  # of the module in the model, "blocks.3"
    tokens: int  # of an image of the model's own size
    norm1: nn.LayerNorm
    attn: AttentionParts
    layer_scale1: Tensor | None  # [C]
    norm2: nn.LayerNorm
    mlp: MlpParts
    layer_scale2: Tensor | None  # [C]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears under their sites' names, in forward order."""
        return {
            f"{self.name}.attn.qkv": self.attn.qkv,
            f"{self.name}.attn.proj": self.attn.proj,
            f"{self.name}.mlp.fc1": self.mlp.fc1,
            f"{self.name}.mlp.fc2": self.mlp.fc2,
        }

    @property
    def sites(self) -> Iterator[Site]:
        """In forward order."""
        matmul = self.attn.num_heads * self.tokens * self.tokens * self.attn.head_dim
        for name, linear in self.linears.items():
            kind: SiteKind = name.rpartition(".")[2]  # type: ignore[assignment]
            yield linear_site(name, kind, linear, self.tokens)
            if linear is self.attn.qkv:
                yield Site(f"{self.name}.attn.qk", "qk", 0, 0, matmul)
                yield Site(f"{self.name}.attn.av", "av", 0, 0, matmul)


@dataclass(frozen=True)
class FloatStep:
    """A module on the stream of tokens that stays in float."""

    name: str  # of the module in the model

    @property
    def sites(self) -> Iterator[Site]:
        """None."""
        yield from ()


Step = BlockParts | FloatStep


@dataclass(frozen=True)
class ModelParts(ABC):
    """A model cut into what is quantized and what stays float. Families fill in how its ends compute.

    Every step is the module of its name, called with the tokens alone.
    """

    model: nn.Module
    patch_name: str  # of the patch convolution's module and site
    patch_proj: nn.Conv2d
    patches: int  # of an image of the model's own size
    steps: tuple[Step, ...]  # in forward order
    heads: Mapping[str, nn.Linear]  # classifiers by name; empty without one
    left_in_float: Mapping[str, str]  # module name -> why it has no integer form
    prefix_tokens: int = 0  # class, distillation and register tokens that stand before the patch tokens
    read_tokens: int = 0  # how many of the first tokens the classifier reads, or 0 where it pools all

    @property
    def blocks(self) -> tuple[BlockParts, ...]:
        """The steps that are blocks."""
        return tuple(step for step in self.steps if isinstance(step, BlockParts))

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears of all steps under their sites' names, in forward order."""
        return {name: linear for block in self.blocks for name, linear in block.linears.items()}

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
        """Patches [B, P, C] of a ``grid`` of (rows, columns) to the tokens that enter ``norm_pre``."""

    @abstractmethod
    def head_inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens after ``norm`` to what each head reads after ``fc_norm``, [B, C] where the model pools.

        The logits are the mean of the heads' outputs.
        """


def linear_site(name: str, kind: SiteKind, linear: nn.Linear, tokens: int) -> Site:
    """The site of a linear on this many tokens an image."""
    return Site(name, kind, linear.out_features, linear.in_features, tokens * linear.weight.numel())
