"""Estimates of information against their definitions, on data whose information is known, and how often intervals cover."""

import math

import pytest
import torch

from mimir_fast.analyze.bounds import fano, fano_bound, label_entropy
from mimir_fast.analyze.estimates import (
    ESTIMATORS,
    ORDERS,
    T_95,
    estimate,
    information,
    jackknife_error,
    marginal,
    measure,
    variable,
)
from mimir_fast.objectives.information import nhsic, renyi_mi


def pairs(seed: int, m: int, d: int, correlation: float) -> dict:
    """Gaussian x and latent [m,d], correlated dimension by dimension."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, m, d, generator=generator)
    return {"x": variable(x), "latent": variable(correlation * x + math.sqrt(1 - correlation**2) * noise)}


def estimated(variables: dict, seed: int = 0, bandwidth: str = "squared") -> dict:
    return estimate(variables, bandwidth, torch.Generator().manual_seed(seed))


def test_values_are_those_of_the_penalties():
    torch.manual_seed(1)
    x, z = torch.randn(30, 50), torch.randn(30, 8) * 3
    every = torch.arange(30)
    ours = information(*(marginal(variable(rows), every, "distance") for rows in (x, z)))
    assert ours["nhsic"] == pytest.approx(nhsic(x, z).item(), rel=1e-5)
    for name, alpha in ORDERS.items():
        assert ours[name] == pytest.approx(renyi_mi(x, z, alpha).item(), rel=1e-5)


def test_of_itself_a_variable_tells_its_entropy():
    """Four clusters far from each other, 2 bits: kernels are 0 and 1, where the matrix entropies are exact."""
    x = 1e4 * torch.eye(4).repeat(20, 1)
    numbers = estimated({"x": variable(x), "latent": variable(x)}, bandwidth="distance")
    for name in ORDERS:
        assert numbers["x", name, "value"].value == pytest.approx(2, abs=1e-9)
        assert numbers["latent", name, "value"].value == pytest.approx(2, abs=1e-9)
        assert numbers["x", name, "null"].value < 0.2
    halves = torch.tensor([[0.0], [1e4]]).repeat(1, 40).view(-1, 1)  # one of two clusters says one bit of four
    four = 1e4 * torch.eye(4).repeat_interleave(20, dim=0)
    both = {"x": variable(halves), "latent": variable(four)}
    assert estimated(both, bandwidth="distance")["x", "renyi_1.01", "value"].value == pytest.approx(1, abs=1e-9)


def test_more_noise_is_less_information():
    numbers = [estimated(pairs(0, 80, 2, correlation)) for correlation in (0.99, 0.9, 0.5, 0.0)]
    for estimator in ESTIMATORS:
        known = [one["x", estimator, "excess"] for one in numbers]
        values = [one.value for one in known]
        assert values == sorted(values, reverse=True)
        assert known[1].interval[0] > 0 > known[3].interval[0]
        assert known[3].interval[1] > 0


@pytest.fixture(scope="module")
def simulated() -> dict:
    """Numbers of independent and of dependent variables, 12 data sets each."""
    return {correlation: [estimated(pairs(s, 40, 3, correlation), s) for s in range(12)] for correlation in (0.0, 0.7)}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_intervals_cover(simulated, estimator):
    """The truth: nothing for independent variables, else the estimator's mean over data sets."""
    for correlation, numbers in simulated.items():
        excess = [one["x", estimator, "excess"] for one in numbers]
        values = torch.tensor([one.value for one in excess])
        truth = 0.0 if correlation == 0 else values.mean().item()
        assert sum(low <= truth <= high for low, high in (one.interval for one in excess)) >= 10
        errors = torch.tensor([one.error for one in excess])
        assert 0.6 < (errors.mean() / values.std()).item() < 3  # wide, but not so wide as to say nothing


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bootstrap_would_not(simulated, estimator):
    """Samples drawn twice look like dependence: the reason for the jackknife."""
    variables = pairs(0, 40, 3, 0.0)
    generator = torch.Generator().manual_seed(0)
    drawn = [measure(variables, torch.randint(40, (40,), generator=generator), "squared") for _ in range(30)]
    excess = torch.tensor([numbers["x", estimator, "excess"] for numbers in drawn])
    whole = simulated[0.0][0]["x", estimator, "excess"]
    low = excess.quantile(0.025).item()  # lower end of the percentile interval
    assert low > 0 > whole.interval[0]
    assert low > whole.value


