"""Every relevance rule against a slow float64 twin, written from the equations as sums over single contributions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitq_kernels.lrp_attnlrp import ATTNLRP
from vitq_kernels.lrp_chefer import CHEFER, chefer
from vitq_kernels.lrp_composite import stable_divide


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def pull(rule, inputs: list[Tensor], relevance: Tensor, composite) -> list[Tensor]:
    """Relevance of the inputs of ``rule`` when its output has relevance ``relevance``."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = rule(*leaves)
    flowing = relevance if composite.name == "chefer" else relevance / y.detach()
    flowed = torch.autograd.grad(y, leaves, flowing)
    return [composite.relevance(x.detach(), g) for x, g in zip(leaves, flowed, strict=True)]


def jacobian(function, x: Tensor) -> Tensor:
    """d y_j / d x_i of one sample, [outputs, inputs]."""
    return torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())


def share_in_proportion(contributions: Tensor, relevance: Tensor, denominators: Tensor | None = None) -> Tensor:
    """R_i = Σ_j c_ji / z_j R_j, z_j = Σ_i c_ji unless given; one scalar at a time."""
    outputs, inputs = contributions.shape
    z = contributions.sum(1) if denominators is None else denominators
    result = torch.zeros(inputs, dtype=torch.float64)
    for j, i in itertools.product(range(outputs), range(inputs)):
        if z[j] != 0:
            result[i] += contributions[j, i] / z[j] * relevance.flatten()[j]
    return result


def close(actual: Tensor, expected: Tensor) -> None:
    # the twins have no stabiliser: 1e-9 over the smallest denominators met here
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(6, 5, bias=bias, dtype=torch.float64)


def test_stable_divide_is_the_published_one_away_from_zero() -> None:
    a, b = randn(1000), randn(1000)
    published = a / (b.clamp(min=1e-9) + b.clamp(max=1e-9))
    keep = b.abs() > 1e-2
    torch.testing.assert_close(stable_divide(a, b)[keep], published[keep], rtol=1e-6, atol=0)


@pytest.mark.parametrize("b", [0.0, -0.0, 1e-30, -1e-30, 1e-9, -1e-9, -1.0000001e-9])
def test_stable_divide_stays_bounded_near_zero(b: float) -> None:
    quotient = stable_divide(torch.tensor([3.0]), torch.tensor([b])).item()
    assert abs(quotient) <= 3.1e9
    assert quotient * b > 0 or (b == 0 and quotient == 0)  # at -1e-9 the published form divides by about 0


# --- Chefer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_linear_shares_positive_and_negative_contributions(alpha: float, bias: bool) -> None:
    layer, x, relevance = linear(bias), randn(2, 3, 6), randn(2, 3, 5)
    rules = chefer(alpha)
    (actual,) = pull(lambda v: rules.linear(v, layer), [x], relevance, rules)
    for b, t in itertools.product(range(2), range(3)):
        contributions = layer.weight.detach() * x[b, t]  # [outputs, inputs]
        expected = alpha * share_in_proportion(contributions.clamp(min=0), relevance[b, t])
        expected -= (alpha - 1) * share_in_proportion(contributions.clamp(max=0), relevance[b, t])
        close(actual[b, t], expected)


def test_zb_conv_shares_what_lies_above_the_bounds_of_each_image() -> None:
    layer = nn.Conv2d(3, 4, 2, stride=2, dtype=torch.float64)
    x, relevance = randn(2, 3, 4, 6) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1), randn(2, 4, 2, 3)
    (actual,) = pull(lambda v: CHEFER.patch_embed(v, layer), [x], relevance, CHEFER)
    for b in range(2):
        w = jacobian(lambda v: F.conv2d(v, layer.weight.detach(), stride=2), x[b : b + 1])
        low, high = x[b].min(), x[b].max()
        contributions = x[b].flatten() * w - low * w.clamp(min=0) - high * w.clamp(max=0)
        close(actual[b].flatten(), share_in_proportion(contributions, relevance[b]))


