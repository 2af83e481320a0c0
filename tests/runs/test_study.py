"""The study of examples/study: its command lines, its rule for the recipe, and that it goes on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples.study import run as command
from examples.study.attempts import Attempts
from examples.study.hidden_attack import without_visible
from examples.study.jobs import plan
from examples.study.plan import CIFAR10, DIGITS, MIMIR, STUDIES
from examples.study.progress import progress
from examples.study.recipe import NoRecipeError, chosen, tried
from examples.study.results import add_row, holding, read_rows
from examples.study.run import Worker, wanted
from mimir_fast.attacks.pgd_mae import ascend_reconstruction, linf_bounds, plain_functions, starting_point
from mimir_fast.cli.analyze import COMMAND as ANALYZE
from mimir_fast.cli.evaluate import COMMAND as EVALUATE
from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.models import create_model

ROOT = Path(__file__).parents[2]
PARSERS = {
    "pretrain": PRETRAIN,
    "pretrain_hidden": PRETRAIN,
    "finetune": FINETUNE,
    "evaluate": EVALUATE,
    "analyze": ANALYZE,
}
FIRST = CIFAR10.candidates[0]


def searched(accuracies: dict[str, tuple[float, float]]) -> list[dict]:
    """Rows of a search: candidate -> (clean, PGD-20)."""
    return [
        {
            "job": name,
            "part": "search",
            "arm": name,
            "what": "accuracy",
            "results": dict(zip(("clean", "pgd-20"), results)),
        }
        for name, (c, p) in accuracies.items()
        for results in [({"accuracy": c}, {"accuracy": p})]
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_every_command_line_is_valid(name, tmp_path):
    jobs = plan(STUDIES[name], tmp_path, [], STUDIES[name].candidates[0])
    configs = {job.name: parse_args(PARSERS[job.verb], job.words)[0].flat() for job in jobs}
    assert len(configs) == len(jobs)
    begun = set()
    for job in jobs:
        assert begun.issuperset(job.needs), job.name
        begun.add(job.name)
        if "epochs" in configs[job.name]:
            assert job.product == Path(
                configs[job.name]["output_dir"], f"checkpoint-{configs[job.name]['epochs'] - 1}.pth"
            )


def test_arms_differ_in_what_they_compare():
    tuned, begun = {}, {}
    for job in plan(CIFAR10, Path("runs"), [], FIRST):
        config = parse_args(PARSERS[job.verb], job.words)[0].flat()
        config = {key: value for key, value in config.items() if key not in ("output_dir", "finetune")}
        if job.seed == 1 and job.what in ("finetune", "pretrain"):
            (tuned if job.what == "finetune" else begun)[job.arm] = config
    longer = tuned.pop("scratch-long")
    assert all(config == tuned["scratch"] for config in tuned.values())
    assert {key for key in longer if longer[key] != tuned["scratch"][key]} == {"epochs", "val_every"}
    changed = {arm: {key for key in c if c[key] != begun[MIMIR.name][key]} for arm, c in begun.items()}
    assert changed.pop("mae") == {"attack", "mi_train"}
    assert changed.pop("hidden-attack") == set()
    assert changed.pop("mimir-renyi2") == changed.pop("mimir-plain") == {"mi_train"}
    assert changed.pop("eps-4") == {"eps", "alpha"}
    assert changed.pop(MIMIR.name) == set()
    assert sorted(map(tuple, changed.values())) == [("mask_ratio",)] * 2 + [("mi_xpl",)] * 3 + [("steps",)]


def test_the_whole_study_fits_into_twelve_core_hours():
    # the search goes on to the second radius
    wide = searched({c.name: (0.5, 0.1) for c in CIFAR10.candidates[:3]})
    hours = sum(job.seconds for job in plan(CIFAR10, Path("runs"), wide)) / 3600
    assert 6 < hours < 12


def test_recipe_is_the_most_robust_of_the_first_radius_that_is_enough():
    wide, narrow = (tuple(c.name for c in CIFAR10.candidates if c.eps == eps) for eps in (8, 4))
    assert [c.name for c in tried(CIFAR10, [])] == list(wide)
    rows = searched(dict.fromkeys(wide, (0.5, 0.19)))
    assert chosen(CIFAR10, rows[:-1]) is None
    # not robust enough: the next radius
    assert [c.name for c in tried(CIFAR10, rows)] == [*wide, *narrow]
    assert chosen(CIFAR10, rows) is None
    more = searched(dict.fromkeys(narrow, (0.31, 0.21)) | {narrow[2]: (0.3, 0.25), narrow[1]: (0.29, 0.4)})
    assert chosen(CIFAR10, rows + more).name == narrow[2]
    rows = searched(dict.fromkeys(wide, (0.31, 0.21)))
    assert chosen(CIFAR10, rows).name == wide[0]
    with pytest.raises(NoRecipeError, match="30% clean and 20% under PGD-20"):
        chosen(CIFAR10, searched(dict.fromkeys(wide + narrow, (0.29, 0.25))))


def test_arms_wait_for_the_recipe(tmp_path):
    jobs = plan(CIFAR10, tmp_path, [])
    assert all("recipe" in job.needs for job in jobs if job.what == "finetune" and job.part != "search")
    found = plan(CIFAR10, tmp_path, searched({c.name: (0.4, 0.3) for c in CIFAR10.candidates}))
    assert not any("recipe" in job.needs for job in found)


def test_only_some_jobs_and_what_they_need(tmp_path):
    jobs = plan(DIGITS, tmp_path, [], DIGITS.candidates[0])
    names = [job.name for job in wanted(jobs, ["mimir-hsic/1/accuracy"])]
    assert names == [f"mimir-hsic/1/{what}" for what in ("pretrain", "finetune", "accuracy")]
    searching = wanted(plan(DIGITS, tmp_path, []), ["scratch/0/*"])
    assert [job.part for job in searching] == ["search"] * 4 + ["compared"] * 2 + ["analysis"]
    with pytest.raises(ValueError, match=r"only: no job matches x/\*"):
        wanted(jobs, ["x/*"])


class Verbs:
    """Stands in for the verbs: every job leaves its product and a row."""

    def __init__(self, monkeypatch, study):
        self.seen, self.ends, self.products = [], {}, {}
        monkeypatch.setattr(command, "VERBS", {verb: self.verb for verb in PARSERS})
        readers = {
            what: lambda product: {"clean": {"accuracy": 0.5}, "pgd-20": {"accuracy": 0.4}} for what in command.READERS
        }
        monkeypatch.setattr(command, "READERS", readers)

    def verb(self, words):
        folder = Path(words[words.index("--output_dir") + 1])
        name = "/".join(folder.parts[-3:])
        self.seen.append(name)
        for product in () if name in self.ends else ("checkpoint-0.pth", "results.json", "analysis.json"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / product).touch()
        return self.ends.get(name, 0)


def test_runs_every_job_once_and_goes_on_where_one_ended(tmp_path, monkeypatch):
    verbs, said = Verbs(monkeypatch, DIGITS), []
    worker = Worker(DIGITS, tmp_path, None, (), said.append)
    verbs.ends = {"mimir-plain/0/finetune": 1}
    assert worker.run() == 1
    assert "mimir-plain/0/finetune ended with status 1" in said[-1]
    # a training that SIGTERM stopped
    verbs.ends = {"mimir-plain/0/finetune": 0}
    assert worker.run() == 143
    verbs.ends = {}
    assert worker.run() == worker.run() == 0
    assert len(verbs.seen) == len(set(verbs.seen)) + 2
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row["job"] for row in rows] == [job.name for job in plan(DIGITS, tmp_path, rows)]
    assert all(row["began"] <= row["ended"] and row["cpu_seconds"] >= 0 for row in rows)


def test_a_job_of_another_process_is_left_to_it(tmp_path, monkeypatch):
    verbs = Verbs(monkeypatch, DIGITS)
    jobs = plan(DIGITS, tmp_path, [], DIGITS.candidates[0])
    worker = Worker(DIGITS, tmp_path, DIGITS.candidates[0], (), lambda line: None)
    with holding(tmp_path / "locks" / f"{jobs[0].name.replace('/', '_')}.lock"):
        assert worker.one_of(jobs[:1], jobs, []) is None
        assert worker.one_of(jobs[:3], jobs, []) == 0
    assert verbs.seen == [jobs[1].name]


def test_rows_are_whole_and_each_job_has_one(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    for row in ({"job": "a", "n": 1}, {"job": "b"}, {"job": "a", "n": 2}):
        add_row(path, row)
    assert read_rows(path) == [{"job": "a", "n": 1}, {"job": "b"}]


def test_cpu_time_of_all_attempts(tmp_path):
    path = tmp_path / "x" / "finetune.attempts.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"began": "2020-01-01T00:00:00+00:00", "cpu_seconds": 100.0}))
    attempts = Attempts(path)
    with attempts.counted():
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    assert attempts.began.startswith("2020")
    assert 100.05 <= json.loads(path.read_text())["cpu_seconds"] < 110


def test_time_left_follows_the_rows():
    jobs = plan(DIGITS, Path("runs"), [], DIGITS.candidates[0])
    accuracy = [job for job in jobs if job.what == "accuracy"]
    rows = [{"job": job.name, "cpu_seconds": 500 * job.seconds} for job in accuracy]
    left = sum(job.seconds for job in jobs if job.what != "accuracy") / 3600
    assert f"[{len(rows)}/{len(jobs)} jobs" in progress(jobs, rows)
    assert f"about {left:.2f} left" in progress(jobs, rows)
    assert f"about {left + 500 * accuracy[0].seconds / 3600:.2f} left" in progress(jobs, rows[1:])


def test_hidden_attack_moves_removed_patches_alone():
    torch.manual_seed(0)
    model = create_model("mae_vit_nano", img_size=16, patch_size=4)
    images, noise, seed = torch.rand(2, 3, 16, 16), torch.rand(2, 16), torch.tensor(5)
    bounds = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")
    functions = plain_functions(model)
    hidden = functions._replace(step=lambda *args, **options: without_visible(functions.step, *args, **options))
    options = {"start": seed, "mask_noise": [noise]}
    usual = ascend_reconstruction(model, images, bounds, functions=functions, **options)
    ours = ascend_reconstruction(model, images, bounds, functions=hidden, **options)
    start = starting_point(images, bounds, seed, model.kernels).clamp(0, 1)
    visible = torch.zeros(2, 16).scatter(1, noise.argsort(dim=1)[:, :4], 1.0).view(2, 1, 4, 4)
    visible = visible.repeat_interleave(4, 2).repeat_interleave(4, 3).bool().expand_as(images)
    torch.testing.assert_close(ours[visible], start[visible], rtol=0, atol=1e-6)
    assert torch.equal(ours[~visible], usual[~visible])
    assert (usual[visible] - start[visible]).abs().mean() > 1e-3


@pytest.mark.slow
def test_goes_on_after_a_kill(tmp_path):
    words = "--study digits --recipe eps4-lr0.001-batch64 --only hidden-attack/0/accuracy --output_dir".split()
    program = [sys.executable, "-m", "examples.study", *words, str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen(program, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    while not (tmp_path / "runs/hidden-attack/0/finetune").exists():
        assert killed.poll() is None
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [row["what"] for row in read_rows(tmp_path / "results.jsonl")] == ["pretrain"]
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row["what"] for row in rows] == ["pretrain", "finetune", "accuracy"]
    assert rows[-1]["results"]["clean"]["n"] == DIGITS.test_images
    assert "[1/3 jobs" in done.stdout
