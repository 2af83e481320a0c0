"""Page of the demo: accuracies of the three classifiers with their intervals, and the curves of their training."""

import json
from pathlib import Path

from mimir_fast.demo.arms import ALPHA, ARMS, EPS, Arm, places
from mimir_fast.report import page
from mimir_fast.report import run_page as report
from mimir_fast.report.figures import draw_intervals

# Value, low, high, as fractions of 1.
Interval = tuple[float, float, float]


def write_demo_page(root: Path, seed: int, aa_images: int) -> Path:
    """Write root/report.html and each run's own report; returns the path of the page.  aa_images 0: AutoAttack was left out."""
    results = {arm: read_results(arm, root, seed, aa_images) for arm in ARMS}
    columns = ["clean", "PGD-20"] + ([same_images(aa_images), "AutoAttack"] if aa_images else [])
    rows = [(arm.name, *(_words(*results[arm][c]) for c in columns)) for arm in ARMS]
    names = [arm.name for arm in ARMS]
    bars = {c: [results[arm][c][0] for arm in ARMS] for c in columns}
    caption = "Accuracy with 95 % intervals (Wilson)."
    slices = (
        f"; AutoAttack: {aa_images} of them, beside PGD-20 on the same ones, far too few to rank anything"
        if aa_images
        else ""
    )
    sections = [
        page.table(["", *columns], rows),
        page.picture(root / "report", "accuracies", draw_intervals(names, bars), caption),
        page.note(
            f"297 test images{slices}. L∞ attacks within {EPS}/255, PGD's step {ALPHA}/255. All three are fine-tuned alike "
            "(adversarial training with one attack step, the same images, epochs and seed), the two pre-trainings see equally "
            f"many images; seed {seed}. One seed on a toy data set: what differs between rows says little about the method, "
            "see docs/experiments.md for more."
        ),
    ]
    sections += [section for arm in ARMS for section in _arm_sections(arm, root)]
    return page.write_page(
        root / "report.html", "MIMIR on handwritten digits", "pre-training, fine-tuning, attacks", sections
    )


def same_images(count: int) -> str:
    """Column of PGD-20 on the images that AutoAttack gets."""
    return f"PGD-20, those {count}"


def read_results(arm: Arm, root: Path, seed: int, aa_images: int) -> dict[str, tuple[Interval, int]]:
    """Column -> ((accuracy, low, high), images)."""
    at = places(arm, root)
    wide = json.loads((at.evaluation / "results.json").read_text(encoding="utf-8"))["attacks"]
    found = {"clean": _find(wide, "clean", seed), "PGD-20": _find(wide, "pgd-20", seed)}
    if aa_images:
        narrow = json.loads((at.autoattack / "results.json").read_text(encoding="utf-8"))["attacks"]
        found |= {same_images(aa_images): _find(narrow, "pgd-20", seed), "AutoAttack": _find(narrow, "aa", seed)}
    return found


def _find(attacks: dict, name: str, seed: int) -> tuple[Interval, int]:
    """((accuracy, low, high), images) of one of the demo's attacks."""
    # By its settings: a person may have added attacks to the results.
    ours = {"attack": name, "eps": EPS, "alpha": ALPHA, "restarts": 1, "seed": seed}
    entry = next(e for e in attacks.values() if all(e["settings"].get(k, v) == v for k, v in ours.items()))
    return (entry["accuracy"], *entry["interval95"]), entry["n"]


def _words(interval: Interval, n: int) -> str:
    value, low, high = (100 * v for v in interval)
    return f"{value:.1f} % ({low:.1f} to {high:.1f}, n = {n})"


def _arm_sections(arm: Arm, root: Path) -> list[str]:
    """Sections with the curves of an arm's runs; also writes the runs' own pages."""
    at = places(arm, root)
    sections = []
    if arm.attack:
        path = report.write_report(at.pretraining)
        samples = report.read_samples(at.pretraining / "samples.npz")
        sections += [page.heading(f"{arm.name}: pre-training"), *_figures(at.pretraining, "loss")]
        sections += [report.reconstructions(at.pretraining, samples), _more(path, root)]
    path = report.write_report(at.fine_tuning)
    sections += [page.heading(f"{arm.name}: fine-tuning"), *_figures(at.fine_tuning, "loss", "accuracy")]
    return [*sections, _more(path, root)]


def _more(path: Path, root: Path) -> str:
    return page.link("All figures and settings of this run", path.relative_to(root).as_posix())


def _figures(folder: Path, *names: str) -> list[str]:
    rows, _ = report.read_lines(folder / "metrics.jsonl", "update")
    epochs, _ = report.read_lines(folder / "log.txt", "epoch")
    return report.curves(folder, rows, epochs, names)
