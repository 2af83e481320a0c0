"""The examples run as they stand, at toy size: their parameters come from variables."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.finetune_runs import make_data
from tests.support.runs import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
TOY = "--batch_size 4 --warmup_epochs 0 --device cpu --num_workers 0"
SMALL = f"--dataset imagefolder --input_size 16 --patch_size 8 {TOY}"
EPOCHS = {"PRETRAIN_EPOCHS": "1", "FINETUNE_EPOCHS": "1"}
# the programs that a script calls, here all of this Python
PROGRAMS = {
    "python": '"$PYTHON" "$@"',
    # one process as torchrun starts it, without the seconds that torchrun itself takes; tests/runs/test_distributed.py has it
    "torchrun": '[ "$1" == --nproc_per_node=1 ] && shift && RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 '
    'MASTER_ADDR=127.0.0.1 "$PYTHON" "$@"',
    "mimir-fast": '"$PYTHON" -m mimir_fast.cli "$@"',
    "srun": 'while [[ "$1" == --* ]]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1 "$@"',
    "scontrol": 'echo "$@" >> "$SCONTROL_LOG"; echo localhost',
}


@pytest.fixture
def example(tmp_path):
    """run(script, **variables) in an empty folder; returns what it printed and its exit status."""
    programs, folder = tmp_path / "programs", tmp_path / "work"
    programs.mkdir()
    folder.mkdir()
    for name, words in PROGRAMS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (programs / name).chmod(0o755)

    def run(script: str, **variables: str) -> tuple[str, int]:
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        logs = {"SCONTROL_LOG": str(tmp_path / "scontrol.log"), "MASTER_PORT": str(free_port())}
        env = os.environ | {"PATH": path, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")} | logs | variables
        root = str(EXAMPLES.parent)
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            ["bash", str(EXAMPLES / script)],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout, done.returncode

    return run


def made(folder: Path) -> set[str]:
    """Files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.*"):
        # the study has a test of its own, tests/runs/test_study.py
        assert f'"{path.name}"' in text or path.suffix in (".md", ".yaml") or path.name == "__init__.py", path.name


def test_only_the_attack(capsys):
    losses = runpy.run_path(str(EXAMPLES / "attack_in_your_loop.py"))["train"](steps=12)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.slow
def test_imagenet_on_gpus_of_one_machine(example, tmp_path):
    output, status = example(
        "imagenet_8gpu.sh",
        DATA=str(make_data(tmp_path / "data")),
        GPUS="1",
        BATCH="4",
        ATTACKS="clean,pgd-2",
        PRETRAIN_FLAGS=f"--model mae_vit_nano {SMALL}",
        FINETUNE_FLAGS=f"--model vit_nano --held_out 4 --val_attack pgd1 {SMALL}",
        EVALUATE_FLAGS="--device cpu",
        **EPOCHS,
    )
    assert status == 0, output
    files = made(tmp_path / "out")
    assert {"finetune/best.pth", "evaluate/results.json", "vit_b_robust.safetensors", "vit_b_robust.json"} <= files


@pytest.mark.slow
def test_imagenet_under_slurm_and_back_into_the_queue(example, tmp_path):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-4]", "DATA": str(make_data(tmp_path / "data"))}
    tuned = f"--model vit_nano --held_out 4 --val_attack none {SMALL}"
    log = tmp_path / "scontrol.log"
    # stopped early, as by SIGUSR1: one of six updates, no last checkpoint
    words = {"PRETRAIN_FLAGS": f"--model mae_vit_nano --max_steps 1 {SMALL}", "FINETUNE_FLAGS": tuned}
    output, status = example("imagenet_slurm.sh", **job, **words, **EPOCHS)
    assert status == 0, output
    assert log.read_text().splitlines() == ["show hostnames node[1-4]", "requeue 7"]
    assert not (tmp_path / "out" / "finetune").exists()
    words["PRETRAIN_FLAGS"] = f"--model mae_vit_nano {SMALL}"
    output, status = example("imagenet_slurm.sh", **job, **words, **EPOCHS)
    assert status == 0, output
    assert log.read_text().count("requeue") == 1
    assert {"pretrain/checkpoint-0.pth", "finetune/checkpoint-0.pth"} <= made(tmp_path / "out")


@pytest.mark.slow
def test_cifar10_without_generated_images(example, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for i in range(count):
            path = tmp_path / "data" / "cifar10" / split / f"class{i % 10}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = f"--patch_size 16 {TOY}"
    output, status = example(
        "cifar10_1gpu.sh",
        DATA=str(tmp_path / "data"),
        ATTACKS="clean,pgd-2",
        PRETRAIN_FLAGS=f"--model mae_vit_nano {flags}",
        FINETUNE_FLAGS=f"--model vit_nano --steps 1 {flags}",
        EVALUATE_FLAGS="--device cpu",
        **EPOCHS,
    )
    assert status == 0, output
    assert {"finetune/checkpoint-0.pth", "evaluate/results.json"} <= made(tmp_path / "out")


@pytest.mark.slow
def test_own_images(example, tmp_path):
    sizes = {"SIDE": "16", "PATCH": "8", "SIZE": "nano", "BATCH": "4", "EPS": "2"}
    words = {"DATA": str(make_data(tmp_path / "data")), "FLAGS": TOY, "EVALUATE_FLAGS": "--device cpu"}
    output, status = example("own_images.sh", **sizes, **words, **EPOCHS)
    assert status == 0, output
    files = made(tmp_path / "out")
    assert {"pretrain/report.html", "finetune/report.html", "evaluate/results.json"} <= files
