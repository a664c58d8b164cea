"""QuantConfig: what it refuses, and exponents by width."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest

from vitq_kernels.config import Observer, QuantConfig
from vitq_kernels.spec import SiteKind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"observer": "max"}, r"QuantConfig.observer must be one of \('minmax', 'percentile', 'mse'\), got 'max'"),
        ({"percentile": 0.5}, r"QuantConfig.percentile must be in \(0.5, 1\], got 0.5"),
        ({"percentile": 1.01}, r"QuantConfig.percentile must be in \(0.5, 1\], got 1.01"),
        ({"percentile": math.nan}, r"QuantConfig.percentile must be in \(0.5, 1\], got nan"),
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


@pytest.mark.parametrize("observer", get_args(Observer))
def test_every_observer_is_taken(observer: Observer) -> None:
    assert QuantConfig(observer=observer, percentile=1.0).observer == observer
