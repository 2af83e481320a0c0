"""Small complete runs for the tests: a folder of images made on the spot, in-process and as a child process."""

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image

from mimir_fast.cli.pretrain import main

# Seconds after which a child process hangs: many times what it takes on a busy machine.
PATIENCE = 1800
TINY = "--model mae_vit_nano --input_size 16 --patch_size 4 --norm_pix_loss --dataset imagefolder --device cpu --num_workers 0"
ATTACKED = "--attack pgd_mae --mi_train hsic --mi_xpl 1e-3"
SCHEDULE = "--batch_size 4 --epochs 2 --warmup_epochs 1 --lr 1e-3"


def make_images(folder: Path, count: int = 26) -> Path:
    """Two classes of small random pictures; 26 images are six batches of four."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((24, 20), Image.Resampling.BICUBIC).save(path)
    return folder


def command(data: Path, out: Path, extra: str = "") -> list[str]:
    """The words of a tiny run."""
    places = ["--data_root", str(data), "--output_dir", str(out), "--log_dir", str(out)]
    return [*TINY.split(), *ATTACKED.split(), *SCHEDULE.split(), *places, *extra.split()]


def run(data: Path, out: Path, extra: str = "") -> int:
    """Run in this process; returns the exit status."""
    return main(command(data, out, extra))


def start(
    data: Path, out: Path, extra: str = "", launcher: tuple[str, ...] = (), module: str = "mimir_fast.pretrain"
) -> subprocess.Popen:
    """Run as a child process, optionally under a launcher such as torchrun."""
    words = [sys.executable, "-u", *launcher, "-m", module, *command(data, out, extra)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(child: subprocess.Popen, timeout: float = PATIENCE) -> str:
    """Wait for a child process and everything it started; returns its output, and leaves nothing running."""
    try:
        return child.communicate(timeout=timeout)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_processes(worker: Callable, *arguments, join: bool = True) -> mp.ProcessContext | None:
    """worker(rank, *arguments) for both ranks; forked from one process that has imported everything.

    join   wait for both, of which one ends the other when it fails
    """
    multiprocessing.set_forkserver_preload(
        [
            "mimir_fast.training.sharding",
            "mimir_fast.training.loop",
            "torch._dynamo",
            "mimir_fast.evaluate",
            "sklearn.datasets",
            "pyautoattack",
        ]
    )
    return mp.start_processes(worker, arguments, nprocs=2, join=join, start_method="forkserver")


def load(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def same_state(a: dict, b: dict) -> bool:
    """Whether parameters and optimizer moments of two checkpoints are bit-identical."""
    if not all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]):
        return False
    first, second = a["optimizer"]["state"], b["optimizer"]["state"]
    return first.keys() == second.keys() and all(
        torch.equal(first[i][key], second[i][key]) for i in first for key in first[i]
    )


def lines(path) -> list[dict]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
