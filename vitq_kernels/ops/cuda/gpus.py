"""What the choice of a launch knows of GPUs: sizes that are facts, rates that are assumptions until one is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """A class of GPUs: sizes that are facts and rates that the model uses."""

    cc: int  # the first compute capability of the class
    shared_bytes: int  # a block may use
    shared_per_sm: int
    products: int  # int8 multiply-adds of mma.sync a clock and SM, dense peak
    reached: float  # part of it that the loop is assumed to reach
    l2_bytes: float  # a clock and SM; assumed
    ghz: float
    wgmma_products: int = 0  # of wgmma, dense peak; 0: it has none


# Ascending; a GPU belongs to the last class whose cc it reaches. Half of Hopper's peak is assumed for mma.sync.
ARCHITECTURES = (
    Architecture(80, 163 << 10, 164 << 10, 2048, 0.75, 32, 1.41),
    Architecture(86, 99 << 10, 100 << 10, 1024, 0.75, 20, 1.7),
    Architecture(89, 99 << 10, 100 << 10, 1024, 0.75, 20, 2.5),
    Architecture(90, 227 << 10, 228 << 10, 2048, 0.9, 32, 1.755, wgmma_products=4096),
    Architecture(100, 227 << 10, 228 << 10, 2048, 0.75, 32, 1.85),
    Architecture(120, 99 << 10, 100 << 10, 1024, 0.75, 20, 2.4),
)


GPC_SMS = 16  # that a cluster may lie in; assumed: those of a H100 have 16 or 18, some fewer
MOST_BLOCKS = 8  # of a cluster, that every GPU with clusters takes


@dataclass(frozen=True)
class Gpu:
    """What the choice must know of a GPU."""

    cc: int  # compute capability, 80 for 8.0
    sms: int
    name: str = ""
    has_wgmma: bool = True  # where the architecture does: whether the extension was built for it
    # How many clusters of 1, 2, ... blocks it runs at once, as the driver says; empty where nobody asked.
    clusters: tuple[int, ...] = ()

    def clusters_at_once(self, blocks: int) -> int:
        """Of so many blocks, an SM each; without the driver's answer every GPC is taken to have 16 SMs."""
        if self.clusters:
            return self.clusters[blocks - 1] if blocks <= len(self.clusters) else 0
        return self.sms // GPC_SMS * (GPC_SMS // blocks)


def architecture(gpu: Gpu) -> Architecture:
    """The class that a GPU belongs to."""
    return [a for a in ARCHITECTURES if a.cc <= max(gpu.cc, ARCHITECTURES[0].cc)][-1]
