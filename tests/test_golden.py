"""Golden hashes of the exact ops: the integer semantics do not change unnoticed.

The inputs come from integer arithmetic alone (``numerics.words``), so a hash changes only with the semantics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.numerics import codes, integers, words
from tests.twins import level_table
from vitq_kernels.ops import reference
from vitq_kernels.packing import pack_codes, pack_weight
from vitq_kernels.spec import RowGroups

PATH = Path(__file__).with_name("golden_hashes.txt")


def multipliers(shape: tuple[int, ...], exponent: int, seed: int) -> Tensor:
    """float32 in [1, 2) * 2^exponent: a significand of 24 random bits."""
    significand = torch.from_numpy((words(seed, 1 << 10) % (1 << 23)).astype("int64")) + (1 << 23)
    count = torch.Size(shape).numel()
    return (significand[:count].double() * 2.0 ** (exponent - 23)).float().reshape(shape)


def _requantise() -> list[Tensor]:
    acc = integers(-(1 << 31), (1 << 31) - 1, (64, 64), 1)
    m, z = multipliers((64,), -25, 2), integers(-128, 127, (64,), 3)
    return [reference.requantise(acc, m, z, bits) for bits in range(2, 9)]


def _quantize() -> list[Tensor]:
    x = integers(-(1 << 12), 1 << 12, (33, 48), 4).float() / 64
    return [reference.quantize(x, multipliers((48,), 0, 5), integers(-40, 40, (48,), 6), bits) for bits in (4, 8)]


def _quantize_patches() -> list[Tensor]:
    image = integers(-(1 << 12), 1 << 12, (2, 3, 14, 21), 22).float() / 64
    scale, zero = multipliers((3 * 4 * 5,), 0, 23), integers(-40, 40, (3 * 4 * 5,), 24)
    return [reference.quantize_patches(image, scale, zero, 4, 5, bits) for bits in (4, 8)]


def _quantize_per_token() -> list[Tensor]:
    x = integers(-(1 << 12), 1 << 12, (33, 48), 7).float() / 64
    x[::4] = 0
    return list(reference.quantize_per_token(x))


def _linear_codes() -> list[Tensor]:
    a, w = codes("random", (33, 147), seed=8), codes("random", (40, 147), seed=9)
    bias_q, z = integers(-(1 << 20), 1 << 20, (40,), 10), integers(-20, 20, (40,), 11)
    return [reference.linear_codes(a, [w], multipliers((40,), bits - 22, 12), bias_q, z, bits) for bits in (4, 8)]


def _attention() -> list[Tensor]:
    q, k, v = (codes("random", (2, 3, 37, 32), seed=13 + i) for i in range(3))
    m, z = multipliers((3, 32), 0, 16), integers(-20, 20, (3, 32), 17)
    bias_q = integers(-(1 << 14), 1 << 14, (1, 3, 37, 37), 18)
    result = []
    for bits in (3, 4, 8):
        levels = torch.tensor([level_table(bits, 0.5)] * 3, dtype=torch.uint8)
        kappa = multipliers((3,), bits - 18, 19)
        result += [reference.attention(q, k, v, kappa, levels, m, z, bias, None, 8) for bias in (None, bias_q)]
    return result


def _attention_windows() -> list[Tensor]:
    q, k, v = (codes("random", (2, 3, 6 * 25, 32), seed=25 + i) for i in range(3))
    windows = integers(0, 1 << 30, (150,), 28).argsort().int().view(6, 25)
    m, z, pattern = multipliers((3, 32), 0, 29), integers(-20, 20, (3, 32), 30), integers(0, 3, (6,), 31)
    bias_q = integers(-(1 << 14), 1 << 14, (4, 3, 25, 25), 32)
    levels, kappa = torch.tensor([level_table(4, 0.5)] * 3, dtype=torch.uint8), multipliers((3,), -14, 33)
    tables = (kappa, levels, m, z)
    return [
        reference.attention(q, k, v, *tables, None, None, 8, windows),
        reference.attention(q, k, v, *tables, bias_q, None, 8, windows, pattern),
        reference.attention(q, k, v, *tables, bias_q, multipliers((3,), 0, 34), 8, windows, pattern),
    ]


def _pack_codes() -> list[Tensor]:
    return [pack_codes(codes("random", (5, 147), bits, seed=20), bits) for bits in range(2, 9)]


def _pack_weight() -> list[Tensor]:
    order = torch.cat([integers(0, 1 << 30, (n,), n).argsort() + tile for tile, n in ((0, 256), (256, 44))]).tolist()
    packed = pack_weight(codes("random", (300, 24), 2, seed=21), RowGroups(300, (2, 3, 5, 8, 4), 64, tuple(order)))
    return [packed.data, packed.row_order]


OUTPUTS: dict[str, Callable[[], list[Tensor]]] = {
    "requantise": _requantise,
    "quantize": _quantize,
    "quantize_patches": _quantize_patches,
    "quantize_per_token": _quantize_per_token,
    "linear_codes": _linear_codes,
    "attention": _attention,
    "pack_codes": _pack_codes,
    "pack_weight": _pack_weight,
    "attention_windows": _attention_windows,
}


def digest(tensors: list[Tensor]) -> str:
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        result.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def recorded() -> dict[str, str]:
    return dict(line.split() for line in PATH.read_text().splitlines())


@pytest.mark.parametrize("op", OUTPUTS)
def test_outputs_have_the_recorded_hash(op: str) -> None:
    got = f"{op} {digest(OUTPUTS[op]())}"
    assert f"{op} {recorded().get(op)}" == got, (
        "the integer semantics changed. If that is meant: raise SEMANTICS_VERSION in ops/reference.py, say so in "
        f"CHANGELOG.md, and put this line into tests/golden_hashes.txt:\n{got}"
    )


def test_hashes_belong_to_this_semantics_version() -> None:
    assert recorded()["SEMANTICS_VERSION"] == str(reference.SEMANTICS_VERSION)
    assert list(recorded()) == ["SEMANTICS_VERSION", *OUTPUTS]


@pytest.mark.parametrize("op", OUTPUTS)
def test_outputs_are_not_degenerate(op: str) -> None:
    # A hash of saturated codes would notice little.
    for tensor in OUTPUTS[op]():
        counts = tensor.flatten().unique(return_counts=True)[1]
        assert counts.numel() >= min(4, tensor.numel())
        assert counts.max() <= 0.6 * tensor.numel()
