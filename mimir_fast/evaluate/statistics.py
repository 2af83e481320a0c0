"""Statistics of accuracies: intervals and paired comparisons."""

import math

import numpy as np

Z_95 = 1.959963984540054


def wilson(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a proportion, 95 % by default; (0, 1) for n = 0.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / scale, (middle + half) / scale
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == n else high)


def sign_test(more: int, fewer: int) -> float:
    """Sign test: one-sided p-value of `more` against `fewer` if both were equally likely.

    This is McNemar's exact test if the two count the images on which two attacks disagree, once in each direction.
    """
    n = more + fewer
    # Whole numbers up to the one division: from n = 1030 on the binomials exceed what a float holds.
    return sum(math.comb(n, k) for k in range(more, n + 1)) / 2**n


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of [n] numbers and its standard error (infinite for fewer than two)."""
    if len(values) < 2:
        return float(values.mean()) if len(values) else math.nan, math.inf
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
