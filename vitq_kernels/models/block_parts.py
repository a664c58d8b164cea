"""A block of attention and MLP as every family is cut into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitq_kernels.activations import ACTIVATIONS, Gate, hidden_features
from vitq_kernels.rotary import rotated, with_prefix
from vitq_kernels.spec import Site, SiteKind
from vitq_kernels.windows import Windows, positions_with_class, relative_positions

MASKED_LOGIT = -100.0  # what timm's Swin adds to the logits of pairs that must not see each other


@dataclass(frozen=True)
class RopeParts:
    """Rotary embedding of q and k (rotary.py)."""

    table: Tensor  # [S - prefix, 2 * D] or [H, S - prefix, 2 * D], of an image of the model's own size
    prefix: int  # tokens that stand first and are not turned
    half: bool  # layout


@dataclass(frozen=True)
class AttentionParts:
    """``proj(norm(softmax(q k^T * softmax_scale + bias) v))`` of several heads, of all tokens or inside windows.

    q and k may be normed per head and turned by a rotary embedding before.
    """

    qkv: nn.Linear  # rows are [3, H, D]
    proj: nn.Linear
    num_heads: int
    head_dim: int
    softmax_scale: float | Tensor  # [H, 1, 1] where every head has its own
    # Logits by relative position, [(2h - 1)(2w - 1), H] in a window; 3 rows more for the ``grid`` behind a class token.
    bias_table: Tensor | None = None
    windows: Windows | None = None  # of a map of the model's own size; None: all tokens see each other
    grid: tuple[int, int] | None = None  # of the patches, where a bias is for all of them and the class token
    q_norm: nn.Module | None = None  # over D
    k_norm: nn.Module | None = None
    rope: RopeParts | None = None
    norm: nn.Module | None = None  # over H * D
    # Where qkv is put together of several layers of the model, the module whose first argument these layers read.
    qkv_reader: nn.Module | None = None

    @property
    def scale_of_heads(self) -> float | Tensor:
        """``softmax_scale``, as float64 [H] where every head has its own."""
        return self.softmax_scale.flatten().double() if isinstance(self.softmax_scale, Tensor) else self.softmax_scale

    @property
    def fused(self) -> bool:
        """Whether what qkv puts out is q, k and v."""
        return self.q_norm is None and self.k_norm is None and self.rope is None

    def bias(self) -> Tensor | None:
        """What is added to the logits, mask included: [P, H, S, S], window w taking ``windows.pattern()[w]``; or None.

        Dtype and device are the table's.
        """
        if self.bias_table is None:
            return None
        table = self.bias_table.detach()
        if self.windows is None:
            assert self.grid is not None
            return table[positions_with_class(self.grid, table.device)].permute(2, 0, 1)[None]
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

    def split(self, qkv: Tensor, windows: Windows | None) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [B, L, 3 * H * D] to q, k and v, each [B, H, L, D]; of windows, [B, W, H, S, D]."""
        if windows is not None:
            qkv = windows.gather(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).movedim(-3, 0).transpose(-3, -2)
        return q, k, v

    def heads(self, qkv: Tensor, windows: Windows | None) -> tuple[Tensor, Tensor, Tensor]:
        """``split``, and q and k normed and turned: q, k and v as attention multiplies them."""
        q, k, v = self.split(qkv, windows)
        q, k = q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k)
        return self.turned(q), self.turned(k), v

    def turned(self, x: Tensor) -> Tensor:
        """q or k [B, H, S, D] after the rotary embedding.

        Raises:
            ValueError: the tokens are those of an image of another size than the model's own.
        """
        if self.rope is None:
            return x
        table = with_prefix(self.rope.table.to(x.dtype), self.rope.prefix)
        if table.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"images must have the model's own size where a rotary embedding depends on it: {table.shape[-2]} "
                f"tokens, got {x.shape[-2]}"
            )
        return rotated(x, table, self.rope.half)

    def merged(self, x: Tensor, windows: Windows | None) -> Tensor:
        """Heads [B, H, S, D] side by side: [B, S, H * D]; of windows [B, W, H, S, D], as a map without its padding."""
        x = x.transpose(-3, -2).flatten(-2)
        return x if windows is None else windows.crop(windows.scatter(x))


