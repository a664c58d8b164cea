"""QuantConfig: what it refuses, and exponents by width."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from vitq_kernels.config import QuantConfig
from vitq_kernels.spec import SiteKind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observer": "max"}, "observer must be one of"),
        ({"percentile": 0.5}, r"percentile must be in \(0.5, 1\]"),
        ({"percentile": 1.1}, r"percentile must be in \(0.5, 1\]"),
        ({"compensation": 0.0}, "compensation must be None or positive"),
        ({"compensation": float("nan")}, "compensation must be None or positive"),
        ({"sweeps": -1}, "sweeps must not be negative"),
    ],
    ids=lambda value: str(value),
)
def test_bad_settings_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig(**arguments)


def test_every_kind_of_linear_has_an_exponent() -> None:
    for kind in set(get_args(SiteKind)) - {"qk", "av"}:
        assert 0 <= QuantConfig().exponent(kind, 8) <= 1


def test_narrow_activations_keep_their_channels_resolution() -> None:
    config = QuantConfig()
    for kind in ("qkv", "fc1", "proj"):
        assert config.exponent(kind, 4) > config.exponent(kind, 8)
    assert QuantConfig(reparam_exponent=0.25).exponent("fc1", 4) == 0.25
    assert QuantConfig(value_exponent=0.25).exponent("proj", 4) == 0.25
