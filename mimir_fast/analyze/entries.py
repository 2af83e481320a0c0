"""Entries of analysis.json, one per checkpoint, and the same as a table."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from mimir_fast.analyze.estimates import ESTIMATORS, ORDERS, Estimate, Key
from mimir_fast.analyze.seen import Perturbation
from mimir_fast.checkpoints.atomic import write_text_atomically
from mimir_fast.checkpoints.trained_models import Trained

VARIABLES = {"x": "I(x;z)", "x_adv": "I(x_adv;z)", "delta": "I(delta;z)"}
# Name of the series of checkpoints that were not given as a run's folder.
FILES = "checkpoints"
# Fraction of log2 m from which a null shows that there are too few samples for the estimator.
SATURATED = 0.95
NOTES = {
    "z": "features of the adversarial images, all tokens of all patches",
    "delta": "x_adv - x, a function of x and the model: information about it may be information about x",
    "null": "the same estimator on pairs that do not belong together",
    "excess": "value - null",
    "error, interval": "delete-a-group jackknife, 95 %, of the estimator's expectation at this many images",
    "entropy": "matrix-based entropy of z in bits; an estimate of an upper bound of I(.;z), not a proven bound",
    "fano": "least I(y; prediction) in bits that the accuracy implies; interval through that of the accuracy (Wilson, 95 %)",
    "units": "renyi_* and fano in bits; nhsic has no unit and is below the number of images",
}


def entry(trained: Trained, how: Perturbation, num_images: int, estimates: dict[Key, Estimate], bounds: dict) -> dict:
    """Entry of one checkpoint in analysis.json."""
    numbers = {key: {"value": e.value, "error": e.error, "interval": list(e.interval)} for key, e in estimates.items()}
    information = {
        name: {est: {part: numbers[name, est, part] for part in ("value", "null", "excess")} for est in ESTIMATORS}
        for name in VARIABLES
    }
    return {
        "checkpoint": trained.source,
        "epoch": trained.epoch,
        "model": trained.args["model"],
        "attack": asdict(how),
        "num_images": num_images,
        "information": information,
        "entropy": {name: numbers["latent", name, "value"] for name in ORDERS},
        "fano": bounds,
    }


def _epoch(number: int | None) -> str:
    if number is None:
        return ""
    # A checkpoint saved within the first epoch is numbered -1: no epoch was finished.
    return f"epoch {number}, " if number >= 0 else "in its first epoch, "


def write_json(path: Path, config, results: list[dict], planned: int) -> None:
    """Replace the file as a whole."""
    state = {"notes": NOTES, "settings": config.flat(), "complete": len(results) == planned, "checkpoints": results}
    write_text_atomically(path, json.dumps(state, indent=1) + "\n")


def table(results: list[dict]) -> Iterator[str]:
    """Lines of a table: for every checkpoint the excess over shuffled pairs with half its interval's width, then the bounds."""
    # No estimate in bits can exceed log2 of the number of samples.
    num_images = max(result["num_images"] for result in results)
    ceiling = math.log2(num_images)
    yield f"excess over shuffled pairs ± 95 %, {num_images} images; in brackets the value itself"
    yield f"{'':<14}" + "".join(f"{name + unit:>32}" for name, unit in zip(ESTIMATORS, ("", " [bit]", " [bit]")))
    for result in results:
        yield f"{result['checkpoint']} ({_epoch(result['epoch'])}{result['model']})"
        for name, words in VARIABLES.items():
            cells = [_cell(result["information"][name][est]) for est in ESTIMATORS]
            yield f"  {words:<12}" + "".join(f"{cell:>32}" for cell in cells)
        entropy = result["entropy"]
        cells = [f"{entropy[est]['value']:.3f} ± {_half(entropy[est]):.3f}" for est in ORDERS]
        yield f"  {'H(z)':<12}" + "".join(f"{cell:>32}" for cell in ["", *cells])
        for name, bound in result["fano"].items():
            low, high = bound["interval"]
            yield (
                f"  I(y;prediction) >= {bound['value']:.3f} bit ({low:.3f} to {high:.3f}), {name}: accuracy "
                f"{bound['accuracy']:.1%} of labels with {bound['label_entropy']:.3f} bit (Fano)"
            )
    yield f"H(z) estimates an upper bound of every I(.;z); it is no proof.  Ceiling of the estimates: {ceiling:.3f} bit"
    full = {
        (VARIABLES[name], est)
        for result in results
        for name in VARIABLES
        for est in ORDERS
        if result["information"][name][est]["null"]["value"] > SATURATED * ceiling
    }
    if full:
        words = ", ".join(f"{words} {est}" for words, est in sorted(full))
        yield f"saturated, even shuffled pairs are near the ceiling: {words}; use more images or --bandwidth squared"


def _half(number: dict) -> float:
    return (number["interval"][1] - number["interval"][0]) / 2


def _cell(parts: dict) -> str:
    excess = parts["excess"]
    return f"{excess['value']:.4g} ± {_half(excess):.2g} [{parts['value']['value']:.4g}]"
