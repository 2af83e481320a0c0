"""Records as rows: which fields say what a row is about, which hold its figures, which way is better, how sure they are."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.stage_times import percentiles
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig

HEADING = ("date", "commit", "torch", "triton", "device")
BUILD = ("commit", "torch", "triton", "driver")  # rows repeat one another only if these agree
PRETRAIN, FINETUNE = "pretrain", "finetune"  # whose configuration a row has
TRAINERS = {PRETRAIN: PretrainConfig, FINETUNE: FinetuneConfig}
NO_MATTER = {
    "output_dir",
    "log_dir",
    "resume",
    "dist_url",
    "max_steps",
    "seed",
    "wandb",
    "rounds",
}  # of a configuration


@dataclass(frozen=True)
class Reading:
    """A figure of one row; low and high: its 20th and 80th percentile, None where the row does not know them."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """What a row tells; read gives None where the row lacks it.  exact: priced or counted, no noise."""

    name: str
    lower_is_better: bool
    read: Callable[[dict], Reading | None]
    exact: bool = False


@dataclass(frozen=True)
class Kind:
    """Rows of one verb.  mark: a field that no other kind has; label: fields to call a row by."""

    name: str
    mark: str
    identity: tuple[str, ...]
    label: tuple[str, ...]
    figures: tuple[Figure, ...]
    trainer: bool = False  # `config` is the trainer's: flags it did not have yet count as today's default
    headed: bool = True  # every row says where and when it comes from


def at(record: dict, path: str):
    """The value at "field.field"; None below a field that is null.  Raises KeyError if it is not there."""
    for name in path.split("."):
        if record is None:
            return None
        record = record[name]
    return record


def plain(path: str, low: str | None = None, high: str | None = None) -> Callable[[dict], Reading | None]:
    """Reads a number, and its percentiles where the row has them."""

    def read(record: dict) -> Reading | None:
        value = at(record, path)
        if value is None:
            return None
        return Reading(value, *(record.get(name) if name else None for name in (low, high)))

    return read


def images_per_second(record: dict) -> Reading | None:
    """Of a training: the record's percentiles are seconds per update."""
    if record["images/s"] is None:
        return None
    images = record["config"]["batch_size"] * record["config"]["accum_iter"]
    slow, fast = record["percentiles"]["80"], record["percentiles"]["20"]
    return Reading(record["images/s"], images / slow, images / fast)


def ratio(record: dict) -> Reading:
    """Of pairs: the median, and the percentiles over the pairs."""
    cuts = percentiles(record["ratios"])
    return Reading(record["ratio"], cuts["20"], cuts["80"])


def last_loss(run: str) -> Callable[[dict], Reading | None]:
    """Mean over the last window; over the seeds, where there are several."""

    def read(record: dict) -> Reading | None:
        if run not in record["points"]:
            return None
        ends = [points[-1] for points in record["points"][run]]
        cuts = percentiles(ends) if len(ends) > 1 else {"20": None, "80": None}
        return Reading(statistics.mean(ends), cuts["20"], cuts["80"])

    return read


def _lower(name: str, path: str, exact: bool = False) -> Figure:
    return Figure(name, True, plain(path), exact)


def _higher(name: str, path: str, exact: bool = False) -> Figure:
    return Figure(name, False, plain(path), exact)


STEP = (
    _lower("bound ms", "totals.bound_ms", exact=True),
    _lower("GB", "totals.gb", exact=True),
    _lower("launches", "totals.launches", exact=True),
    _lower("waits", "totals.syncs", exact=True),
    _lower("peak GiB", "totals.peak_gib", exact=True),
    _lower("ms", "measured.ms"),
)
TRAIN = (Figure("images/s", False, images_per_second), _lower("peak GiB", "peak GiB"))
PAIRS = (Figure("ratio", False, ratio), _higher("images/s", "images/s.mimir_fast"))
LOSSES = tuple(Figure(f"last loss, {run}", True, last_loss(run)) for run in ("fp32", "bf16", "bf16, bf16 residual"))
PEAKS = (_higher("copy GB/s", "reached.copy GB/s"), _higher("bf16 TFLOP/s", "reached.bf16 TFLOP/s"))
COMPILE = (_lower("spills", "spills", exact=True), _higher("occupancy", "occupancy", exact=True))
KERNELS = (Figure("ms", True, plain("ms", "ms_p20", "ms_p80")),)
SHAPE = ("config.model", "config.batch_size", "config.input_size", "config.patch_size")
CASE = ("op", "recipe", "dtype", "direction", "impl")
STEP_IS = ("task", "variant", "peaks", "config")
VARIANT = ("op", "kernel", "config", "dtype", "wide", "arch")
KINDS = (
    Kind("kernels", "impl", (*CASE, "config"), CASE, KERNELS),
    Kind("step", "variant", STEP_IS, ("variant", *SHAPE, "peaks"), STEP, trainer=True),
    Kind("train", "stages", ("task", "config", "peaks", "threads"), SHAPE, TRAIN, trainer=True),
    Kind("pairs", "ratios", ("config", "threads"), SHAPE, PAIRS),
    Kind("losses", "points", ("flags", "window"), ("flags",), LOSSES),
    Kind("peaks", "reached", (), (), PEAKS),
    Kind("compile", "registers", VARIANT, ("op", "kernel", "config"), COMPILE, headed=False),
)


