"""Report of a run: one self-contained HTML page, and its figures as PNGs (`mimir-fast report RUN_DIR`).

Reads metrics.jsonl (required), log.txt, config.yaml and, of a pre-training, samples.npz; the page says which are missing.
"""

import json
import math
import statistics
import zipfile
from pathlib import Path

import numpy as np
import yaml

from mimir_fast.report import page
from mimir_fast.report.figures import FINETUNE_FIGURES, PRETRAIN_FIGURES, attacked, draw_reconstructions

COLUMNS = ("epoch", "loss", "recon", "mi", "lr", "images_per_s", "data_wait", "skipped_penalties")
# In log.txt, one row per epoch.
ACCURACIES = ("test_acc1", "robust_acc1", "val_acc1", "val_robust_acc1")
SAMPLE_ARRAYS = ("clean", "adv", "recon", "mask", "patch_size", "update", "eps_255")


class ReportError(ValueError):
    """A folder without a run; one line that says what is missing and what to do."""


def read_lines(path: Path, key: str) -> tuple[list[dict], int]:
    """JSON lines sorted by `key`, and the number of unreadable lines that were skipped."""
    # A resumed run writes some updates again: of two rows with one key the later one counts.
    rows: dict[float, dict] = {}
    skipped = 0
    if path.exists():
        # A kill can cut a line in the middle of a character.
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                    rows[float(row[key])] = {"epoch": math.nan, **row}
                except (ValueError, KeyError, TypeError):
                    skipped += 1
    return [rows[value] for value in sorted(rows)], skipped


def column(rows: list[dict], key: str) -> np.ndarray:
    """One value per row as float64; NaN where it is absent or null."""
    return np.array([math.nan if row.get(key) is None else float(row[key]) for row in rows])


def summary(rows: list[dict], epochs: list[dict], samples: dict | None) -> list[tuple[str, str]]:
    """Rows (name, value) of the table at the top of the page."""
    rate = [row["images_per_s"] for row in rows if row.get("images_per_s") is not None]
    memory = column(rows, "peak_memory_gib")
    # Only pre-training logs a reconstruction loss.
    pretraining = "recon" in rows[-1]
    table = [("epochs · updates", f"{rows[-1]['epoch']:.2f} · {rows[-1]['update']}")]
    if pretraining:
        table.append(("reconstruction loss, first → last", _first_to_last(column(rows, "recon"))))
        table.append(("penalty, first → last", _first_to_last(column(rows, "mi"))))
    else:
        table.append(("training loss, first → last", _first_to_last(column(rows, "loss"))))
        table += [(f"{name} [%], last", _number(_newest(epochs, name))) for name in ACCURACIES if _known(epochs, name)]
    table += [
        ("learning rate, last", _number(rows[-1].get("lr"))),
        ("images/s, median", _number(statistics.median(rate) if rate else None)),
        ("peak memory", f"{np.nanmax(memory):.2f} GiB" if np.isfinite(memory).any() else "unknown"),
    ]
    if pretraining:
        table.append(("skipped penalties", str(_last(rows, "skipped_penalties"))))
    table.append(("skipped updates", str(_last(rows, "skipped_steps"))))
    if epochs:
        table.append(("unreadable images skipped", str(_last(epochs, "bad_files"))))
    if samples is not None:
        table.append(("largest perturbation", f"{255 * np.abs(samples['adv'] - samples['clean']).max():.2f}/255"))
    return table


def write_report(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html and RUN_DIR/report/*.png; returns the page's path.

    Raises ReportError if the folder is missing or has no metrics.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ReportError(f"run_dir: no folder {folder}; give the --output_dir of a run")
    rows, skipped = read_lines(folder / "metrics.jsonl", "update")
    if not rows:
        raise ReportError(f"run_dir: {folder / 'metrics.jsonl'} is missing or empty; give the --output_dir of a run")
    epochs, _ = read_lines(folder / "log.txt", "epoch")
    config = _read_config(folder / "config.yaml")
    pretraining = "recon" in rows[-1]
    samples = read_samples(folder / "samples.npz") if pretraining else None
    sections = [page.facts(summary(rows, epochs, samples))]
    if skipped:
        sections.append(page.note(f"{skipped} unreadable line(s) of metrics.jsonl were skipped (cut by a kill)."))
    sections += curves(folder, rows, epochs)
    if pretraining:
        sections += [page.heading("What the model sees and predicts"), reconstructions(folder, samples)]
    sections.append(page.heading("Configuration"))
    sections.append(page.settings(config) if config else page.note("No readable config.yaml in this folder."))
    title = f"{config.get('model', 'model')} on {config.get('dataset', 'images')}"
    lead = f"{'MIMIR pre-training' if pretraining else 'Fine-tuning'}, {folder.resolve().name}"
    return page.write_page(folder / "report.html", title, lead, sections)


def _read_config(path: Path) -> dict:
    # A report without the configuration is better than none.
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def read_samples(path: Path) -> dict | None:
    """The arrays of samples.npz; None if it is missing, cut or lacks one."""
    try:
        with np.load(path) as arrays:
            # Read here, inside of the try: np.load opens the archive, and a cut member is only found when it is read.
            return {name: arrays[name] for name in SAMPLE_ARRAYS}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def curves(folder: Path, rows: list[dict], epochs: list[dict], names: tuple[str, ...] = ()) -> list[str]:
    """Sections with the figures of a run, from the rows of its metrics and of its log; names: which figures, all by default."""
    columns = {key: column(rows, key) for key in COLUMNS}
    columns |= {key: column(epochs, key) for key in ACCURACIES}
    # log.txt numbers epochs from 0, and its accuracies are those at an epoch's end.
    columns["epochs"] = column(epochs, "epoch") + 1
    figures, sections = PRETRAIN_FIGURES if "recon" in rows[-1] else FINETUNE_FIGURES, []
    for name in names or figures:
        title, caption, draw = figures[name]
        figure = draw(columns)
        sections.append(page.heading(title))
        sections.append(
            page.note("None in this run so far.")
            if figure is None
            else page.picture(folder / "report", name, figure, caption)
        )
    return sections


def reconstructions(folder: Path, samples: dict | None) -> str:
    """The pictures of a pre-training's samples."""
    if samples is None:
        return page.note("No readable samples.npz yet: it is written beside the first checkpoint.")
    attack = f"The attack may change each pixel by {float(samples['eps_255']):g}/255"
    elsewhere = "the adversarial input"
    if not attacked(samples):
        attack, elsewhere = "No attack", "the image"
    caption = (
        f"Update {int(samples['update'])}. {attack}; grey patches were removed before encoding. Right: predicted where "
        f"removed, {elsewhere} elsewhere; a model trained with norm_pix_loss predicts normalised patches, shown with the clean "
        "patch's mean and deviation."
    )
    return page.picture(folder / "report", "reconstructions", draw_reconstructions(samples), caption)


def _first_to_last(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known[0]:.4g} → {known[-1]:.4g}" if len(known) else "none"


def _known(epochs: list[dict], name: str) -> bool:
    return _newest(epochs, name) is not None


def _newest(epochs: list[dict], name: str) -> float | None:
    return next((row[name] for row in reversed(epochs) if row.get(name) is not None), None)


def _last(rows: list[dict], key: str) -> int:
    return int(rows[-1].get(key) or 0)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
