"""python -m bench train: how stages are timed and FLOPs counted, a whole run on the CPU, wrong arguments, the pretend GPU."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import stage_times
from bench.__main__ import main
from bench.images import DISTINCT, write_images
from bench.model_flops import model_flops
from bench.stage_times import StageTimes, percentiles
from bench.step.variants import configuration
from bench.train import lines, mfu
from bench.training import peaks_name
from mimir_fast.training.stages import STAGES, listening, stage
from tests.support.runs import make_images

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT.parent / "shared" / "tools" / "drygpu" / "drygpu"  # an outside program, where it is there
SMALL = "--model mae_vit_ti --batch 4 --input_size 16 --patch_size 8 --warmup 1".split()
ON_CPU = "--device cpu --num_workers 0".split()
CPU = torch.device("cpu")


class Clock:
    """A clock that stands still between the calls of `pass_`."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def one_update(times: StageTimes, clock: Clock, slower: float = 1.0) -> None:
    """10 s in all: data 1, attack 4 (its loss included), encoder 1, decoder 0.5, loss 0.5, optimizer 2, rest 1."""

    @contextmanager
    def lasting(name: str, seconds: float):
        with times.open(name):
            yield
            clock.pass_(seconds * slower)

    with lasting("data", 1):
        pass
    with lasting("attack", 3), lasting("loss", 1):
        pass
    with lasting("encoder", 1):
        pass
    with lasting("decoder", 0.5), lasting("loss", 0.5):
        pass
    clock.pass_(1 * slower)
    with lasting("optimizer", 2):
        pass


