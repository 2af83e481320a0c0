"""Estimates of mutual information with jackknife intervals.  m samples.

Three estimators: nhsic (no unit), renyi_1.01 and renyi_2 (bits), see mimir_fast.objectives.information.  None of them is zero
for independent variables: with few samples in many dimensions every sample is far from all others in both variables, which
looks like information.  So each value comes with its `null`, the same estimator on shuffled pairs, and their difference, the
`excess`.

Standard errors are those of the delete-a-group jackknife: 20 random groups of samples, each left out once.  Why not
-  the bootstrap: a sample that is drawn twice is its own perfect match in both variables, which these estimators take for
   dependence; with independent variables the excess of a bootstrap sample is far above zero;
-  halves of the samples: nhsic of many dimensions is near its ceiling, m, and varies less with fewer samples than a rescaling
   by m predicts.
The jackknife stays near m samples, and where it errs it errs upwards (Efron and Stein, The Jackknife Estimate of Variance,
1981): in simulations its 95 % intervals cover in 90 to 100 % of all cases, see tests/unit/analyze/test_estimates.py.
An interval is that of the estimator's expectation at m samples, not of the true information, from which every estimator is
far in so many dimensions.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.kernels.nhsic.reference import RIDGE, ridge_inverse
from mimir_fast.objectives.information import BANDWIDTH_ROWS, renyi_entropy, squared_distances

ORDERS = {"renyi_1.01": 1.01, "renyi_2": 2.0}
ESTIMATORS = ("nhsic", *ORDERS)
# Kernel width of nhsic, as in training.
SIGMA = 5.0
# Shuffled pairings that a null is the mean of.
SHIFTS = 5
# Groups of the jackknife.
GROUPS = 20
# Student's t with GROUPS - 1 degrees of freedom, 95 %.
T_95 = 2.093

# (variable, estimator, "value" | "null" | "excess"); ("latent", estimator, "value"): an entropy
Key = tuple[str, str, str]


class Variable(NamedTuple):
    """A variable by the squared distances of its samples, [m,m] float64, and the number of their dimensions."""

    distances: Tensor
    width: int


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    error: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        return self.value - T_95 * self.error, self.value + T_95 * self.error


class Marginal(NamedTuple):
    """What the estimators need of one variable.

    inverse     ridge inverse of nhsic [m,m]
    kernel      kernel matrix of trace 1 [m,m]
    entropies   by Rényi order, bits
    """

    inverse: Tensor
    kernel: Tensor
    entropies: dict[str, float]

    def shifted(self, places: int) -> "Marginal":
        """The same variable with its samples moved `places` earlier, in a circle; entropies do not depend on the order."""
        # Rows and columns together: permuting the samples permutes an inverse in the same way.
        inverse, kernel = (part.roll((-places, -places), (0, 1)) for part in (self.inverse, self.kernel))
        return Marginal(inverse, kernel, self.entropies)


def variable(rows_md: Tensor) -> Variable:
    """The variable of samples [m,d]."""
    return Variable(squared_distances(rows_md).cpu(), rows_md.shape[1])


def marginal(v: Variable, samples: Tensor, bandwidth: str) -> Marginal:
    """The marginal of samples int64 [b], in their order.

    nhsic's kernel is exp(-D / (2 sigma^2 d)), D the squared distances, sigma 5; that of the entropies is exp(-D / s), with
    s by `bandwidth`:
    squared    the mean of D over all pairs, which suits any unit and number of dimensions
    distance   training's rule (`bandwidth` of mimir_fast.objectives.information), the mean *distance*; with it images
               saturate: no two are alike, and estimates are near log2 m whatever the variables have in common
    """
    # Distances are computed once for all samples; a jackknife group is a selection of rows and columns.
    D, m = v.distances[samples][:, samples], len(samples)
    scale = D.sum() / (m * (m - 1)) if bandwidth == "squared" else D[:BANDWIDTH_ROWS].sqrt().mean()
    kernel = torch.exp(-D / scale.clamp_min(torch.finfo(D.dtype).tiny)) / m
    return Marginal(ridge_inverse(torch.exp(-D / (2 * SIGMA**2 * v.width))), kernel, entropies(kernel))


def entropies(kernel: Tensor) -> dict[str, float]:
    """Rényi entropies of a kernel matrix of trace 1, bits."""
    return {name: renyi_entropy(kernel, order).item() for name, order in ORDERS.items()}


def information(a: Marginal, b: Marginal) -> dict[str, float]:
    """Mutual information of paired samples by every estimator, as mimir_fast.objectives.information.nhsic and renyi_mi."""
    m = len(a.kernel)
    c = RIDGE * m
    # The penalty rewritten with ridge inverses alone (docs/fidelity.md): one inverse per variable serves all pairs.
    nhsic = m - c * a.inverse.trace() - c * b.inverse.trace() + c**2 * (a.inverse * b.inverse).sum()
    joint = entropies(a.kernel * b.kernel * m)
    return {"nhsic": nhsic.item(), **{name: a.entropies[name] + b.entropies[name] - joint[name] for name in ORDERS}}


def null(a: Marginal, b: Marginal) -> dict[str, float]:
    """`information` of shuffled pairs: the mean over shifts of `b` by 1, ..., SHIFTS places, for samples in random order."""
    # Shifts and not new permutations: without a group of samples nearly all pairs are the same as with it, so that the choice
    # of pairs does not add to the jackknife's error.
    values = [information(a, b.shifted(places)) for places in range(1, SHIFTS + 1)]
    return {name: sum(value[name] for value in values) / SHIFTS for name in ESTIMATORS}


def measure(variables: dict[str, Variable], samples: Tensor, bandwidth: str) -> dict[Key, float]:
    """All values of an analysis, from samples int64 [b] in random order; variables: "latent" and those to compare it with."""
    # Each variable's decompositions once, not once per pair and shift.
    own = {name: marginal(v, samples, bandwidth) for name, v in variables.items()}
    latent = own.pop("latent")
    numbers = {("latent", name, "value"): latent.entropies[name] for name in ORDERS}
    for name, one in own.items():
        value, chance = information(one, latent), null(one, latent)
        for estimator in ESTIMATORS:
            numbers[name, estimator, "value"] = value[estimator]
            numbers[name, estimator, "null"] = chance[estimator]
            numbers[name, estimator, "excess"] = value[estimator] - chance[estimator]
    return numbers


def estimate(
    variables: dict[str, Variable], bandwidth: str, generator: torch.Generator, tick: Callable[[], None] = lambda: None
) -> dict[Key, Estimate]:
    """`measure` on all samples, with standard errors; tick is called after each of GROUPS + 1 passes.

    Raises ValueError for fewer than 2 * GROUPS samples.
    """
    m = len(variables["latent"].distances)
    if m < 2 * GROUPS:
        raise ValueError(f"num_images: got {m}, expected {2 * GROUPS} or more: {GROUPS} groups are left out in turn")
    order = torch.randperm(m, generator=generator)
    # Groups of equal size, up to one sample, and independent of the order that pairs up shuffled samples.
    group = (torch.arange(m) % GROUPS)[torch.randperm(m, generator=generator)]
    parts = []
    # -1: the estimate itself, with no group left out.
    for left_out in range(-1, GROUPS):
        parts.append(measure(variables, order[group != left_out], bandwidth))
        tick()
    return {key: Estimate(parts[0][key], jackknife_error([part[key] for part in parts[1:]])) for key in parts[0]}


def jackknife_error(values: list[float]) -> float:
    """Delete-a-group jackknife: standard error of a statistic from its values without each of n equally large groups."""
    n, mean = len(values), sum(values) / len(values)
    return math.sqrt((n - 1) / n * sum((value - mean) ** 2 for value in values))