def test_shuffled_pairs_are_no_pairs():
    """Values of independent variables in many dimensions are large, the excess is not."""
    numbers = estimated(pairs(0, 60, 200, 0.0))
    for name in ESTIMATORS:
        assert numbers["x", name, "value"].value > 10 * abs(numbers["x", name, "excess"].value)


def test_bandwidths():
    torch.manual_seed(0)
    wide = torch.rand(60, 3072)
    every = torch.arange(60)
    squared, distance = (marginal(variable(wide), every, b).entropies["renyi_1.01"] for b in ("squared", "distance"))
    assert distance > 0.99 * math.log2(60) > squared + 1  # the training's rule saturates
    scaled = marginal(variable(1000 * wide), every, "squared").entropies["renyi_1.01"]
    assert scaled == pytest.approx(squared, rel=1e-4)
    same = variable(torch.ones(60, 5))  # nothing varies: no information, no NaN
    assert marginal(same, every, "squared").entropies["renyi_1.01"] == pytest.approx(0, abs=1e-9)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.rand(20, dtype=torch.float64)
    without = [(values.sum() - value).item() / 19 for value in values]
    assert jackknife_error(without) == pytest.approx((values.std() / math.sqrt(20)).item())
    assert pytest.approx(2.093, abs=1e-3) == T_95


def test_repeats_bitwise_and_refuses_few_samples():
    variables = pairs(0, 45, 3, 0.5)
    assert estimated(variables, 5) == estimated(variables, 5)
    assert estimated(variables, 5) != estimated(variables, 6)
    with pytest.raises(ValueError, match=r"^num_images: got 39, expected 40 or more"):
        estimated(pairs(0, 39, 3, 0.5))


def test_fano_by_hand():
    """Four equally likely classes, one quarter wrong: 2 - h(1/4) - log2(3) / 4."""
    expected = 2 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75) - math.log2(3) / 4
    assert fano_bound(2, 0.25, 4) == pytest.approx(expected)
    assert expected == pytest.approx(0.79248, abs=1e-5)
    assert fano_bound(2, 0, 4) == 2
    assert fano_bound(2, 0.75, 4) == pytest.approx(0, abs=1e-12)  # guessing
    assert fano_bound(1, 0.5, 4) == 0  # never below
    assert fano_bound(1, 1.0, 2) == 1  # always wrong is as good as always right
    assert label_entropy([10, 10, 0, 20]) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="classes"):
        fano_bound(1, 0.5, 1)


def test_fano_is_met_by_a_symmetric_channel_and_never_exceeded():
    """I(Y;Y^) of uniform labels and errors spread evenly is the bound; errors that all go one way say more."""
    joint = torch.full((4, 4), 0.25 * 0.3 / 3, dtype=torch.float64)
    joint.fill_diagonal_(0.25 * 0.7)
    ordered = torch.diag(torch.full((4,), 0.25 * 0.7, dtype=torch.float64))
    ordered += torch.roll(torch.diag(torch.full((4,), 0.25 * 0.3, dtype=torch.float64)), 1, 1)

    def truth(p):
        outer = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
        return (p * (p / outer).log2()).nansum().item()

    assert fano_bound(2, 0.3, 4) == pytest.approx(truth(joint))
    assert fano_bound(2, 0.3, 4) < truth(ordered)


def test_fano_interval():
    known = fano(correct=75, counts=[25] * 4, classes=4)
    assert known["accuracy"] == 0.75
    assert known["interval"][0] < known["value"] < known["interval"][1]
    guessed = fano(correct=24, counts=[25] * 4, classes=4)
    assert guessed["interval"][0] == 0
    perfect = fano(correct=100, counts=[25] * 4, classes=4)
    assert perfect["value"] == perfect["interval"][1] == 2
