"""python -m examples.study.write_up RESULTS PAGE FIGURE: write tables and figure of the study anew.

RESULTS   the study's results.jsonl, complete
PAGE      Markdown; what stands between its marks, such as <!-- study:compared --> and <!-- /study:compared -->, is replaced
"""

import sys
from functools import partial
from pathlib import Path

from examples.study.figure import draw
from examples.study.jobs import plan
from examples.study.plan import CIFAR10, Study
from examples.study.results import read_rows
from examples.study.tables import rewritten
from mimir_fast.checkpoints.atomic import write_atomically, write_text_atomically
from mimir_fast.cli.errors import guarded

PROG = "python -m examples.study.write_up"


def complete(study: Study, rows: list[dict], path: Path) -> list[dict]:
    """The rows, if every job has one.  Raises ValueError if not."""
    known = {row["job"] for row in rows}
    jobs = [job.name for job in plan(study, Path("runs"), rows)]
    if missing := [name for name in jobs if name not in known]:
        raise ValueError(f"results: {len(missing)} of {len(jobs)} jobs have no row in {path}, such as {missing[0]}")
    return rows


def write_up(study: Study, results: Path, page: Path, figure: Path) -> int:
    """Write tables and figure; returns 0.  Raises ValueError for incomplete results or an unknown mark."""
    rows = complete(study, read_rows(results), results)
    write_text_atomically(page, rewritten(page.read_text(encoding="utf-8"), study, rows))
    write_atomically(figure, partial(draw(study, rows).savefig, format="png", dpi=110))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(PROG, lambda: write_up(CIFAR10, *map(Path, sys.argv[1:4])), "stopped"))
