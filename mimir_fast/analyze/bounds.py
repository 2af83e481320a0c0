"""Fano's inequality: the least mutual information that a classifier's accuracy proves."""

import math

from mimir_fast.evaluate.statistics import wilson


def label_entropy(counts: list[int]) -> float:
    """Entropy H(Y) in bits of labels; counts: how often each class occurs."""
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts if count)


def fano_bound(entropy: float, error: float, classes: int) -> float:
    """Fano's lower bound of I(Y; prediction) in bits, for a classifier's error rate on labels of this entropy.

    I(Y;Y^) = H(Y) - H(Y|Y^) >= H(Y) - h(e) - e log2(O - 1), h the binary entropy, O classes; never below 0.  By the
    data-processing inequality it also bounds I(Y;z) of the features z and I(Y;x) of the image that the prediction is made from.
    Source: Fano, Transmission of Information, 1961; Cover and Thomas, Elements of Information Theory, 2006, theorem 2.10.1.
    Raises ValueError for fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"classes: got {classes}, expected 2 or more")
    binary = -sum(p * math.log2(p) for p in (error, 1 - error) if p > 0)
    return max(0.0, entropy - binary - error * math.log2(classes - 1))


def fano(correct: int, counts: list[int], classes: int) -> dict:
    """Fano's bound for a number of correct predictions, with an interval that follows from the accuracy's (Wilson, 95 %).

    counts   how often each class occurs; classes: how many the classifier distinguishes
    """
    n, entropy = sum(counts), label_entropy(counts)
    low, high = (1 - share for share in reversed(wilson(correct, n)))
    ends = [fano_bound(entropy, error, classes) for error in (low, high)]
    # The bound is convex in the error and lowest at that of guessing: an interval around it has its minimum inside.
    guessing = (classes - 1) / classes
    least = fano_bound(entropy, guessing, classes) if low <= guessing <= high else min(ends)
    value = fano_bound(entropy, 1 - correct / n, classes)
    return {"accuracy": correct / n, "value": value, "interval": [least, max(ends)], "label_entropy": entropy}
