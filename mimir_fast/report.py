"""mimir-fast report: a run's folder -> RUN_DIR/report.html (one file, pictures inside) and RUN_DIR/report/*.png.

Also `python -m mimir_fast.report RUN_DIR`.  Data flow: report_data.py reads and checks, report_figures.py draws,
report_html.py writes the page; this file decides what is said.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mimir_fast import report_figures as figures
from mimir_fast.config import STAGES, PretrainConfig
from mimir_fast.report_data import Metrics, Samples, number, read_config, read_epochs, read_metrics, read_samples
from mimir_fast.report_html import Section, page

LAST = 100  # updates in the mean beside a last value


def main(argv: list[str] | None = None) -> int:
    """Write the report of one run; returns the exit status: 0 written, 1 nothing to report on or not writable."""
    parser = argparse.ArgumentParser(
        prog="mimir-fast report",
        description="Write RUN_DIR/report.html, one self-contained page with the curves, sample reconstructions and "
        "configuration of a pre-training run, and the same pictures as RUN_DIR/report/*.png. Works on a running, "
        "stopped or killed run; run it again for a newer report.",
        epilog="Reads metrics.jsonl (required), log.txt, config.yaml and samples.npz; the page says which are missing.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the --output_dir of a mimir-fast pretrain run")
    run_dir = parser.parse_args(argv).run_dir
    try:
        path = write_report(run_dir)
    except (ValueError, OSError) as error:
        print(f"mimir-fast report: error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def write_report(run_dir: str | Path) -> Path:
    """Write report.html and report/{loss,penalty,lr,throughput,reconstructions}.png into a run's folder; returns the page.

    A figure there is nothing to draw for is left out (and an older one of that name removed); the page says why.
    Raises ValueError if the folder or its metrics are missing, OSError if it cannot be read or written.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ValueError(f"run_dir: {folder} is no folder; pass the --output_dir of a mimir-fast pretrain run")
    if not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"run_dir: {folder / 'metrics.jsonl'} is missing; pass the --output_dir of a mimir-fast pretrain run "
            "that has done its first updates"
        )
    metrics, epochs = read_metrics(folder / "metrics.jsonl"), read_epochs(folder / "log.txt")
    config, no_config = _or_reason(read_config, folder / "config.yaml")
    samples, no_samples = _or_reason(read_samples, folder / "samples.npz")
    settings = config or {}
    sections = [*curve_sections(metrics, settings), sample_section(samples, no_samples, settings)]
    text = page(
        title=_title(settings, folder),
        lead=f"MIMIR pre-training, report up to update {metrics.update[-1]:,}",
        notes=reading_notes(metrics, epochs),
        summary=[*summary_rows(metrics, epochs, settings), *sample_rows(samples, no_samples, settings)],
        sections=sections,
        configuration=no_config if config is None else grouped_configuration(config),
        footer=f"Written by mimir-fast report from {folder.resolve()}",
    )
    _write_files(folder, sections, text)
    return folder / "report.html"


def _or_reason(read: Callable, path: Path) -> tuple:
    try:
        return read(path), ""
    except ValueError as error:
        return None, str(error)


def _write_files(folder: Path, sections: list[Section], text: str) -> None:
    (folder / "report").mkdir(exist_ok=True)
    for section in sections:
        path = folder / "report" / f"{section.name}.png"
        if section.png is None:
            path.unlink(missing_ok=True)
        else:
            _write_atomically(path, section.png)
    _write_atomically(folder / "report.html", text.encode("utf-8", errors="replace"))


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def _title(config: dict, folder: Path) -> str:
    words = [str(config[name]) for name in ("model", "dataset") if config.get(name)]
    return " on ".join(words) if words else folder.resolve().name


