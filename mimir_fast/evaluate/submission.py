"""The file that RobustBench asks for with a new model: model_info/DATASET/THREAT_MODEL/NAME.json.

Source: RobustBench's README, "Adding a new model", and its leaderboard's files.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from mimir_fast.attacks.named import SEVERAL, Attack
from mimir_fast.checkpoints.atomic import write_text_atomically
from mimir_fast.checkpoints.robustbench import ZOO_DATASETS
from mimir_fast.checkpoints.trained_models import Trained
from mimir_fast.evaluate.entries import attack_of

# What RobustBench evaluates: images of a data set, and the radius (1/255, or the L2 norm) by data set and threat model.
IMAGES = {"cifar10": 10_000, "cifar100": 10_000, "imagenet": 5_000}
RADII = {("cifar10", "Linf"): 8, ("cifar100", "Linf"): 8, ("imagenet", "Linf"): 4, ("cifar10", "L2"): 0.5}


def is_asked(words: str) -> bool:
    """Whether --attacks names what RobustBench evaluates."""
    return any(word.strip() in SEVERAL for word in words.split(","))


def write_submissions(data: dict, trained: Trained, keys: Iterable[str], folder: Path, name: str) -> list[str]:
    """Write the file of each AutoAttack of an evaluation; returns lines that name it and what is left to do.

    data    what results.json holds; keys: those of the evaluation's attacks in it
    name    of the file: RobustBench's are called AuthorYearFirstwordoftitle
    Raises OSError if the disk refuses.
    """
    lines = []
    for key in keys:
        entry = data["attacks"][key]
        attack = attack_of(entry["settings"])
        if attack.is_ensemble:
            threat = "L2" if attack.in_l2 else "Linf"
            images = data["identity"]["images"]
            path = folder / "model_info" / images["dataset"] / threat / f"{name}.json"
            facts = model_info(data["attacks"]["clean"], entry, attack, trained, images["dataset"])
            write_text_atomically(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
            left = ", ".join(key for key, value in facts.items() if value is None)
            lines.append(f"robustbench: {path}; fill in {left}, and name it AuthorYearFirstwordoftitle.json")
            lines += [f"robustbench: {line}" for line in deviations(images, attack, threat)]
    return lines


def model_info(clean: dict, robust: dict, attack: Attack, trained: Trained, dataset: str) -> dict:
    """The fields of RobustBench's file, in its order; None for what only the submitter knows."""
    args = trained.args
    # Percent as text with two decimals, as in the files of the leaderboard.
    accuracy = f"{100 * robust['accuracy']:.2f}"
    return {
        "link": None,
        "name": None,
        "authors": None,
        # Generated images, the only ones that a training of ours adds; a file of others does not say it.
        "additional_data": bool(args["use_edm"]) if "use_edm" in args else None,
        # Passes that classify one image: more than one is for models that average over random draws.
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": None,
        "architecture": f"{args['model']}, patches of {args['patch_size']} pixels",
        "eps": f"{attack.eps:g}" if attack.in_l2 else f"{attack.eps:g}/255",
        "clean_acc": f"{100 * clean['accuracy']:.2f}",
        # What the authors claim, by whatever attack; here that is AutoAttack's number too.
        "reported": accuracy,
        "autoattack_acc": accuracy,
    }


def deviations(images: dict, attack: Attack, threat: str) -> list[str]:
    """Lines about what differs from RobustBench's own evaluation."""
    dataset, n = images["dataset"], images["n"]
    if dataset not in ZOO_DATASETS:
        return [f"{dataset} is none of its data sets ({', '.join(ZOO_DATASETS)})"]
    lines = []
    if (usual := RADII.get((dataset, threat))) is None:
        lines.append(f"it has no list of {threat} on {dataset}")
    elif attack.eps != usual:
        unit = "" if attack.in_l2 else "/255"
        lines.append(f"its radius on {dataset} is {usual:g}{unit}, this one is {attack.eps:g}{unit}")
    if n != IMAGES[dataset]:
        listed = " of its list (--image_list)" if dataset == "imagenet" else ""
        lines.append(f"it counts {IMAGES[dataset]:,} images{listed}, this evaluation {n:,}")
    elif dataset == "imagenet" and not images["image_list"]:
        lines.append("it counts the images of its list; pass it as --image_list")
    return lines