@dataclass(frozen=True)
class MlpParts:
    """``fc2(norm(activation(fc1(x))))``; gated, the activation of one half of fc1's outputs times the other half."""

    fc1: nn.Linear  # gated: rows are [2, hidden]
    activation: str  # of ACTIVATIONS
    fc2: nn.Linear
    gate: Gate | None = None  # which half of fc1's rows the activation is applied to
    norm: nn.Module | None = None
    fc1_reader: nn.Module | None = None  # as of AttentionParts.qkv_reader

    @property
    def gelu(self) -> str | None:
        """ "none" (erf) or "tanh" where fc1's epilogue makes fc2's codes; None where a float step lies between."""
        plain = self.gate is None and self.norm is None
        return ACTIVATIONS[self.activation].gelu if plain else None

    def hidden(self, x: Tensor) -> Tensor:
        """What fc1 puts out to what ``norm``, or without one fc2, reads."""
        return hidden_features(x, self.activation, self.gate)


@dataclass(frozen=True)
class BlockParts:
    """The modules of one transformer block ``x + ls1(attn(norm1(x)))``, ``x + ls2(mlp(norm2(x)))``.

    With ``post_norm`` it is ``x + norm1(attn(x))``, ``x + norm2(mlp(x))``, without layer scale. Its sites are
    ``<name>.attn.qkv``, ``.qk``, ``.av``, ``.proj`` and ``<name>.mlp.fc1``, ``.fc2``.
    """

    name: str  # of the module in the model, "blocks.3"
    tokens: int  # of an image of the model's own size
    norm1: nn.Module
    attn: AttentionParts
    layer_scale1: Tensor | None  # [C]
    norm2: nn.Module
    mlp: MlpParts
    layer_scale2: Tensor | None  # [C]
    arguments: Mapping[str, Tensor] = field(default_factory=dict)  # of its call beside the tokens, at the model's size
    post_norm: bool = False

    @property
    def before(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The norms in front of attention and MLP."""
        return (None, None) if self.post_norm else (self.norm1, self.norm2)

    @property
    def behind(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The norms behind attention and MLP."""
        return (self.norm1, self.norm2) if self.post_norm else (None, None)

    @property
    def plain(self) -> bool:
        """Whether it is a block as of ViT: codes from norm to attention to proj, and from norm to GELU to fc2."""
        own = self.attn.qkv_reader is None and self.mlp.fc1_reader is None
        norms = isinstance(self.norm1, nn.LayerNorm) and isinstance(self.norm2, nn.LayerNorm)
        return (
            own
            and norms
            and not self.post_norm
            and self.attn.fused
            and self.attn.norm is None
            and self.attn.grid is None
            and self.mlp.gelu is not None
        )

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
    def readers(self) -> dict[str, nn.Module]:
        """Under a linear's name the module whose first argument it reads: itself, or another if it is put together."""
        found: dict[str, nn.Module] = dict(self.linears)
        if self.attn.qkv_reader is not None:
            found[f"{self.name}.attn.qkv"] = self.attn.qkv_reader
        if self.mlp.fc1_reader is not None:
            found[f"{self.name}.mlp.fc1"] = self.mlp.fc1_reader
        return found

    @property
    def sites(self) -> Iterator[Site]:
        """In forward order."""
        windows = self.attn.windows
        count, length = (1, self.tokens) if windows is None else (windows.count, windows.places)
        matmul = self.attn.num_heads * count * length * length * self.attn.head_dim
        for name, linear in self.linears.items():
            kind: SiteKind = name.rpartition(".")[2]  # type: ignore[assignment]
            if kind == "qkv":
                yield linear_site(name, kind, linear, count * length if self.attn.fused else self.tokens)
                yield Site(f"{self.name}.attn.qk", "qk", 0, 0, matmul)
                yield Site(f"{self.name}.attn.av", "av", 0, 0, matmul)
            else:
                yield linear_site(name, kind, linear, self.tokens)


def linear_site(name: str, kind: SiteKind, linear: nn.Linear, tokens: int) -> Site:
    """The site of a linear on this many tokens an image."""
    return Site(name, kind, linear.out_features, linear.in_features, tokens * linear.weight.numel())
