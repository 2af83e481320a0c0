"""Several processes evaluate together: the outcomes of one, nothing lost with a process that dies, its reason told to all."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.cli import evaluate as evaluate_command
from mimir_fast.config.sections import DistConfig
from mimir_fast.evaluate import Sizes, joined, parse_attacks, run_evaluation, watch
from mimir_fast.evaluate.records import ROBUST, Record
from mimir_fast.evaluate.team import Team
from mimir_fast.evaluate.watch import PeerError
from mimir_fast.models import create_classifier
from mimir_fast.training.distributed import World
from tests.support.classifiers import classifier, digits, one_thread, short_autoattack, untrained  # noqa: F401
from tests.support.runs import PATIENCE, finish, free_port, two_processes

SIZES, IMAGES = Sizes(4, 5), 26


class Counting(torch.nn.Module):
    """Counts its calls; at call `last` it kills the process."""

    def __init__(self, state: dict, last: int = 0):
        super().__init__()
        self.model, self.last, self.calls = untrained(), last, [0]
        self.model.load_state_dict(state)

    def __deepcopy__(self, memo):
        copy = Counting(self.model.state_dict(), self.last)
        copy.calls = self.calls
        return copy

    def forward(self, images):
        self.calls[0] += 1
        if self.calls[0] == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.model(images)


def member(rank: int, port: int, place, state: dict, words: str, last: int) -> None:
    """One of two processes of an evaluation in place/out; how it ended goes to place/RANK."""
    torch.set_num_threads(1)
    watch.BEAT = 0.1
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model = Counting(state, last if rank == 1 else 0)
    with pytest.MonkeyPatch.context() as patch:
        if "aa" in words:
            short_autoattack(patch)
        try:
            with joined(DistConfig(), "cpu") as team:
                attacks = parse_attacks(words, 12, 4, restarts=2)
                run_evaluation(model, "toy", digits(IMAGES), attacks, place / "out", sizes=SIZES, team=team)
            text = f"done {model.calls[0]}"
        except PeerError as error:
            text = f"{type(error).__name__} {error}"
    (place / str(rank)).write_text(text)


def two(place, words: str, last: int = 0) -> list[str]:
    """Evaluate with two processes, of which the second is killed at call `last` of its model; how each of them ended."""
    place.mkdir(exist_ok=True)
    state = classifier().state_dict()
    started = two_processes(member, free_port(), place, state, words, last, join=False)
    for process in started.processes:
        process.join(PATIENCE)
    found = [(place / str(rank)) for rank in range(2)]
    texts = [path.read_text() if path.exists() else "gone" for path in found]
    for path in found:
        path.unlink(missing_ok=True)
    return texts


def one(place, words: str) -> int:
    """Evaluate in this process; the number of calls."""
    model = Counting(classifier().state_dict())
    with pytest.MonkeyPatch.context() as patch:
        if "aa" in words:
            short_autoattack(patch)
        attacks = parse_attacks(words, 12, 4, restarts=2)
        run_evaluation(model, "toy", digits(IMAGES), attacks, place / "out", sizes=SIZES, say=lambda line: None)
    return model.calls[0]


def different(first, second) -> dict[str, int]:
    """Images whose outcome differs in any array, by the name of the record."""
    names = sorted(path.name for path in (first / "out" / "per_image").iterdir())
    assert names == sorted(path.name for path in (second / "out" / "per_image").iterdir())
    found = {}
    for name in names:
        ours, theirs = (dict(np.load(place / "out" / "per_image" / name)) for place in (first, second))
        unequal = [~((ours[k] == theirs[k]) | (ours[k] != ours[k])) for k in Record.ARRAYS]
        found[name] = int(np.any(unequal, axis=0).sum())
    return found


@pytest.mark.parametrize(("count", "size", "processes"), [(26, 4, 2), (26, 4, 3), (7, 8, 4), (0, 8, 2), (8, 1, 3)])
def test_every_batch_is_dealt_once_as_it_is_in_one_process(count, size, processes):
    rows = np.arange(100, 100 + count)
    whole = [tuple(rows[i : i + size]) for i in range(0, count, size)]
    dealt = []
    for rank in range(processes):
        mine = Team(World(rank, processes)).dealt(rows, size)
        dealt += [tuple(mine[i : i + size]) for i in range(0, len(mine), size)]
    assert sorted(dealt) == whole


def test_what_a_process_left_when_it_was_stopped_is_taken_over(tmp_path):
    """Whoever goes on: also a single process."""
    indices, path = np.arange(6), tmp_path / "pgd-2_eps=0.5.npz"
    whole, part = Record(path, indices), Record(path, indices)
    whole.note(np.array([0, 1]), 1, np.array([3, 3]), np.array([3, 4]), np.ones(2, np.float32))
    whole.seconds, part.seconds = 2.0, 3.0
    whole.save()
    part.note(np.array([4, 5]), 1, np.array([1, 1]), np.array([0, 1]), np.array([0.5, np.nan], np.float32))
    part.path = part.part(1)
    part.save()
    (tmp_path / f"{part.path.name}.77.tmp").write_bytes(b"cut")
    found = Record(path, indices)
    assert found.resume()
    assert found.broken.tolist() == [ROBUST, 1, ROBUST, ROBUST, 1, ROBUST]
    assert found.left(1).tolist() == [2, 3]
    assert found.seconds == 5.0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    again = Record(path, indices)
    assert again.resume()
    assert again.left(1).tolist() == [2, 3]


@pytest.mark.slow
def test_two_processes_have_the_outcomes_of_one_image_by_image(tmp_path):
    """Planted, each was seen to fail: a process skips its share, or does the others' as well; random starts by the place in the
    process's share; outcomes of the others not merged."""
    words = "fgsm,pgd-3,cw-2,aa"
    alone = one(tmp_path / "one", words)
    ended = two(tmp_path / "two", words)
    calls = [int(text.removeprefix("done ")) for text in ended]
    assert different(tmp_path / "one", tmp_path / "two") == {
        name: 0
        for name in ("aa_eps=12_group=5.npz", "clean.npz", "cw-2_eps=12_alpha=4_restarts=2.npz", "fgsm_eps=12.npz",
                     "pgd-3_eps=12_alpha=4_restarts=2.npz")
    }  # fmt: skip
    # Shared, not done twice; both look for vanishing gradients, in one call.
    assert alone <= sum(calls) <= alone + 12
    assert min(calls) > 0.3 * alone
    assert not list((tmp_path / "two" / "out").glob("**/*.part-*"))


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_nothing_finished_is_done_again(tmp_path):
    """Planted, it was seen to fail: what the killed one had finished is not taken over."""
    words = "pgd-9"
    one(tmp_path / "one", words)
    ended = two(tmp_path / "two", words, last=25)
    assert ended[1] == "gone"
    assert ended[0].startswith("PeerError")
    assert "ended without a word" in ended[0]
    assert ended[0].endswith("finished batches are saved, the same command goes on")
    found = Record(tmp_path / "two" / "out" / "per_image" / "pgd-9_eps=12_alpha=4_restarts=2.npz", np.arange(0))
    records = [np.load(path) for path in found.path.parent.glob(f"{found.path.name}*")]
    done = int((np.max([record["rounds"] for record in records], axis=0) > 0).sum())
    assert done >= 8
    calls = [int(text.removeprefix("done ")) for text in two(tmp_path / "two", words)]
    assert not any(different(tmp_path / "one", tmp_path / "two").values())
    # Each batch of four takes ten calls; of the first round those of `done` are not repeated.
    left = (IMAGES - done + 3) // 4 + (IMAGES + 3) // 4
    assert sum(calls) <= 10 * left + 8


