"""Beside what the field publishes: published figures in units that ours can be put beside, and what ours are worth."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.peaks import PEAKS
from bench.records import is_pretend
from bench.report.figures import (
    STEPS,
    UNKNOWN,
    attack,
    beside,
    bounds,
    headline,
    measurements,
    mfu_at_bound,
    model,
    model_tflop,
    of_task,
    setting,
    step,
    threads,
)
from bench.report.tables import NO_BOUND, markdown
from bench.rows import FINETUNE, PRETRAIN, Row

IMAGENET = 1_281_167  # training images


@dataclass(frozen=True)
class Published:
    """A training somebody else reports: as hours for some epochs of ImageNet-1K, or as images per second of one GPU."""

    what: str
    gpus: int
    gpu: str
    source: str
    differs: str
    epochs: int = 0
    hours: float = 0.0
    images_per_s: float = 0.0
    mfu: float | None = None

    @property
    def rate(self) -> float:
        """Images per second and GPU."""
        return self.images_per_s or IMAGENET * self.epochs / (self.hours * 3600 * self.gpus)

    @property
    def said(self) -> str:
        if self.hours:
            return f"{self.epochs} epochs in {self.hours:g} h"
        return f"{self.images_per_s:,.0f} images/s on {self.gpus} GPU"


SUBQUADRATIC = "[nvSubquadratic, benchmarks](https://nvidia-bionemo.github.io/nvSubquadratic/benchmarks.html)"
SUPERVISED = "supervised, no masking, 22 million parameters, batch 256, synthetic data"
PUBLISHED = (
    Published(
        "MAE ViT-L/16", 64, "V100",
        "[MAE, PRETRAIN.md](https://github.com/facebookresearch/mae/blob/main/PRETRAIN.md)",
        "no attack, no penalty; decoder of 8 blocks of width 512; data loading included", epochs=800, hours=42,
    ),
    Published(
        "DailyMAE ViT-B/16", 8, "A100", "[arXiv 2404.00509](https://arxiv.org/abs/2404.00509)",
        "no attack, no penalty; its recipes include progressive resolution; data loading included",
        epochs=800, hours=18,
    ),
    Published("ViT-5-Small, torch.compile", 1, "H100", SUBQUADRATIC, SUPERVISED, images_per_s=7716, mfu=0.220),
    Published("ViT-5-Small, max-autotune", 1, "H100", SUBQUADRATIC, SUPERVISED, images_per_s=8003, mfu=0.229),
)  # fmt: skip
BEST = max((p for p in PUBLISHED if p.mfu), key=lambda p: p.mfu)


def published_table(rows: list[Row]) -> Iterator[str]:
    """Theirs, measured; then ours, bounds."""
    heads = ["published training", "GPUs", "as published", "images/s per GPU", "MFU", "unlike our step", "source"]
    yield from markdown(heads, (_published(p) for p in PUBLISHED))
    yield ""
    yield (
        f"Images/s per GPU from hours: {IMAGENET:,} images × epochs / seconds / GPUs. Their MFU as published; ours counts "
        "products and attention, the attack's too."
    )
    yield ""
    chosen = headline(rows)
    if chosen is None:
        yield NO_BOUND
        return
    yield "**Our step: bounds, not measurements, and no throughput.** Attack, training pass, penalty, optimizer; no data:"
    yield ""
    heads = ["model", "step", "for", "bound ms", "images/s cannot exceed", "MFU cannot exceed"]
    heads += [f"images/s if a run reached {BEST.mfu:.1%} MFU (arithmetic, no forecast)", "configuration"]
    own = [row for row in bounds(rows) if row.record["variant"] == "ours"]
    yield from markdown(heads, (_ceiling(row, own) for row in own))


def _published(p: Published) -> list[str]:
    mfu = UNKNOWN if p.mfu is None else f"{p.mfu:.1%}"
    return [p.what, f"{p.gpus} × {p.gpu}", p.said, f"{p.rate:,.0f}", mfu, p.differs, p.source]


def _ceiling(row: Row, among: list[Row]) -> list[str]:
    record, peak = row.record, PEAKS[row.record["peaks"]].flops["bf16"]
    batch, bound = record["config"]["batch_size"], record["totals"]["bound_ms"]
    at_theirs = UNKNOWN
    if record["peaks"] == BEST.gpu.lower():
        at_theirs = f"{batch * BEST.mfu * peak / (model_tflop(row) * 1e12):,.0f}"
    numbers = [f"{bound:.1f}", f"{batch / bound * 1e3:,.0f}", f"{mfu_at_bound(row, peak):.0%}", at_theirs]
    return [model(record["config"]), step(row), record["peaks"].upper(), *numbers, setting(row, among)]


def status_table(rows: list[Row]) -> Iterator[str]:
    """Which of our figures are measured, which are bounds, which nobody knows."""
    tuning = of_task(rows, FINETUNE)
    rows = of_task(rows, PRETRAIN)
    yield from markdown(
        ["figure", "state", "on what"],
        [
            ["least time, bytes, FLOPs, launches, memory of a step", *_priced(bounds(rows))],
            ["time of a step on a GPU, images/s, MFU", *_measured(rows, "step", "ms", gpu=True)],
            ["bound, launches, memory of a fine-tuning step", *_priced(bounds(tuning, FINETUNE))],
            ["time of a fine-tuning step on a GPU", *_measured(tuning, "step", "ms", gpu=True)],
            ["time of single kernels beside their rivals", *_measured(rows, "kernels", "ms", gpu=True)],
            ["images/s of the training loop on a GPU", *_measured(rows, "train", "images/s", gpu=True)],
            ["images/s of the training loop on a CPU", *_measured(rows, "train", "images/s", gpu=False)],
            ["step against the textbook step on a CPU", *_measured(rows, "pairs", "ratio", gpu=False)],
            ["step against the textbook step on a GPU", *_measured(rows, "pairs", "ratio", gpu=True)],
            ["training loss in 16 bits, a CPU rounding as a tensor core does",
             *_measured(rows, "losses", "last loss, bf16", gpu=False)],
            ["more than one GPU", "unknown", "no verb of `python -m bench` measures it"],
        ],
    )  # fmt: skip


def _priced(found: list[Row]) -> list[str]:
    if not found:
        return ["unknown", "no row on record"]
    gpus = dict.fromkeys(row.record["peaks"].upper() for row in found)
    ran = dict.fromkeys("a simulated GPU" if is_pretend(row.device) else row.device for row in found)
    return ["bound", f"priced for {', '.join(gpus)}; run on {', '.join(ran)}"]


def _measured(rows: list[Row], kind: str, figure: str, gpu: bool) -> list[str]:
    found = [m.row for m in measurements(rows, kind, figure) if m.on_gpu == gpu]
    if not found:
        return ["unknown", "no row on record"]
    devices = dict.fromkeys(
        row.device + (f", {threads(row.record)}" if "threads" in row.record and not gpu else "") for row in found
    )
    return ["measured", "; ".join(devices)]


def headline_line(rows: list[Row]) -> Iterator[str]:
    """For the README: what one step cannot undercut, and what was measured."""
    if headline(rows) is None:
        yield NO_BOUND
        return
    sentences = [f"Bound of one {what}, {bound}." for what, bound in _bounds_in_words(rows)]
    known = "; ".join(
        f"{model(m.row.record['config'])} {step(m.row)} {m.reading.value:.1f} ms on {m.row.device}"
        for m in measurements(rows, "step", "ms")
        if m.on_gpu
    )
    yield f"{' '.join(sentences)} A bound is no measurement. Measured on a GPU: {known or 'nothing yet'}."


def _bounds_in_words(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """Of each task's step: what it is, and its bound beside its rivals'."""
    for task, what in ((PRETRAIN, "step"), (FINETUNE, "fine-tuning step")):
        row = headline(rows, task)
        if row is None:
            continue
        same = ("config.model", "config.steps")
        others = [r for r in beside(rows, row) if all(r.subject[n] == row.subject[n] for n in same)]
        others = [r for r in others if r.record["variant"] != "ours"]
        named = "" if task == PRETRAIN else f" with {attack(row.record)}"
        rivals = "".join(f"; {STEPS[r.record['variant']]} ({setting(r, others)}): {_ms(r)}" for r in others)
        where = f"{model(row.record['config'])}{named} on an {row.record['peaks'].upper()}"
        yield what, f"{where} ({setting(row, [row])}): {_ms(row)}{rivals}"


def _ms(row: Row) -> str:
    return f"{row.record['totals']['bound_ms']:.1f} ms"
