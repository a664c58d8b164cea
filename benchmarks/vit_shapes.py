"""The Vision Transformers whose shapes are measured: those that are deployed, no hand-picked squares."""

from __future__ import annotations

from dataclasses import dataclass

CLASSES = 1000
MLP_RATIO = 4
CHANNELS_IN = 3
BATCHES = (1, 8, 64, 256)


@dataclass(frozen=True)
class ViTShape:
    """A model at 224 pixels; of ``timm_name``, to which a test holds it."""

    name: str
    timm_name: str
    channels: int
    heads: int
    depth: int
    patch: int = 16  # pixels
    image: int = 224

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image // self.patch) ** 2 + 1

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    @property
    def linears(self) -> tuple[tuple[str, int, int], ...]:
        """Name, N and K of a block's linear layers."""
        c = self.channels
        return ("qkv", 3 * c, c), ("proj", c, c), ("fc1", MLP_RATIO * c, c), ("fc2", c, MLP_RATIO * c)


@dataclass(frozen=True)
class SwinShape:
    """A model whose attention is inside windows; of ``timm_name``, to which a test holds it."""

    name: str
    timm_name: str
    channels: int  # of the first stage; every stage has twice those of the one before
    window: int  # tokens a side
    image: int = 224
    patch: int = 4
    head_dim: int = 32

    def grid(self, stage: int) -> int:
        """Tokens a side, from stage 0 on."""
        return self.image // self.patch >> stage

    def heads(self, stage: int) -> int:
        """Heads of a stage."""
        return (self.channels << stage) // self.head_dim


VITS = (
    ViTShape("DeiT-T", "deit_tiny_patch16_224", 192, 3, 12),
    ViTShape("DeiT-S", "deit_small_patch16_224", 384, 6, 12),
    ViTShape("DeiT-B", "deit_base_patch16_224", 768, 12, 12),
    ViTShape("ViT-L", "vit_large_patch16_224", 1024, 16, 24),
    ViTShape("ViT-H", "vit_huge_patch14_224", 1280, 16, 32, patch=14),
)
SWINS = (
    SwinShape("Swin-T", "swin_tiny_patch4_window7_224", 96, 7),
    SwinShape("SwinV2-T", "swinv2_tiny_window8_256", 96, 8, 256),
    SwinShape("Swin-B-384", "swin_base_patch4_window12_384", 128, 12, 384),
)
STAGES = (0, 2)  # with the most tokens, and with the most blocks