@pytest.fixture
def watches(monkeypatch):
    """Two processes that watch each other, in one process."""
    monkeypatch.setattr(watch, "BEAT", 0.02)
    monkeypatch.setattr(watch, "PATIENCE", 2.0)
    store = dist.HashStore()
    pair = [watch.Watch(store, rank, 2) for rank in range(2)]
    yield pair
    for member in pair:
        member.stop()


def interrupted() -> None:
    """Returns when another thread interrupts this one; fails after a while."""

    def busy() -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        busy()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_ends_by_an_error_tells_the_other_why(watches, rank):
    """Planted: the reason is not told, so that the other waits for beats; a KeyboardInterrupt is taken for the user's."""
    first = CheckpointError("checkpoint: x.pth answers NaN\nmore")
    told = threading.Thread(target=watches[rank].ends, args=(first,))
    told.start()
    interrupted()
    told.join()
    other = watches[1 - rank]
    text = str(other.ends(KeyboardInterrupt()))
    assert (
        text
        == f"process {rank} of 2: checkpoint: x.pth answers NaN; finished batches are saved, the same command goes on"
    )
    assert isinstance(other.ends(RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1")), PeerError)


def test_a_process_that_is_killed_is_missed(watches, monkeypatch):
    """While the other one computes, or hangs where Python cannot interrupt it; planted: it goes on for ever."""
    left = []
    monkeypatch.setattr(watch, "GRACE", 0.1)
    monkeypatch.setattr(watch.os, "_exit", left.append)
    watches[1].stop()
    interrupted()
    watches[0]._thread.join(PATIENCE)
    assert watches[0].lost == "process 1 of 2 ended without a word or hangs (was it killed?)"
    assert left == [1]


def test_the_whole_watch_takes_less_than_a_minute():
    assert 2 * watch.BEAT + watch.PATIENCE + watch.GRACE < 60


@pytest.mark.slow
def test_torchrun_evaluates_with_all_processes_and_prints_once(tmp_path):
    """As a user starts it; planted: every process prints."""
    torch.manual_seed(0)
    args = {"model": "vit_ti", "input_size": 32, "patch_size": 16, "nb_classes": 10, "dataset": "digits"}
    model = create_classifier("vit_ti", img_size=32, patch_size=16, num_classes=10)
    torch.save({"model": model.state_dict(), "epoch": 1, "args": argparse.Namespace(**args)}, tmp_path / "x.pth")
    words = (
        f"--checkpoint {tmp_path / 'x.pth'} --device cpu --num_images 30 --batch_size 4 --attacks pgd-2 --output_dir"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command = [
        sys.executable,
        "-u",
        *launcher,
        "-m",
        "mimir_fast.evaluate",
        *words.split(),
        str(tmp_path / "two" / "out"),
    ]
    out = finish(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    )
    assert out.count("95 % interval") == 1, out
    assert out.count("on cpu x 2") == 1
    data = json.loads((tmp_path / "two" / "out" / "results.json").read_text())
    assert [entry["processes"] for entry in data["attacks"].values()] == [2, 2]
    assert evaluate_command.main([*words.split(), str(tmp_path / "one" / "out")]) == 0
    assert not any(different(tmp_path / "one", tmp_path / "two").values())