@dataclass(frozen=True)
class Row:
    """One record; where: FILE:LINE; subject: the values of its identity, configurations flag by flag."""

    kind: Kind
    record: dict
    where: str
    subject: dict[str, object]
    readings: dict[str, Reading]

    @property
    def device(self) -> str:
        return self.record.get("device", "offline")  # compiled, never run

    def key(self, *without: str) -> tuple:
        """What makes two rows rows of the same thing; of the same device unless "device" is left out."""
        subject = {**self.subject, "device": self.device}
        return self.kind.name, json.dumps({k: v for k, v in subject.items() if k not in without}, sort_keys=True)


def load(file: Path) -> list[Row]:
    """The rows of a JSON-lines file.  Raises ValueError naming FILE:LINE of what is no row."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found = _row(line, f"{file}:{number}")
            rows += [found] if found else []
    return rows


def newest(rows: Iterable[Row], *without: str) -> dict[tuple, list[Row]]:
    """Key -> its rows of the newest commit and versions, oldest first.  Later lines count as newer within a second."""
    groups: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.record.get("date", "")):
        groups.setdefault(row.key(*without), []).append(row)
    return {key: [row for row in group if _build(row) == _build(group[-1])] for key, group in groups.items()}


def varying(rows: list[Row], among: Iterable[str] | None = None) -> list[str]:
    """Names in the rows' subjects whose values differ between them; only those of `among`, if given."""
    names = dict.fromkeys(name for row in rows for name in row.subject)
    chosen = [name for name in names if among is None or name in among]
    return [name for name in chosen if len({json.dumps(row.subject.get(name)) for row in rows}) > 1]


def _row(line: str, where: str) -> Row | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: no JSON: {error.msg}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r}")
    if record.keys() <= {*BUILD}:  # a heading of its own, for the lines after it
        return None
    named = record.get("kind")
    kind = next((k for k in KINDS if k.name == named or (named is None and k.mark in record)), None)
    if kind is None:
        raise ValueError(f"{where}: a row of no known kind; known: {', '.join(k.name for k in KINDS)}")
    record.setdefault("task", PRETRAIN)  # rows of before there was another
    try:
        missing = [name for name in HEADING if kind.headed and name not in record]
        if missing:
            raise KeyError(missing[0])
        readings = {figure.name: figure.read(record) for figure in kind.figures}
        subject = _subject(kind, record)
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: a row of kind {kind.name} without {error}") from None
    known = {name: reading for name, reading in readings.items() if reading is not None}
    for name, reading in known.items():
        if not isinstance(reading.value, int | float) or not math.isfinite(reading.value):
            raise ValueError(f"{where}: {name}: expected a finite number, got {reading.value!r}")
    return Row(kind, record, where, subject, known)


def _subject(kind: Kind, record: dict) -> dict[str, object]:
    subject: dict[str, object] = {}
    for name in kind.identity:
        if isinstance(record[name], dict):
            config = record[name]
            if kind.trainer:
                config = {flag: config.get(flag, value) for flag, value in _defaults(record["task"])}
            subject |= {f"config.{flag}": value for flag, value in config.items() if flag not in NO_MATTER}
        else:
            subject[name] = record[name]
    return subject


@cache
def _defaults(task: str) -> tuple[tuple[str, object], ...]:
    return tuple(TRAINERS[task]().flat().items())


def _build(row: Row) -> tuple:
    return tuple(row.record.get(name) for name in BUILD)
