"""python -m bench compare: what got faster or slower between two files of records, beyond the noise."""

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.rows import KINDS, Figure, Reading, Row, load, newest, varying

MARGIN = 3.0  # percent
SAME = 1e-9  # relative: floating-point sums in another order
REGRESSION, WORSE, BETTER, NOISE = "REGRESSION", "worse", "better", "within noise"
EPILOG = f"""A row of one file is compared with the row of the other about the same thing: verb, device, and every setting.
Of several commits or versions in a file the newest counts; its repeated rows are one figure, their median.
Noise: from the row's 20th to its 80th percentile where it has them (kernels, training, pairs, losses over seeds), otherwise
from the lowest to the highest of repeated rows; of a single row without percentiles it is unknown and taken as none.
  {REGRESSION}    worse, the noise does not overlap, and by more than the margin; priced and counted figures are exact:
                worse by anything
  {WORSE}, {BETTER} the noise does not overlap
Records of a CPU do not name it: compare files of one machine.
Exit status: 0 no regression, 1 a regression, 2 wrong input or nothing to compare."""


@dataclass(frozen=True)
class Interval:
    """A figure over the rows of one file; source: where low and high come from."""

    value: float
    low: float
    high: float
    source: str


@dataclass(frozen=True)
class Change:
    """One figure of one row in both files."""

    row: Row
    figure: Figure
    before: Interval
    after: Interval
    verdict: str


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench compare",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("before", type=Path, metavar="A.jsonl", help="records to compare with")
    add("after", type=Path, metavar="B.jsonl", help="records to judge")
    margin = "what a measured figure may lose beyond the noise without exit status 1 [percent] (default: %(default)g)"
    add("--margin", type=float, default=MARGIN, metavar="PERCENT", help=margin)
    add("--across_devices", action="store_true", help="compare the files although their devices differ")
    return parser


def main(arguments: list[str]) -> int:
    """Print the changes; returns the exit status: 0, 1 on a regression, 2 with one line on wrong input."""
    args = build_parser().parse_args(arguments)
    try:
        if not args.margin >= 0:
            raise ValueError(f"margin: expected 0 or more, got {args.margin:g}")
        files = [load(args.before), load(args.after)]
        without = ("device", "peaks") if args.across_devices else ()
        _check_devices(args, *files)
        before, after = (newest(rows, *without) for rows in files)
        changes = compare(before, after, args.margin)
    except ValueError as error:
        print(f"python -m bench compare: error: {error}", file=sys.stderr)
        return 2
    print(*lines(args, before, after, changes), sep="\n")
    if not changes:
        print(
            f"python -m bench compare: error: {args.before} and {args.after} have no figure in common", file=sys.stderr
        )
        return 2
    return int(any(change.verdict == REGRESSION for change in changes))


def compare(before: dict[tuple, list[Row]], after: dict[tuple, list[Row]], margin: float) -> list[Change]:
    """Every figure of the rows in both; margin in percent."""
    changes = []
    for key in before.keys() & after.keys():
        for figure in after[key][-1].kind.figures:
            old, new = (interval(figure, rows) for rows in (before[key], after[key]))
            if old and new:
                changes.append(Change(after[key][-1], figure, old, new, verdict(figure, old, new, margin)))
    order = (REGRESSION, WORSE, BETTER, NOISE)
    return sorted(changes, key=lambda c: (order.index(c.verdict), c.row.kind.name, c.row.key(), c.figure.name))


def interval(figure: Figure, rows: list[Row]) -> Interval | None:
    """The median over the rows and how far it may be off; None if no row has the figure."""
    if figure.exact:  # of the newest run; `bench compile` has variants that its rows do not tell apart
        rows = [row for row in rows if row.record.get("date") == rows[-1].record.get("date")]
    readings = [row.readings[figure.name] for row in rows if figure.name in row.readings]
    if not readings:
        return None
    count = f"{len(readings)} rows" if len(readings) > 1 else "1 row"
    if figure.exact:
        mean = statistics.fmean(reading.value for reading in readings)
        return Interval(mean, mean, mean, "exact" if len(readings) == 1 else f"exact, mean of {count}")
    value = statistics.median(reading.value for reading in readings)
    if all(reading.low is not None and reading.high is not None for reading in readings):
        return Interval(value, *_ends(readings), f"20th to 80th percentile, {count}")
    return Interval(value, *_ends([Reading(r.value, r.value, r.value) for r in readings]),
                    f"lowest to highest of {count}" if len(readings) > 1 else "1 row: unknown")  # fmt: skip