def matmul_twin(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    r_a, r_b, y = torch.zeros_like(a), torch.zeros_like(b), a @ b
    for m, k, n in itertools.product(range(a.shape[0]), range(a.shape[1]), range(b.shape[1])):
        half = a[m, k] * b[k, n] / y[m, n] * relevance[m, n] / 2
        r_a[m, k] += half
        r_b[k, n] += half
    return r_a, r_b


@pytest.mark.parametrize("composite", [CHEFER, ATTNLRP], ids=["chefer", "attnlrp"])
def test_matmul_gives_half_to_each_factor(composite) -> None:
    a, b, relevance = randn(2, 3, 4), randn(2, 4, 5), randn(2, 3, 5)
    actual = pull(composite.matmul, [a, b], relevance, composite)
    for sample in range(2):
        for got, expected in zip(actual, matmul_twin(a[sample], b[sample], relevance[sample]), strict=True):
            close(got[sample], expected)
    for factor in actual:
        close(factor.sum(), relevance.sum() / 2)


def test_add_normalises_each_sample_by_itself() -> None:
    a, b, relevance = randn(3, 4, 5), randn(3, 4, 5), randn(3, 4, 5) * torch.tensor([1.0, -9.0, 100.0]).view(3, 1, 1)
    actual = pull(CHEFER.add, [a, b], relevance, CHEFER)
    for s in range(3):
        r_a, r_b = a[s] / (a[s] + b[s]) * relevance[s], b[s] / (a[s] + b[s]) * relevance[s]
        weight = r_a.sum().abs() + r_b.sum().abs()
        close(actual[0][s], r_a * (r_a.sum().abs() / weight * relevance[s].sum() / r_a.sum()))
        close(actual[1][s], r_b * (r_b.sum().abs() / weight * relevance[s].sum() / r_b.sum()))


def test_add_conserves_each_sample() -> None:
    a, b, relevance = randn(3, 4, 5), randn(3, 4, 5), randn(3, 4, 5)
    r_a, r_b = pull(CHEFER.add, [a, b], relevance, CHEFER)
    torch.testing.assert_close((r_a + r_b).sum((1, 2)), relevance.sum((1, 2)), rtol=1e-9, atol=1e-9)


POOLS = {"class-token": lambda t: t[:, 0], "mean-of-patches": lambda t: t[:, 1:].mean(1), "max": lambda t: t.amax(1)}


@pytest.mark.parametrize("composite", [CHEFER, ATTNLRP], ids=["chefer", "attnlrp"])
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_pool_shares_in_proportion(pool, composite) -> None:
    x, relevance = randn(2, 4, 3), randn(2, 3)
    (actual,) = pull(lambda v: composite.pool(v, pool), [x], relevance, composite)
    for b in range(2):
        contributions = jacobian(pool, x[b : b + 1]) * x[b].flatten()
        close(actual[b].flatten(), share_in_proportion(contributions, relevance[b]))
    close(actual.sum(), relevance.sum())


LAYER_NORM = nn.LayerNorm(6, eps=1e-3, dtype=torch.float64)
nn.init.normal_(LAYER_NORM.weight)
nn.init.normal_(LAYER_NORM.bias)
ELEMENTWISE = {
    "gelu": (lambda rules, x: rules.activation(x, "gelu"), F.gelu),
    "gelu-tanh": (lambda rules, x: rules.activation(x, "gelu_tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "softmax": (lambda rules, x: rules.softmax(x), lambda x: x.softmax(-1)),
    "layer-norm": (lambda rules, x: rules.norm(x, LAYER_NORM), LAYER_NORM),
    "scale": (lambda rules, x: rules.scale(x, 0.125), lambda x: x * 0.125),
    "layer-scale": (lambda rules, x: rules.scale(x, torch.arange(-2.0, 4.0)), lambda x: x * torch.arange(-2.0, 4.0)),
}


@pytest.mark.parametrize("rule", [pair[0] for pair in ELEMENTWISE.values()], ids=ELEMENTWISE)
def test_chefer_passes_relevance_unchanged(rule) -> None:
    x, relevance = randn(2, 3, 6), randn(2, 3, 6)
    assert torch.equal(pull(lambda v: rule(CHEFER, v), [x], relevance, CHEFER)[0], relevance)


@pytest.mark.parametrize("composite", [CHEFER, ATTNLRP], ids=["chefer", "attnlrp"])
@pytest.mark.parametrize(("rule", "function"), ELEMENTWISE.values(), ids=ELEMENTWISE)
def test_values_are_those_of_the_operation(rule, function, composite) -> None:
    x = randn(2, 3, 6) * 3
    torch.testing.assert_close(rule(composite, x), function(x), rtol=1e-12, atol=1e-12)


def test_z_plus_conserves_what_has_a_positive_contribution() -> None:
    """Σ R_in = Σ R_out over the outputs with Z > 0; an output without any positive contribution loses its relevance."""
    layer, x, relevance = linear(), randn(4, 6), randn(4, 5)
    with torch.no_grad():
        layer.weight[0] = -x[0].sign()  # output 0 of sample 0 has negative contributions only
    kept = relevance.clone()
    kept[0, 0] = 0
    (actual,) = pull(lambda v: CHEFER.linear(v, layer), [x], relevance, CHEFER)
    torch.testing.assert_close(actual.sum(1), kept.sum(1), rtol=1e-6, atol=1e-7)
    assert (pull(lambda v: CHEFER.linear(v, layer), [x], relevance.abs(), CHEFER)[0] >= 0).all()


def test_zb_conserves_each_image() -> None:
    layer = nn.Conv2d(1, 4, 2, stride=2, dtype=torch.float64)
    x, relevance = randn(2, 1, 4, 4), randn(2, 4, 2, 2)
    (actual,) = pull(lambda v: CHEFER.patch_embed(v, layer), [x], relevance, CHEFER)
    torch.testing.assert_close(actual.sum((1, 2, 3)), relevance.sum((1, 2, 3)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [0.5, float("nan"), float("inf")])
def test_chefer_refuses_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be a finite number >= 1"):
        chefer(alpha)


# --- AttnLRP ------------------------------------------------------------------------------------------------------


def test_attnlrp_linear_is_the_epsilon_rule_with_bias_in_the_denominator() -> None:
    layer, x, relevance = linear(), randn(3, 6), randn(3, 5)
    (actual,) = pull(lambda v: ATTNLRP.linear(v, layer), [x], relevance, ATTNLRP)
    for s in range(3):
        close(actual[s], share_in_proportion(layer.weight.detach() * x[s], relevance[s], layer(x[s]).detach()))


def test_attnlrp_patch_embed_is_the_epsilon_rule() -> None:
    layer = nn.Conv2d(3, 4, 2, stride=2, dtype=torch.float64)
    x, relevance = randn(1, 3, 4, 4), randn(1, 4, 2, 2)
    (actual,) = pull(lambda v: ATTNLRP.patch_embed(v, layer), [x], relevance, ATTNLRP)
    close(actual.flatten(), share_in_proportion(jacobian(layer, x) * x.flatten(), relevance, layer(x).flatten()))


def test_attnlrp_add_is_the_epsilon_rule() -> None:
    a, b, relevance = randn(2, 5), randn(2, 5), randn(2, 5)
    r_a, r_b = pull(ATTNLRP.add, [a, b], relevance, ATTNLRP)
    close(r_a, a / (a + b) * relevance)
    close(r_b, b / (a + b) * relevance)


@pytest.mark.parametrize("name", ["gelu", "gelu-tanh", "scale"])
def test_attnlrp_identity_rule(name: str) -> None:
    x, relevance = randn(3, 6), randn(3, 6)
    (actual,) = pull(lambda v: ELEMENTWISE[name][0](ATTNLRP, v), [x], relevance, ATTNLRP)
    close(actual, relevance)


@pytest.mark.parametrize(("name", "limit"), [("gelu", 0.5), ("gelu_tanh", 0.5), ("silu", 0.5), ("relu", 0.0)], ids=str)
def test_attnlrp_activation_at_zero(name: str, limit: float) -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(ATTNLRP.activation(x, name).sum(), x)[0].item()
    assert found == limit  # of activation(x)/x


def test_attnlrp_softmax_is_the_taylor_rule() -> None:
    x, relevance = randn(3, 6), randn(3, 6)
    (actual,) = pull(ATTNLRP.softmax, [x], relevance, ATTNLRP)
    s = x.softmax(-1)
    for row, i in itertools.product(range(3), range(6)):
        close(actual[row, i], x[row, i] * (relevance[row, i] - s[row, i] * sum(relevance[row])))


def test_attnlrp_layer_norm_takes_the_normaliser_as_a_constant() -> None:
    x, relevance = randn(2, 6), randn(2, 6)
    (actual,) = pull(lambda v: ATTNLRP.norm(v, LAYER_NORM), [x], relevance, ATTNLRP)
    for s in range(2):
        std = (x[s].var(unbiased=False) + LAYER_NORM.eps).sqrt()
        centring = torch.eye(6, dtype=torch.float64) - 1 / 6
        contributions = LAYER_NORM.weight.detach()[:, None] * centring / std * x[s]
        close(actual[s], share_in_proportion(contributions, relevance[s], LAYER_NORM(x[s]).detach()))


@pytest.mark.parametrize("bias", [False, True], ids=["bias-free", "with-biases"])
def test_attnlrp_conserves_the_logit_at_every_cut(bias: bool) -> None:
    """Without biases Σ y * g is the logit at every cut; a bias b takes Σ b * g away and nothing else is lost."""
    first, second = (nn.Linear(8, 8, bias=bias, dtype=torch.float64) for _ in range(2))
    norm = nn.LayerNorm(8, bias=bias, dtype=torch.float64)
    for layer in (first, second, norm):
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
    x = randn(1, 8, 8).requires_grad_()
    h1 = ATTNLRP.linear(x, first)
    h2 = ATTNLRP.activation(h1, "gelu")
    h3 = ATTNLRP.norm(h2, norm)
    h4 = ATTNLRP.add(h2, h3)
    h5 = ATTNLRP.matmul(h4, h4.mT)
    h6 = ATTNLRP.linear(h5, second)
    logit = h6[0, 0, 0]
    cuts = {"x": x, "h1": h1, "h2": h2, "h3": h3, "h4": h4, "h5": h5, "h6": h6}
    flowed = dict(zip(cuts, torch.autograd.grad(logit, list(cuts.values())), strict=True))
    r = {name: float((cuts[name] * flowed[name]).sum().detach()) for name in cuts if name != "h3"}  # h2 forks to h3, h4
    taken = {
        name: float((layer.bias.detach() * flowed[name]).sum()) if bias else 0.0
        for name, layer in (("h1", first), ("h3", norm), ("h6", second))
    }
    h5_sum = float(logit.detach()) - taken["h6"]
    h2_sum = h5_sum - taken["h3"]
    expected = {"x": h2_sum - taken["h1"], "h1": h2_sum, "h2": h2_sum, "h4": h5_sum, "h5": h5_sum, "h6": logit.item()}
    assert r == pytest.approx(expected, rel=1e-9, abs=1e-9)
