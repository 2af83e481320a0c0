"""python -m bench report: the tables and plots of README.md and docs/performance.md, drawn from bench/results."""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from bench.records import RESULTS, ROOT
from bench.report import plots
from bench.report.field import headline_line, published_table, status_table
from bench.report.tables import (
    bounds_table,
    kernels_table,
    losses_table,
    pairs_table,
    roofline_plot,
    shares_table,
    steps_table,
    training_table,
)
from bench.rows import FINETUNE, Row, load

BLOCKS = {
    "README.md": {"headline": headline_line},
    "docs/performance.md": {
        "status": status_table,
        "bounds": bounds_table,
        "roofline": roofline_plot,
        "shares": shares_table,
        "steps": steps_table,
        "training": training_table,
        "kernels": kernels_table,
        "pairs": pairs_table,
        "finetune-bounds": partial(bounds_table, task=FINETUNE),
        "finetune-shares": partial(shares_table, task=FINETUNE),
        "finetune-steps": partial(steps_table, task=FINETUNE),
        "published": published_table,
        "losses": losses_table,
    },
}
PLOTS = "docs/plots"
BLOCK = re.compile(r"<!-- bench:([\w-]+) -->\n(.*?)<!-- /bench:\1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")
SEAL = re.compile(r"<!-- of (\w+), drawn (\w+) -->\n")
EPILOG = """Between <!-- bench:NAME --> and <!-- /bench:NAME --> everything is written anew; the rest is left alone.
Of a variant, GPU and configuration the newest row counts.  A row of a pretend GPU is a bound and never gets into a table of
measurements.
Exit status: 0; 1 with --check if something is stale; 2 wrong input."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description=__doc__.split(": ", 1)[1],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--check", action="store_true", help="write nothing; name what differs from the records")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="JSON lines (default: %(default)s)")
    add("--root", type=Path, default=ROOT, metavar="FOLDER", help="of README.md and docs (default: %(default)s)")
    return parser


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status: 0, 1 if something is stale, 2 with one line on wrong input."""
    args = build_parser().parse_args(arguments)
    try:
        if not args.results.is_dir():
            raise ValueError(f"results: no folder {args.results}")
        rows = [row for file in sorted(args.results.glob("*.jsonl")) for row in load(file)]
        stale = list(changes(args.root, rows))
    except (ValueError, OSError) as error:
        print(f"python -m bench report: error: {error}", file=sys.stderr)
        return 2
    for file, contents in stale:
        print(f"{'stale' if args.check else 'removed' if contents is None else 'written'}: {file}")
        if not args.check:
            _write(args.root / file, contents)
    if args.check and stale:
        print("python -m bench report writes them anew")
    return int(args.check and bool(stale))


def changes(root: Path, rows: list[Row]) -> Iterator[tuple[str, Callable[[], str] | None]]:
    """(file, what gives its contents) of every file that differs; None: it should not be there.

    Raises ValueError naming a file without its markers, or a row that is no measurement.
    """
    for file, blocks in BLOCKS.items():
        text = (root / file).read_text()
        new = rewritten(file, text, {name: "\n".join(block(rows)) for name, block in blocks.items()})
        if new != text:
            yield file, partial(str, new)
    for name, (numbers, draw) in plots.PLOTS.items():
        file = f"{PLOTS}/{name}.svg"
        found, there = numbers(rows), root / file
        if found is None:
            if there.exists():
                yield file, None
        elif not there.exists() or not sealed(there.read_text(), digest(found)):
            yield file, partial(sealed_drawing, draw, found)


def rewritten(file: str, text: str, blocks: dict[str, str]) -> str:
    """The text with every block's contents.  Raises ValueError unless each block is there once, with both its markers."""
    names = [match[1] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks) or len(MARKER.findall(text)) != 2 * len(names):
        raise ValueError(
            f"{file}: markers: expected one pair for each of {', '.join(blocks)}; whole pairs: {', '.join(names)}"
        )
    return BLOCK.sub(lambda m: f"<!-- bench:{m[1]} -->\n{blocks[m[1]].rstrip()}\n<!-- /bench:{m[1]} -->", text)


def digest(numbers: dict) -> str:
    """Of what is drawn, and of how."""
    how = Path(plots.__file__).read_text()
    return _hash(json.dumps(numbers, sort_keys=True) + how)


def sealed_drawing(draw: Callable[[dict], Figure], numbers: dict) -> str:
    """The plot with its own digest and that of its numbers: versions of matplotlib draw differently, so two drawings cannot be
    held against each other."""
    drawing = plots.svg(draw, numbers)
    return drawing.replace("</svg>", f"<!-- of {digest(numbers)}, drawn {_hash(drawing)} -->\n</svg>")


def sealed(text: str, numbers: str) -> bool:
    """Whether a file shows these numbers and is as it was drawn."""
    found = SEAL.search(text)
    return found is not None and found[1] == numbers and found[2] == _hash(SEAL.sub("", text))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(file: Path, contents: Callable[[], str] | None) -> None:
    if contents is None:
        file.unlink()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(contents())