def verdict(figure: Figure, before: Interval, after: Interval, margin: float) -> str:
    """By the intervals, and by the margin in percent of the old value."""
    if figure.exact and abs(after.value - before.value) <= SAME * abs(before.value):
        return NOISE
    if before.low <= after.high and after.low <= before.high:
        return NOISE
    if (after.value < before.value) == figure.lower_is_better:
        return BETTER
    lost = abs(after.value - before.value) > margin / 100 * abs(before.value)
    return REGRESSION if figure.exact or lost else WORSE


def lines(
    args: argparse.Namespace, before: dict[tuple, list[Row]], after: dict[tuple, list[Row]], changes: list[Change]
) -> Iterator[str]:
    """For people: what changed, how many figures did not, and what is in one file only."""
    everything = [row for rows in (*before.values(), *after.values()) for row in rows]
    apart = {kind.name: varying([row for row in everything if row.kind is kind]) for kind in KINDS}
    moved = [change for change in changes if change.verdict != NOISE]
    for c in moved:
        yield f"{c.verdict:<10}  {called(c.row, apart)}"
        yield f"            {c.figure.name} {_shown(c.before)} -> {_shown(c.after)}  ({_change(c)})"
        yield f"            noise: {c.before.source}; {c.after.source}"
    exact = sum(change.figure.exact for change in changes if change.verdict == NOISE)
    counts = [sum(change.verdict == name for change in changes) for name in (REGRESSION, WORSE, BETTER)]
    yield (
        f"{len(changes)} figures of {len({c.row.key() for c in changes})} rows: {counts[0]} regressions beyond "
        f"{args.margin:g} %, {counts[1]} worse, {counts[2]} better; {len(changes) - len(moved) - exact} within the noise, "
        f"{exact} exactly equal"
    )
    for file, own, other in ((args.before, before, after), (args.after, after, before)):
        for key in sorted(own.keys() - other.keys()):
            yield f"only in {file}: {called(own[key][-1], apart)}"


def called(row: Row, apart: dict[str, list[str]]) -> str:
    """The row's name: its label, its device, and whatever else sets it apart from rows of its kind (kind -> settings)."""
    names = dict.fromkeys([*row.kind.label, *apart[row.kind.name]])
    settings = ", ".join(f"{name.removeprefix('config.')} {row.subject.get(name)}" for name in names)
    return f"{row.kind.name}: {settings + '; ' if settings else ''}{row.device}"


def _check_devices(args: argparse.Namespace, *files: list[Row]) -> None:
    """Raises ValueError unless one file's devices are among the other's; across devices, unless each file has one."""
    before, after = ({row.device for row in rows} for rows in files)
    if args.across_devices:
        for file, devices in ((args.before, before), (args.after, after)):
            if len(devices) > 1:
                raise ValueError(f"across_devices: expected one device in a file, {file} has {_listed(devices)}")
    elif not (before <= after or after <= before):
        raise ValueError(
            f"devices differ: {args.before} is of {_listed(before)}, {args.after} of {_listed(after)}; "
            "--across_devices compares them nevertheless"
        )


def _listed(devices: Iterable[str]) -> str:
    return ", ".join(sorted(devices)) or "none"


def _ends(readings: list[Reading]) -> tuple[float, float]:
    return min(reading.low for reading in readings), max(reading.high for reading in readings)


def _shown(interval: Interval) -> str:
    if interval.low == interval.high:
        return f"{interval.value:.5g}"
    return f"{interval.value:.5g} [{interval.low:.5g}, {interval.high:.5g}]"


def _change(c: Change) -> str:
    if not c.before.value:
        return "from 0"
    return f"{(c.after.value / c.before.value - 1):+.1%}"