def test_shares_leave_out_inner_stages_and_the_warm_up(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(stage_times, "time", clock)
    times = StageTimes(CPU, warmup=2)
    for count, slower in enumerate((7.0, 3.0, 1.0, 2.0), 1):
        one_update(times, clock, slower)
        times.updated(count)
    assert times.updates() == pytest.approx([10, 20])
    shares = times.shares()
    expected = {
        "data": 0.1,
        "attack": 0.4,
        "encoder": 0.1,
        "decoder": 0.05,
        "loss": 0.05,
        "optimizer": 0.2,
        "rest": 0.1,
    }
    assert shares == pytest.approx(expected)
    assert times.data_wait() == pytest.approx(0.1)


class Event:
    """A CUDA event that knows when it was recorded, on a device that lags behind its host."""

    clock = Clock()

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        self.at = self.clock.now

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


def test_on_cuda_events_tell_the_time_and_the_penalty_comes_on_top(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    times = StageTimes(torch.device("cuda"), warmup=1)
    times.updated(1)
    with times.open("encoder"):
        Event.clock.pass_(2)
    began = Event.clock.now
    with times.open("penalty"):
        Event.clock.pass_(3)
    Event.clock.now = began  # another stream
    with times.open("decoder"):
        Event.clock.pass_(6)
    times.updated(2)
    assert times.updates() == [8]
    assert times.shares() == pytest.approx({"encoder": 0.25, "penalty": 0.375, "decoder": 0.75, "rest": 0})


def test_percentiles():
    assert percentiles([3.0]) == {"20": 3.0, "80": 3.0}
    assert percentiles([float(n) for n in range(11)][::-1]) == {"20": 2.0, "80": 8.0}


def test_flops_per_image_counted_by_hand():
    words = "--model mae_vit_ti --input_size 32 --patch_size 8 --batch_size 7 --device cpu --activation_checkpointing"
    config = configuration("ours", words.split())
    D, E, L, K, P = 192, 128, 16, 4, 192
    embed = K * P * D
    encoder = 12 * 12 * (1 + K) * D * D
    first, last = (
        12 * (1 + L) * E * E,
        (3 * (1 + L) + 9 * (L - K)) * E * E,
    )  # the last one answers for removed patches only
    linear = embed + encoder + (1 + K) * D * E + first + last + (L - K) * E * P
    products = 12 * 2 * (1 + K) ** 2 * D + 2 * (1 + L) ** 2 * E + 2 * (L - K) * (1 + L) * E
    # attack: forward and gradient of the inputs; training: forward and both gradients, but none of the pixels
    assert model_flops(config) == 2 * (5 * linear - embed + 6 * products)


def test_mfu():
    record = {"peaks": "h100", "model GFLOP per image": 10.0}
    assert mfu(record, 989e12 / 10e9 / 4, "bf16") == pytest.approx(0.25)
    torch.set_float32_matmul_precision("high")
    try:
        assert mfu(record, 494.5e12 / 10e9 / 2, "fp32") == pytest.approx(0.5)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mfu(record, 67e12 / 10e9 / 2, "fp32") == pytest.approx(0.5)
    assert mfu(record | {"peaks": None}, 1.0, "bf16") is None


def test_peaks_are_the_devices():
    assert peaks_name("NVIDIA A100-SXM4-80GB", None) == "a100"
    assert peaks_name("NVIDIA A100-SXM4-80GB", "h100") == "h100"
    assert peaks_name("NVIDIA GeForce RTX 3090", None) is None
    assert peaks_name("cpu", "h100") is None


def test_a_whole_run_on_the_cpu(tmp_path, capsys):
    data, results = make_images(tmp_path / "data"), tmp_path / "train.jsonl"
    words = [*SMALL, "--updates", "4", "--data_root", str(data), "--results", str(results)]
    assert main(["train", *words, "--", *ON_CPU, "--accum_iter", "2"]) == 0
    (record,) = map(json.loads, results.read_text().splitlines())
    assert record["device"] == "cpu"
    assert (record["updates"], record["warmup"], record["images"]) == (4, 1, 26)
    assert record["config"]["data_root"] == "data"
    assert set(record["stages"]) == {*STAGES, "rest"}
    assert sum(record["stages"].values()) == pytest.approx(1)
    assert min(record["stages"].values()) >= 0
    assert record["images/s"] > 0
    assert record["percentiles"]["20"] <= record["percentiles"]["80"]
    assert 0 < record["data wait"] < 1
    assert record["mfu"] is None
    assert record["peak GiB"] > 0
    printed = capsys.readouterr().out
    assert "MFU unknown" in printed
    assert "mae_vit_ti 16/8, batch 4 x 2, fp32" in printed
    assert "5/5" in printed  # the trainer's own progress, with the time that remains
    assert not (tmp_path / "experiment").exists()


def test_the_lines_of_a_record_without_times():
    record = {
        "config": {
            "model": "m",
            "input_size": 8,
            "patch_size": 2,
            "batch_size": 4,
            "accum_iter": 1,
            "precision": "bf16",
        }
        | {"compile": True, "data_root": "synthetic"},
        "device": "pretend-h100",
        "images": 9,
        "updates": 2,
        "warmup": 1,
        "model GFLOP per image": 1.0,
        "peak GiB": 2.0,
        "images/s": None,
        "stages": {"data": None, "rest": None},
    }
    text = "\n".join(lines(record))
    assert "no times" in text
    assert "stages data, rest" in text
    assert "images/s" not in text


@pytest.mark.parametrize("status", [0, 1])  # a signal, a divergence
def test_a_training_that_ends_early_leaves_no_record(status, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mimir_fast.training.loop.Loop.run", lambda self: status)
    words = [*SMALL, "--updates", "2", "--data_root", str(make_images(tmp_path)), "--results", str(tmp_path / "none")]
    assert main(["train", *words, "--", *ON_CPU]) == 1
    assert f"the training ended with status {status} after 0 of 3 updates" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--batch 0", "batch: expected 1 or more, got 0"),
        ("--warmup 0", "warmup: expected 1 or more, got 0"),
        ("--updates 9 -- --epochs 1 --warmup_epochs 0", "updates: 10 are needed (warmup + updates)"),
        ("--data_root /no/such/folder", "no such folder"),
        ("--updates 2 -- --mask_ratio 2", "mask_ratio"),
    ],
)
def test_wrong_arguments(words, complaint, tmp_path, capsys):
    own, _, flags = words.partition("--" if words.startswith("-- ") else " -- ")
    data = [] if "data_root" in words else ["--data_root", str(make_images(tmp_path))]
    assert main(["train", *SMALL, *data, *own.split(), "--", *ON_CPU, *flags.split()]) == 2
    assert complaint in capsys.readouterr().err


def test_synthetic_images_are_many_but_take_little_room(tmp_path):
    folder = write_images(tmp_path / "new", 2 * DISTINCT + 1, width=20, height=12)
    files = sorted(folder.glob("train/*/*.jpg"))
    assert len(files) == 2 * DISTINCT + 1
    assert len({os.stat(file).st_ino for file in files}) == DISTINCT
    assert len({file.read_bytes() for file in files}) == DISTINCT
    with Image.open(files[-1]) as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (20, 12), "RGB")


def test_compiled_code_neither_breaks_nor_depends_on_the_listener():
    graphs, opened = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def loss(x):
        with stage("loss"):
            return x.sin()

    def listener(name):
        opened.append(name)
        return nullcontext()

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    compiled(torch.zeros(3))
    with listening(listener):
        compiled(torch.zeros(3))
        assert opened == []
        loss(torch.zeros(3))
        with pytest.raises(RuntimeError, match="one listener"), listening(listener):
            pass
    loss(torch.zeros(3))
    assert (len(graphs), opened) == (1, ["loss"])


def test_on_the_pretend_gpu_it_runs_through_and_claims_no_times(tmp_path):
    if not WRAPPER.exists():
        pytest.skip(f"no pretend GPU at {WRAPPER}")
    results, log = tmp_path / "train.jsonl", tmp_path / "launches.log"
    words = [*SMALL, "--updates", "2", "--results", str(results), "--", "--no_compile", "--num_workers", "0"]
    command = [str(WRAPPER), "--log", str(log), sys.executable, "-m", "bench", "train", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, results.read_text().splitlines())
    assert (record["device"], record["peaks"], record["images"]) == ("pretend-h100", "h100", 16)
    assert {record[name] for name in ("images/s", "percentiles", "mfu", "data wait")} == {None}
    assert record["stages"] == dict.fromkeys([*STAGES, "rest"])
    assert 0 < record["peak GiB"] < 1
    assert "a pretend GPU: no times" in done.stdout
