"""The vocabulary of models: what every family is cut into. Whose attributes the parts were is the families' business.

A model is a patch embedding, a row of steps on a stream of tokens, and an end with the classifiers. A step is a block
of attention and MLP, a merging of patches, or a module that stays in float.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitq_kernels.spec import Site, SiteKind
from vitq_kernels.windows import Windows, relative_positions

MASKED_LOGIT = -100.0  # what timm's Swin adds to the logits of pairs that must not see each other


class UnsupportedModelError(ValueError):
    """The model, or a part of it, has no integer form here; the message names the part."""


@dataclass(frozen=True)
class AttentionParts:
    """Multi-head self-attention ``proj(softmax(q k^T * softmax_scale + bias) v)``, of all tokens or inside windows."""

    qkv: nn.Linear  # rows are [3, H, D]
    proj: nn.Linear
    num_heads: int
    head_dim: int
    softmax_scale: float
    bias_table: Tensor | None = None  # [(2h - 1)(2w - 1), H], logits by relative position in a window
    windows: Windows | None = None  # of a map of the model's own size; None: all tokens see each other

    def bias(self) -> Tensor | None:
        """What is added to the logits, mask included: [P, H, S, S], window w taking ``windows.pattern()[w]``; or None.

        Dtype and device are the table's.
        """
        if self.windows is None or self.bias_table is None:
            return None
        table = self.bias_table.detach()
        bias = table[relative_positions(self.windows.size, table.device)].permute(2, 0, 1)
        mask = self.windows.mask(table.device)[:, None]
        return torch.where(mask, bias + MASKED_LOGIT, bias)

    def bias_of(self, windows: Windows | None) -> Tensor | None:
        """``bias`` of each window, [W, H, S, S]; or None."""
        bias = self.bias()
        return bias if bias is None or windows is None else bias[windows.pattern(bias.device).long()]

    def windows_of(self, x: Tensor) -> Windows | None:
        """The windows of the map of tokens x [B, H, W, C]."""
        return None if self.windows is None else self.windows.at((x.shape[1], x.shape[2]))

    def heads(self, qkv: Tensor, windows: Windows | None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, L, 3 * H * D] to q, k and v, each [B, H, L, D]; of windows, [B, W, H, S, D]."""
        if windows is not None:
            qkv = windows.gather(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-3, 0).transpose(-3, -2)
        return q, k, v

    def merged(self, x: Tensor, windows: Windows | None) -> Tensor:
        """Heads [B, H, S, D] side by side: [B, S, H * D]; of windows [B, W, H, S, D], as a map without its padding."""
        x = x.transpose(-3, -2).flatten(-2)
        return x if windows is None else windows.crop(windows.scatter(x))


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
        windows = self.attn.windows
        count, length = (1, self.tokens) if windows is None else (windows.count, windows.places)
        matmul = self.attn.num_heads * count * length * length * self.attn.head_dim
        for name, linear in self.linears.items():
            kind: SiteKind = name.rpartition(".")[2]  # type: ignore[assignment]
            if kind == "qkv":
                yield linear_site(name, kind, linear, count * length)
                yield Site(f"{self.name}.attn.qk", "qk", 0, 0, matmul)
                yield Site(f"{self.name}.attn.av", "av", 0, 0, matmul)
            else:
                yield linear_site(name, kind, linear, self.tokens)


@dataclass(frozen=True)
class MergingParts:
    """Patch merging ``reduction(norm(patches of 2x2 tokens))``: a map [B, H, W, C] to [B, H/2, W/2, N], rounded up.

    Its site is ``<name>.reduction``.
    """

    name: str  # of the module in the model, "layers.1.downsample"
    tokens: int  # that come out, of an image of the model's own size
    norm: nn.LayerNorm  # of [4 * C]
    reduction: nn.Linear

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

    Tokens are [B, S, C], or a map [B, H, W, C]. Every step is the module of its name, called with the tokens alone.
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

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears of all steps under their sites' names, in forward order."""
        return {name: linear for step in self.steps for name, linear in step.linears.items()}

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


def linear_site(name: str, kind: SiteKind, linear: nn.Linear, tokens: int) -> Site:
    """The site of a linear on this many tokens an image."""
    return Site(name, kind, linear.out_features, linear.in_features, tokens * linear.weight.numel())
