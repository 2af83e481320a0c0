"""Running the study: jobs in order, each in this process; several processes share them."""

import contextlib
import datetime
import fnmatch
import json
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

from examples.study import hidden_attack
from examples.study.attempts import Attempts
from examples.study.jobs import RECIPE, Job, plan
from examples.study.plan import Candidate, Study
from examples.study.progress import progress
from examples.study.results import add_row, holding, read_rows
from mimir_fast.cli import analyze, evaluate, finetune, pretrain

VERBS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain.main,
    "pretrain_hidden": hidden_attack.main,
    "finetune": finetune.main,
    "evaluate": evaluate.main,
    "analyze": analyze.main,
}
STOPPED = 128 + signal.SIGTERM
# Seconds between two looks for a job, where all that are left wait for those of other processes.
PATIENCE = 5.0


def results_file(root: Path) -> Path:
    """The rows of all jobs that are done."""
    return root / "results.jsonl"


class Worker:
    """Runs the jobs of a study in a folder until none is left.

    recipe   a candidate, None: the one that the search finds; only: patterns of job names, which run with all they need
    """

    def __init__(
        self, study: Study, root: Path, recipe: Candidate | None, only: tuple[str, ...], say: Callable[[str], None]
    ):
        self.study, self.root, self.recipe, self.only, self.say = study, root, recipe, only, say

    def run(self) -> int:
        """Returns 0 when all jobs are done, else the exit status of the job that ended early, 143 after a SIGTERM.

        Raises NoRecipeError if the search finds no recipe.
        """
        while True:
            rows = read_rows(results_file(self.root))
            jobs = wanted(plan(self.study, self.root, rows, self.recipe), self.only)
            done = {row["job"] for row in rows}
            left = [job for job in jobs if job.name not in done]
            if not left:
                return 0
            status = self.one_of([job for job in left if done.issuperset(job.needs)], jobs, rows)
            if status is None:
                time.sleep(PATIENCE)
            elif status:
                return status

    def one_of(self, ready: list[Job], jobs: list[Job], rows: list[dict]) -> int | None:
        """Run the first job that no other process is at; returns its exit status, None if there is none."""
        for job in ready:
            with holding(self.root / "locks" / f"{job.name.replace('/', '_')}.lock") as mine:
                # It may have been finished since the rows were read.
                if not mine or job.name in {row["job"] for row in read_rows(results_file(self.root))}:
                    continue
                self.say(f"{progress(jobs, rows)} {job.name}")
                return self.job(job)
        return None

    def job(self, job: Job) -> int:
        """Run a job, or what is left of it, and add its row; returns its exit status."""
        folder = self.root / "runs" / job.arm / str(job.seed)
        attempts = Attempts(folder / f"{job.what}.attempts.json")
        with attempts.counted(), logged(folder / f"{job.what}.log"):
            status = VERBS[job.verb](job.words)
        # A training that SIGTERM stops saves and returns 0.
        if status == 0 and not job.product.exists():
            status = STOPPED
        if status:
            self.say(f"{job.name} ended with status {status}, see {folder / job.what}.log")
            return status
        add_row(results_file(self.root), row_of(job, attempts))
        return 0


@contextlib.contextmanager
def logged(path: Path) -> Iterator[None]:
    """Context whose output is appended to a file: several processes share a terminal."""
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def wanted(jobs: list[Job], only: Iterable[str]) -> list[Job]:
    """The jobs whose names match a pattern, and those that they need, in order; all without patterns."""
    if not (only := list(only)):
        return jobs
    by_name = {job.name: job for job in jobs}
    names = {name for name in by_name if any(fnmatch.fnmatch(name, pattern) for pattern in only)}
    if not names:
        raise ValueError(f"only: no job matches {' '.join(only)}; they are called ARM/SEED/WHAT, as {jobs[-1].name}")
    queue = list(names)
    while queue:
        needs = [need for need in by_name[queue.pop()].needs if need != RECIPE]
        queue += [need for need in needs if need not in names]
        names |= set(needs)
    # Without a recipe nothing but the search can begin.
    search = any(RECIPE in by_name[name].needs for name in names)
    return [job for job in jobs if job.name in names or (search and job.part == "search")]


def row_of(job: Job, attempts: Attempts) -> dict:
    """The row of a finished job: what it is, its results, when it ran and what it cost."""
    row = {"job": job.name, "part": job.part, "arm": job.arm, "seed": job.seed, "what": job.what}
    versions = {name: metadata.version(name) for name in ("mimir-fast", "torch")} | {
        "python": platform.python_version()
    }
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    cost = {"began": attempts.began, "ended": now, "cpu_seconds": round(attempts.seconds, 1), "versions": versions}
    return {**row, "results": READERS[job.what](job.product), **cost}


def trained(product: Path) -> dict:
    """The last epoch of a training's log."""
    last = json.loads((product.parent / "log.txt").read_text(encoding="utf-8").splitlines()[-1])
    return {name: last[name] for name in ("epoch", "train_loss", "mi") if last.get(name) is not None}


def evaluated(product: Path) -> dict:
    """Attack -> accuracy, with the number of images and how many were right after it."""
    attacks = json.loads(product.read_text(encoding="utf-8"))["attacks"].values()
    names = ("accuracy", "correct", "n")
    return {entry["settings"]["attack"]: {name: entry[name] for name in names} for entry in attacks}


def analyzed(product: Path) -> dict:
    """Stage and epoch -> variable -> estimator -> excess over shuffled pairs; entropy of the features in bits."""
    found = {}
    for entry in json.loads(product.read_text(encoding="utf-8"))["checkpoints"]:
        stage = "pretrain" if entry["model"].startswith("mae_") else "finetune"
        excess = {
            variable: {estimator: round(parts["excess"]["value"], 6) for estimator, parts in estimates.items()}
            for variable, estimates in entry["information"].items()
        }
        entropy = {name: round(number["value"], 6) for name, number in entry["entropy"].items()}
        found[f"{stage} {entry['epoch']}"] = {**excess, "entropy": entropy, "images": entry["num_images"]}
    return found


READERS: dict[str, Callable[[Path], dict]] = {
    "pretrain": trained,
    "finetune": trained,
    "accuracy": evaluated,
    "autoattack": evaluated,
    "analysis": analyzed,
}
