"""Means over seeds and paired differences, with 95 % intervals of Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t

from mimir_fast.evaluate.statistics import mean_and_error


class Interval(NamedTuple):
    """A mean over n seeds with its 95 % interval, infinite for fewer than two."""

    mean: float
    low: float
    high: float
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval; assumes that seeds differ as draws of a normal distribution do."""
    mean, error = mean_and_error(np.asarray(values, float))
    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * error if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


def paired(values: dict[int, float], reference: dict[int, float]) -> Interval:
    """The same of the differences between two arms, seed by seed; seeds that one of them lacks are left out."""
    # A seed decides initialisation, order and crops of both: what it does to both is not in the difference.
    seeds = sorted(values.keys() & reference.keys())
    return interval([values[seed] - reference[seed] for seed in seeds])
