"""A sample of tokens: outliers are all there, and weighted sums are those of all tokens in the mean."""

from __future__ import annotations

import pytest
import torch

from tests.numerics import uniform
from vitq_kernels.presets.token_sample import sample_tokens


def test_the_largest_are_always_there() -> None:
    x = uniform(-1, 1, (1000, 3), 1)
    loud = [17, 500, 999]
    x[loud, 1] = -50.0
    for seed in range(5):
        sample = sample_tokens(x, 20, torch.Generator().manual_seed(seed))
        assert sample.rows[:3].sort().values.tolist() == loud
        assert len(sample.rows.unique()) == len(sample.weights) == 20
        assert sample.weights.tolist() == [1.0] * 5 + [pytest.approx(995 / 15)] * 15


def test_weighted_sums_have_no_bias() -> None:
    x = uniform(-1, 1, (300, 2), 2).pow(9)
    values = x[:, 0].exp()
    sums = []
    for seed in range(400):
        sample = sample_tokens(x, 40, torch.Generator().manual_seed(seed))
        sums.append(float(values[sample.rows] @ sample.weights))
    mean, spread = torch.tensor(sums).mean(), torch.tensor(sums).std() / 20
    assert abs(float(mean - values.sum())) < 4 * float(spread)


@pytest.mark.parametrize("count", [None, 10, 11])
def test_all_where_there_are_no_more(count: int | None) -> None:
    sample = sample_tokens(uniform(-1, 1, (10, 2), 1), count, torch.Generator())
    assert sample.rows.tolist() == list(range(10))
    assert sample.weights.tolist() == [1.0] * 10


def test_a_seed_gives_the_same_sample() -> None:
    x = uniform(-1, 1, (100, 2), 1)
    one, two, other = (sample_tokens(x, 20, torch.Generator().manual_seed(s)).rows.tolist() for s in (0, 0, 1))
    assert one == two != other
