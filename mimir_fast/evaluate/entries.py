"""Entries of results.json, one per attack and its settings, and the same as a table."""

import datetime
import platform
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import nn
from tqdm import tqdm

from mimir_fast.attacks.named import Attack, make_attack
from mimir_fast.checkpoints.hashing import tensors_hash
from mimir_fast.evaluate.autoattack import version
from mimir_fast.evaluate.records import Record
from mimir_fast.evaluate.rounds import Sizes, Subject
from mimir_fast.evaluate.statistics import wilson

# Values that are left out of an attack's key.
USUAL = {"restarts": 1, "seed": 0, "batch": 64, "group": 64}


def settings_of(attack: Attack, sizes: Sizes, seed: int) -> dict:
    """Everything that decides an attack's result."""
    settings = attack.settings()
    # Neither of them draws a random number.
    if attack.kind not in ("clean", "fgsm"):
        settings["seed"] = seed
    if attack.batch_dependent:
        settings["batch"] = sizes.batch
    if attack.is_ensemble:
        settings["group"] = sizes.aa
    return settings


def attack_of(settings: dict) -> Attack:
    """The attack with these settings."""
    eps, alpha = settings.get("eps", 0.0), settings.get("alpha", 0.0)
    return make_attack(settings["attack"], eps, alpha, settings.get("restarts", 1), settings.get("weight", 0.0))


def key_of(settings: dict) -> str:
    """Key of an attack in results.json, such as "pgd-20 eps=8 alpha=2": its settings other than the usual ones."""
    words = [f"{name}={_number(value)}" for name, value in settings.items() if name not in ("attack", "steps")]
    usual = {f"{name}={_number(value)}" for name, value in USUAL.items()}
    return " ".join([settings["attack"], *(word for word in words if word not in usual)])


def _number(value: float) -> str:
    # Seeds have more than the six digits of :g.
    return str(value) if isinstance(value, int) else f"{value:.12g}"


def summary(record: Record, rounds: Sequence[str]) -> dict:
    """Accuracy with its 95 % interval (Wilson), and the accuracy after every round where there are several."""
    n, correct = len(record.indices), int(record.correct.sum())
    entry = {"accuracy": correct / n, "correct": correct, "n": n, "interval95": list(wilson(correct, n))}
    if len(rounds) > 1:
        # ROBUST exceeds every round, and 0 stands for misclassified unattacked: what is above r stands after round r.
        entry["after"] = {name: float((record.broken > r).mean()) for r, name in enumerate(rounds, 1)}
    return entry | {"seconds": round(record.seconds, 3)}


def circumstances(attack: Attack, subject: Subject, processes: int = 1) -> dict:
    """The checkpoint, versions, device, number of processes if there are several, and date of a result."""
    versions = {name: metadata.version(name) for name in ("mimir-fast", "torch")}
    if attack.is_ensemble:
        versions["autoattack"] = f"{version()} standard"
    on_cuda = subject.device.type == "cuda"
    return {
        "checkpoint": subject.source,
        "versions": versions | {"python": platform.python_version()},
        "device": torch.cuda.get_device_name(subject.device) if on_cuda else f"cpu ({platform.machine()})",
        **({"processes": processes} if processes > 1 else {}),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def model_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name, whatever file they were in."""
    return tensors_hash({**dict(model.named_parameters()), **dict(model.named_buffers())})


def table(data: dict) -> list[str]:
    """results.json as lines: every attack with its accuracy and interval, then every check that is not passed."""
    images = data["identity"]["images"]
    rows = [("attack", "accuracy", "95 % interval", "images", "time")]
    for key, entry in data["attacks"].items():
        low, high = entry["interval95"]
        time = tqdm.format_interval(entry["seconds"])
        rows.append((key, f"{entry['accuracy']:.2%}", f"{low:.2%} - {high:.2%}", str(entry["n"]), time))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    l2 = ", of -l2 the norm" if any(attack_of(entry["settings"]).in_l2 for entry in data["attacks"].values()) else ""
    lines = [
        f"{data['identity']['model']['source']} on {images['dataset']} {images['split']} (eps, alpha in 1/255{l2})"
    ]
    lines += [
        f"  {row[0]:<{widths[0]}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:])) for row in rows
    ]
    for finding in data["checks"]:
        if finding["status"] == "warning":
            lines.append(f"warning: {finding['check']}: {finding['text']}")
    undecided = sum(finding["status"] == "undecided" for finding in data["checks"])
    if undecided:
        lines.append(f"{undecided} of {len(data['checks'])} sanity checks need more images to mean anything")
    return lines
