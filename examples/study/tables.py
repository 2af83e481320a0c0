"""Tables of the study, made of its rows: what a page shows between its study marks."""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from examples.study.plan import MIMIR, Arm, Study
from examples.study.statistics import Interval, interval, paired

BLOCK = re.compile(r"(<!-- study:([\w-]+) -->\n).*?(<!-- /study:\2 -->)", re.DOTALL)
# Column -> (what a row is about, its attack)
COLUMNS = {
    "clean": ("accuracy", "clean"),
    "PGD-20": ("accuracy", "pgd-20"),
    "PGD-20, AutoAttack's images": ("autoattack", "pgd-20"),
    "AutoAttack": ("autoattack", "aa"),
}

STAGES = {"pretrain": "pre-training", "finetune": "fine-tuning"}
# (variable, estimator) of an analysis -> its column
ESTIMATES = {
    ("x", "renyi_2"): "I(x;z), Rényi 2 [bit]",
    ("x_adv", "renyi_2"): "I(x_adv;z), Rényi 2 [bit]",
    ("delta", "renyi_2"): "I(δ;z), Rényi 2 [bit]",
    ("delta", "nhsic"): "I(δ;z), nHSIC",
}


class Table(NamedTuple):
    """Names of the columns, and rows of cells."""

    head: list[str]
    body: list[list[str]]

    def markdown(self) -> list[str]:
        """The lines of a page."""
        return [f"| {' | '.join(cells)} |" for cells in (self.head, ["---"] * len(self.head), *self.body)]


def accuracies(rows: Iterable[dict], column: str) -> dict[str, dict[int, float]]:
    """Arm -> seed -> accuracy in percent."""
    what, attack = COLUMNS[column]
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["what"] == what:
            found.setdefault(row["arm"], {})[row["seed"]] = 100 * row["results"][attack]["accuracy"]
    return found


def compared(study: Study, rows: list[dict]) -> Table:
    """Accuracies of the compared arms: mean over the seeds with its interval."""
    columns = {name: accuracies(rows, name) for name in COLUMNS}
    columns = {name: values for name, values in columns.items() if values}
    body = [
        [arm.title, *(in_words(interval(list(v[arm.name].values()))) for v in columns.values())] for arm in arms(study)
    ]
    return Table(["start", *columns], body)


def differences(study: Study, rows: list[dict]) -> Table:
    """Paired differences between compared arms, in points: seed by seed, mean and interval."""
    columns = {name: accuracies(rows, name) for name in COLUMNS}
    titles = {arm.name: arm.title for arm in arms(study)}
    shown = {name: values for name, values in columns.items() if values}
    body = [
        [f"{titles[one]} − {titles[other]}", *(in_words(paired(v[one], v[other]), sign=True) for v in shown.values())]
        for one, other in study.pairs
    ]
    return Table(["difference", *shown], body)


def factors(study: Study, rows: list[dict]) -> Table:
    """Every value of every factor: accuracy, and its paired difference to the value that MIMIR has, on the seeds of both."""
    clean, robust = (accuracies(rows, name) for name in ("clean", "PGD-20"))
    body = []
    for factor, values in study.factors.items():
        for value, arm in values.items():
            body.append([factor, value])
            for column in (clean, robust):
                shared = {seed: column[arm][seed] for seed in range(study.varied[1])}
                usual = arm == MIMIR.name
                difference = "—" if usual else in_words(paired(shared, column[MIMIR.name]), sign=True)
                body[-1] += [in_words(interval(list(shared.values()))), difference]
    return Table(["factor", "value", "clean", "difference", "PGD-20", "difference"], body)


def search(study: Study, rows: list[dict]) -> Table:
    """Held-out accuracies of every candidate that was tried."""
    found = {row["arm"]: row["results"] for row in rows if row["part"] == "search" and row["what"] == "accuracy"}
    body = [
        [f"`{arm}`", *(f"{100 * results[attack]['accuracy']:.1f}" for attack in ("clean", "pgd-20"))]
        for arm, results in found.items()
    ]
    return Table(["candidate", "clean", "PGD-20"], body)


def information(study: Study, rows: list[dict]) -> Table:
    """Estimates of the analysis after each stage: excess over shuffled pairs, mean over the seeds with its interval."""
    body = []
    for stage, title in STAGES.items():
        for arm, values in estimates(study, rows, stage).items():
            cells = [in_words(interval([v[variable][name] for v in values]), digits=3) for variable, name in ESTIMATES]
            body.append([arm, title, *cells])
    return Table(["start", "after", *ESTIMATES.values()], body)


def estimates(study: Study, rows: list[dict], stage: str) -> dict[str, list[dict]]:
    """Title of an arm -> the estimates after a stage, one entry per seed; without arms that have no such stage."""
    found = {
        arm.title: [last(row["results"], stage) for row in rows if row["what"] == "analysis" and row["arm"] == arm.name]
        for arm in arms(study)
    }
    # What starts from scratch has no pre-training.
    return {title: values for title, values in found.items() if all(values)}


def last(results: dict, stage: str) -> dict:
    """The last checkpoint of a stage in an analysis; empty if there is none."""
    epochs = [int(name.split()[1]) for name in results if name.startswith(stage)]
    return results[f"{stage} {max(epochs)}"] if epochs else {}


def costs(study: Study, rows: list[dict]) -> Table:
    """CPU time by kind of job."""
    kinds = dict.fromkeys(row["what"] for row in rows)
    groups = {kind: [row["cpu_seconds"] for row in rows if row["what"] == kind] for kind in kinds}
    groups["all"] = [row["cpu_seconds"] for row in rows]
    body = [[k, str(len(v)), f"{sum(v) / len(v) / 60:.1f}", f"{sum(v) / 3600:.2f}"] for k, v in groups.items()]
    return Table(["job", "number", "core-minutes each", "core-hours"], body)


TABLES: dict[str, Callable[[Study, list[dict]], Table]] = {
    table.__name__: table for table in (compared, differences, factors, search, information, costs)
}


def rewritten(page: str, study: Study, rows: list[dict]) -> str:
    """A page with the tables between its marks written anew.  Raises ValueError for a mark without a table."""

    def block(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"study:{match[2]}: no such table, expected one of {', '.join(TABLES)}")
        return match[1] + "\n".join(TABLES[match[2]](study, rows).markdown()) + "\n" + match[3]

    return BLOCK.sub(block, page)


def arms(study: Study) -> tuple[Arm, ...]:
    return study.compared[0]


def in_words(value: Interval, sign: bool = False, digits: int = 1) -> str:
    """As "31.2 (30.1 to 32.3)"."""
    first, *ends = (f"{number:{'+' if sign else ''}.{digits}f}" for number in value[:3])
    return f"{first} ({ends[0]} to {ends[1]})"