def reading_notes(metrics: Metrics, epochs: list[dict]) -> list[str]:
    """What a reader must know about the files before trusting the numbers."""
    notes = []
    others = metrics.unreadable - metrics.cut
    if metrics.cut:
        notes.append("The last line of metrics.jsonl is cut (the run was killed, or is writing now); it is left out.")
    if others:
        notes.append(f"metrics.jsonl: {others:,} other unreadable line{_s(others)} left out.")
    if metrics.repeated:
        notes.append(
            f"metrics.jsonl: {metrics.repeated:,} line{_s(metrics.repeated)} of repeated updates (a resumed run); "
            "the later line counts."
        )
    if not epochs:
        notes.append("log.txt is missing or holds no finished epoch; bad files are not known.")
    bad = int((~np.isfinite(metrics["loss"])).sum())
    if bad:
        notes.append(f"{bad:,} update{_s(bad)} without a finite training loss.")
    return notes


def _s(count: int) -> str:
    return "" if count == 1 else "s"


# ---- figures


def _section(name: str, heading: str, caption: str, absent: str, draw: Callable[[], Figure]) -> Section:
    """Draw, unless `absent` gives a reason not to."""
    return Section(name, heading, absent or caption, None if absent else figures.png(draw()))


def curve_sections(metrics: Metrics, config: dict) -> list[Section]:
    """The four curves, each with a caption or the reason it is not there."""
    has = {name: bool(np.isfinite(values).any()) for name, values in metrics.columns.items()}
    smoothed = f"Light: {'every update' if len(metrics.update) <= figures.POINTS else 'range of the updates'}; dark: running mean"
    smoothed = f"{smoothed} over {figures.SMOOTHED_SHARE:.0%} of the run." if len(metrics.update) > figures.FEW else ""
    no_loss = "" if has["loss"] or has["recon"] else "No update in metrics.jsonl has a finite loss."
    kind, weight = str(config.get("mi_train", "")), number(config.get("mi_xpl"))
    weighted = f"; the loss adds it times {weight:g}" if np.isfinite(weight) else ""
    return [
        _section(
            "loss",
            "Loss",
            f"Training loss (reconstruction plus weighted penalty) and reconstruction loss alone. {smoothed}",
            no_loss,
            lambda: figures.loss_figure(metrics),
        ),
        _section(
            "penalty",
            "Penalty",
            f"The mutual-information penalty of the batch{weighted}. {smoothed}",
            "" if has["mi"] else _no_penalty(metrics),
            lambda: figures.penalty_figure(metrics, kind),
        ),
        _section(
            "lr",
            "Learning rate",
            "The learning rate of each update.",
            "" if has["lr"] else "metrics.jsonl holds no learning rate.",
            lambda: figures.lr_figure(metrics, np.nan_to_num(number(config.get("warmup_epochs")))),
        ),
        _section(
            "throughput",
            "Throughput",
            f"Images per second of all processes, and the share of the time spent waiting for data. {smoothed}",
            "" if has["images_per_s"] else "metrics.jsonl holds no images per second.",
            lambda: figures.throughput_figure(metrics),
        ),
    ]


def _no_penalty(metrics: Metrics) -> str:
    skipped = int(np.nan_to_num(metrics["skipped_penalties"]).max())
    if skipped:
        return f"The penalty never had a finite value: it was skipped {skipped:,} time{_s(skipped)}."
    return "There is no penalty in this run (--attack plain or --mi_train plain)."


def sample_section(samples: Samples | None, absent: str, config: dict) -> Section:
    """The picture grid of samples.npz."""
    caption = ""
    if samples is not None:
        scale = ""
        if config.get("norm_pix_loss"):
            scale = " Predictions get the clean patches' mean and deviation (norm_pix_loss)."
        caption = (
            f"After update {samples.update:,}. Perturbation: grey is none, shown ten times as strong. Visible patches: what "
            "the encoder sees. Reconstruction: predicted where patches were removed, adversarial input elsewhere." + scale
        )
    draw = lambda: figures.reconstruction_figure(samples)  # noqa: E731
    return _section("reconstructions", "Reconstructions", caption, absent, draw)


# ---- tables


