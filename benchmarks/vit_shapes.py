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


VITS = (
    ViTShape("DeiT-T", "deit_tiny_patch16_224", 192, 3, 12),
    ViTShape("DeiT-S", "deit_small_patch16_224", 384, 6, 12),
    ViTShape("DeiT-B", "deit_base_patch16_224", 768, 12, 12),
    ViTShape("ViT-L", "vit_large_patch16_224", 1024, 16, 24),
    ViTShape("ViT-H", "vit_huge_patch14_224", 1280, 16, 32, patch=14),
)
