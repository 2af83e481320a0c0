"""Small complete fine-tunings for the tests; as a program, one of them: `python -m tests.support.finetune_runs FLAGS`.

vit_ti and mae_vit_ti are two blocks of width 24 here.
"""

import subprocess
import sys
from pathlib import Path

import torch

from mimir_fast.cli.finetune import main
from mimir_fast.models import create_model
from tests.support.runs import lines, load, make_images
from tests.support.small_models import small_models

TINY = "--model vit_ti --input_size 16 --patch_size 4 --dataset imagefolder --device cpu --num_workers 0 --aa noaug --reprob 0"
ATTACKED = "--attack_train pgd --steps 2 --alpha 4"
SCHEDULE = "--batch_size 4 --epochs 2 --warmup_epochs 1 --lr 1e-3"
STATE = ("model", "model_ema")

__all__ = ["command", "finetune", "lines", "load", "make_data", "pretrained", "same_run", "start"]


def make_data(folder: Path, images: int = 26, test_images: int = 9) -> Path:
    """Two classes: 26 training images are six batches of four, 9 test images are three."""
    make_images(folder, images)
    make_images(folder / "other", test_images)
    (folder / "other" / "train").rename(folder / "val")
    return folder


def pretrained(path: Path) -> dict:
    """A fresh masked autoencoder's checkpoint, written to path; returns its tensors."""
    torch.manual_seed(7)
    tensors = create_model("mae_vit_ti", img_size=16, patch_size=4).state_dict()
    torch.save({"model": tensors}, path)
    return tensors


def command(data: Path, out: Path, extra: str = "") -> list[str]:
    """The words of a tiny fine-tuning."""
    places = ["--data_root", str(data), "--output_dir", str(out), "--log_dir", str(out)]
    return [*TINY.split(), *ATTACKED.split(), *SCHEDULE.split(), *places, *extra.split()]


def finetune(data: Path, out: Path, extra: str = "") -> int:
    """Run in this process; returns the exit status."""
    return main(command(data, out, extra))


def start(data: Path, out: Path, extra: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Run as a child process, optionally under a launcher such as torchrun."""
    words = [sys.executable, "-u", *launcher, "-m", "tests.support.finetune_runs", *command(data, out, extra)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def same_run(a: dict, b: dict) -> bool:
    """Whether parameters, averages, moments and the best epoch of two checkpoints are bit-identical."""
    for entry in STATE:
        ours, theirs = a.get(entry, {}), b.get(entry, {})
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
            return False
    ours, theirs = a["optimizer"]["state"], b["optimizer"]["state"]
    same = all(torch.equal(ours[i][key], theirs[i][key]) for i in ours for key in ours[i])
    return same and ours.keys() == theirs.keys() and a["mimir_fast"]["best"] == b["mimir_fast"]["best"]


if __name__ == "__main__":
    small_models(dict.__setitem__)
    sys.exit(main())