def summary_rows(metrics: Metrics, epochs: list[dict], config: dict) -> list[tuple[str, str, str]]:
    """(quantity, value, detail) rows of the run."""
    planned = f"of {config['epochs']} planned" if "epochs" in config else ""
    if epochs:
        done = f"{number(epochs[-1]['epoch']) + 1:g}"
    else:
        done, planned = f"{_edge(metrics['epoch'], -1):.2f}", f"reached, {planned}".rstrip(", ")
    rate, memory = metrics["images_per_s"], metrics["peak_memory_gib"]
    bad = [number(row.get("bad_files")) for row in epochs]
    bad = [count for count in bad if np.isfinite(count)]
    return [
        ("Epochs finished" if epochs else "Epoch", done, planned),
        ("Updates", f"{metrics.update[-1]:,}", _updates_detail(metrics)),
        *_first_last(metrics, "recon", "Reconstruction loss"),
        *_first_last(metrics, "mi", "Penalty"),
        ("Last learning rate", _show(_edge(metrics["lr"], -1), figures.scientific), ""),
        ("Median throughput", _show(_median(rate), lambda v: f"{v:,.4g} images/s"), "all processes together"),
        ("Peak memory", _show(_largest(memory), lambda v: f"{v:.2f} GiB"), "per process: GPU, or resident on the CPU"),
        ("Skipped penalties", _count(metrics["skipped_penalties"]), "not finite, zero, or without a finite gradient"),
        ("Skipped steps", _count(metrics["skipped_steps"]), "updates with a gradient that was not finite"),
        ("Bad files", f"{max(bad):,.0f}" if bad else "–", "unreadable images left out" if bad else "not in log.txt"),
    ]


def _updates_detail(metrics: Metrics) -> str:
    missing = int(metrics.update[-1] - metrics.update[0] + 1 - len(metrics.update))
    words = [] if metrics.update[0] <= 1 else [f"metrics.jsonl starts at {metrics.update[0]:,}"]
    return ", ".join(words + ([f"{missing:,} not in metrics.jsonl"] if missing else []))


def _first_last(metrics: Metrics, name: str, label: str) -> list[tuple[str, str, str]]:
    values = metrics[name]
    finite = np.flatnonzero(np.isfinite(values))
    if not len(finite):
        return [(label, "–", _no_penalty(metrics) if name == "mi" else "no finite value")]
    first, last = finite[0], finite[-1]
    detail = f"update {metrics.update[last]:,}"
    if len(finite) >= LAST:
        detail += f"; mean of the last {LAST} updates: {np.mean(values[finite[-LAST:]]):.5g}"
    return [
        (f"{label}, first", f"{values[first]:.5g}", f"update {metrics.update[first]:,}"),
        (f"{label}, last", f"{values[last]:.5g}", detail),
    ]


def sample_rows(samples: Samples | None, absent: str, config: dict) -> list[tuple[str, str, str]]:
    """The largest perturbation of the stored samples against the attack's radius."""
    if samples is None:
        return [("Largest perturbation", "–", absent)]
    largest = samples.max_perturbation_255
    if config.get("attack") == "plain":
        detail = "no attack in this run (--attack plain)"
    else:
        inside = largest <= samples.eps_255 + 0.01
        detail = f"{'within' if inside else 'OUTSIDE'} the attack's radius of {samples.eps_255:g}/255"
    return [("Largest perturbation", _show(largest, lambda value: f"{value:.2f}/255"), f"samples.npz: {detail}")]


def grouped_configuration(config: dict) -> dict[str, list[tuple[str, str, bool]]]:
    """config.yaml by stage: {stage: (flag, value, whether it differs from the default) rows}; unknown flags under other."""
    defaults = PretrainConfig().flat()
    groups = {stage: [f.name for f in fields(kind) if f.name in config] for stage, kind in STAGES.items()}
    groups["other"] = [name for name in config if name not in defaults]
    return {
        group: [(name, _word(config[name]), config[name] != defaults.get(name, config[name])) for name in names]
        for group, names in groups.items()
        if names
    }


def _word(value) -> str:
    named = {None: "(default)", True: "on", False: "off", "": "(none)"}
    return named[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _show(value: float, form: Callable[[float], str]) -> str:
    return form(value) if np.isfinite(value) else "–"


def _edge(values: np.ndarray, index: int) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[index]) if len(finite) else float("nan")


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def _largest(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else float("nan")


def _count(values: np.ndarray) -> str:
    return _show(_edge(values, -1), lambda value: f"{value:,.0f}")
