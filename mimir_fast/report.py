"""mimir-fast report RUN_DIR: one self-contained HTML page, and its figures as PNGs, from what a run wrote.

Reads metrics.jsonl (required), log.txt, config.yaml and samples.npz; what is absent is said in its place.
"""

import argparse
import base64
import html
import json
import math
import statistics
import sys
import zipfile
from pathlib import Path

import numpy as np
import yaml

from mimir_fast.figures import FIGURES, draw_reconstructions

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.lead, figcaption, .note { color: var(--soft); } figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
img { max-width: 100%; background: #fff; border-radius: 6px; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } td { font-variant-numeric: tabular-nums; }
.config { columns: 2; column-gap: 2rem; }
.config div { border-bottom: 1px solid var(--line); break-inside: avoid; display: flex; justify-content: space-between;
  gap: 1rem; font-size: .88rem; }
.config span:last-child { overflow-wrap: anywhere; text-align: right; }
@media print { body { margin: 0; max-width: none; } }
"""


COLUMNS = ("epoch", "loss", "recon", "mi", "lr", "images_per_s", "data_wait", "skipped_penalties")
SAMPLE_ARRAYS = ("clean", "adv", "recon", "mask", "patch_size", "update", "eps_255")


class ReportError(ValueError):
    """A folder that holds no run; one line that says what is missing and what to do."""


def read_lines(path: Path, key: str) -> tuple[list[dict], int]:
    """JSON lines sorted by `key`, the later of two equal ones winning, and the number of unreadable lines skipped."""
    rows, skipped = {}, 0
    if path.exists():
        with open(path, errors="replace") as file:
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
    """The table at the top: name and value of what a reader asks first."""
    rate = [row["images_per_s"] for row in rows if row.get("images_per_s") is not None]
    memory = column(rows, "peak_memory_gib")
    table = [
        ("epochs · updates", f"{rows[-1]['epoch']:.2f} · {rows[-1]['update']}"),
        ("reconstruction loss, first → last", _first_to_last(column(rows, "recon"))),
        ("penalty, first → last", _first_to_last(column(rows, "mi"))),
        ("learning rate, last", _number(rows[-1].get("lr"))),
        ("images/s, median", _number(statistics.median(rate) if rate else None)),
        ("peak memory", f"{np.nanmax(memory):.2f} GiB" if np.isfinite(memory).any() else "unknown"),
        ("skipped penalties · skipped updates", f"{_last(rows, 'skipped_penalties')} · {_last(rows, 'skipped_steps')}"),
    ]
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
        raise ReportError(f"run_dir: no folder {folder}; give the --output_dir of a pre-training run")
    rows, skipped = read_lines(folder / "metrics.jsonl", "update")
    if not rows:
        raise ReportError(f"run_dir: {folder / 'metrics.jsonl'} is missing or empty; give the --output_dir of a run")
    epochs, _ = read_lines(folder / "log.txt", "epoch")
    config = _read_config(folder / "config.yaml")
    samples = _read_samples(folder / "samples.npz")
    (folder / "report").mkdir(exist_ok=True)
    sections = [_table(summary(rows, epochs, samples))]
    if skipped:
        sections.append(_note(f"{skipped} unreadable line(s) of metrics.jsonl were skipped (cut by a kill)."))
    sections += _curves(folder, rows)
    sections += ["<h2>What the model sees and predicts</h2>", _reconstructions(folder, samples)]
    sections += ["<h2>Configuration</h2>", _config(config)]
    page = folder / "report.html"
    temporary = page.with_name("report.html.tmp")
    temporary.write_text(_page(config, folder, sections))
    temporary.replace(page)
    return page


def _read_config(path: Path) -> dict:
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _read_samples(path: Path) -> dict | None:
    """The arrays of samples.npz; None if it is missing, cut or lacks one."""
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in SAMPLE_ARRAYS}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _curves(folder: Path, rows: list[dict]) -> list[str]:
    columns = {key: column(rows, key) for key in COLUMNS}
    sections = []
    for name, (title, caption, draw) in FIGURES.items():
        figure = draw(columns)
        sections.append(f"<h2>{html.escape(title)}</h2>")
        sections.append(_note("No penalty in this run.") if figure is None else _figure(folder, name, figure, caption))
    return sections


def _reconstructions(folder: Path, samples: dict | None) -> str:
    if samples is None:
        return _note("No readable samples.npz yet: it is written beside the first checkpoint.")
    caption = (
        f"Update {int(samples['update'])}. The attack may change each pixel by {float(samples['eps_255']):g}/255; grey patches "
        "were removed before encoding. Right: predicted where removed, the adversarial input elsewhere; a model trained with "
        "norm_pix_loss predicts normalised patches, shown with the clean patch's mean and deviation."
    )
    return _figure(folder, "reconstructions", draw_reconstructions(samples), caption)


def _figure(folder: Path, name: str, figure, caption: str) -> str:
    path = folder / "report" / f"{name}.png"
    figure.savefig(path, dpi=110)
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _page(config: dict, folder: Path, sections: list[str]) -> str:
    title = html.escape(f"{config.get('model', 'model')} on {config.get('dataset', 'images')}")
    head = (
        f'<meta charset="utf-8"><title>{title} · mimir_fast</title><meta name="viewport" content="width=device-width">'
    )
    lead = f"MIMIR pre-training, {html.escape(folder.resolve().name)}"
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head>{head}<style>{STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="lead">{lead}</p>',
        *sections,
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def _config(config: dict) -> str:
    if not config:
        return _note("No readable config.yaml in this folder.")
    pairs = ((html.escape(str(name)), html.escape(str(value))) for name, value in config.items())
    return '<div class="config">' + "".join(f"<div><span>{n}</span><span>{v}</span></div>" for n, v in pairs) + "</div>"


def _first_to_last(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{known[0]:.4g} → {known[-1]:.4g}" if len(known) else "none"


def _last(rows: list[dict], key: str) -> int:
    return int(rows[-1].get(key) or 0)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"


def main(argv: list[str] | None = None) -> int:
    """`mimir-fast report RUN_DIR`: returns 0, or 1 with one line when the folder holds no run."""
    parser = argparse.ArgumentParser(
        prog="mimir-fast report",
        description="Draw a run: loss, penalty, learning rate, throughput, and clean/adversarial/reconstructed images.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the --output_dir of a run, finished or going on")
    args = parser.parse_args(argv)
    try:
        page = write_report(args.run_dir)
    except (ReportError, OSError) as error:
        print(f"mimir-fast report: error: {error}", file=sys.stderr)
        return 1
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
