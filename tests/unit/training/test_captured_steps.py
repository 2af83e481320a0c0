"""Captured steps, on a tape in place of CUDA graphs: the same training to the last bit, whatever changes from one launch to the
next, wherever the training stops and goes on, and whatever cannot be captured."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.models.families.xcit import XCIT
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop
from mimir_fast.training.stages import listening
from tests.support import finetune_runs, runs
from tests.support.captured_runs import same, train
from tests.support.runs import free_port, two_processes
from tests.support.tape import Tape
from tests.support.toy_task import ToyOutput, ToyTask, toy_run

EPOCHS = "--epochs 3 --warmup_epochs 1 --log_every 2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def test_data(tmp_path_factory):
    return finetune_runs.make_data(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    finetune_runs.small_models(monkeypatch.setitem)


@pytest.mark.parametrize(
    ("extra", "captures"),
    [
        ("", 1),
        ("--accum_iter 2 --precision bf16", 2),
        # 6 micro-batches an epoch: an update and two that no update follows, which are the first to be captured
        ("--accum_iter 4 --epochs 6 --steps 2 --use_normalize", 2 + 3),
        # its masks and windows come from the host
        ("--model mae_swin_tiny --accum_iter 2 --precision bf16", 2),
    ],
)
def test_pretraining(data, tmp_path, extra, captures):
    tape = Tape()
    loop = train("pretrain", data, tmp_path / "graph", f"{EPOCHS} {extra}", tape)
    train("pretrain", data, tmp_path / "eager", f"{EPOCHS} {extra}")
    assert same(tmp_path / "graph", tmp_path / "eager")
    assert tape.begun == captures
    assert tape.launched > 0
    assert loop.engine.captured.reason == ""


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_running_statistics(request, tmp_path, monkeypatch, task):
    """A captured step moves them too: once in every micro-step, and the average follows."""
    monkeypatch.setitem(XCIT.sizes, "xcit_small", {"embed_dim": 16, "depth": 1, "num_heads": 4, "cls_attn_layers": 1})
    words = {"pretrain": "--model mae_xcit_small --accum_iter 2", "finetune": "--model xcit_small --model_ema"}
    extra, tape = f"{words[task]} --patch_size 8 --epochs 2 --warmup_epochs 0", Tape()
    images = request.getfixturevalue("data" if task == "pretrain" else "test_data")
    loop = train(task, images, tmp_path / "graph", extra, tape)
    train(task, images, tmp_path / "eager", extra)
    assert tape.launched > 0
    assert same(tmp_path / "graph", tmp_path / "eager")
    state = loop.task.model.state_dict()
    assert {int(state[name]) for name in state if name.endswith("num_batches_tracked")} == {2 * 6}


@pytest.mark.parametrize(
    ("extra", "captures"),
    [
        # nothing is measured between epochs: the first one's graph goes on with the later ones' radius of the attack
        ("--layer_decay .7 --drop_path .1 --model_ema --mixup .8 --cutmix 1 --eps_warmup_epochs 2 --test_every 0", 1),
        ("--attack_train trades --precision bf16 --clip_grad 1 --accum_iter 3 --val_attack pgd2 --test_every 2", None),
        # images are mixed from epoch 6 on: other targets, another step
        ("--warmup_aa --start_epoch 4 --epochs 9 --attack_train apgd", None),
    ],
)
def test_finetuning(test_data, tmp_path, extra, captures):
    tape = Tape()
    train("finetune", test_data, tmp_path / "graph", f"{EPOCHS} {extra}", tape)
    train("finetune", test_data, tmp_path / "eager", f"{EPOCHS} {extra}")
    assert same(tmp_path / "graph", tmp_path / "eager")
    assert tape.launched > 0
    assert captures in (None, tape.begun)


@pytest.mark.parametrize("order", [("graph", "eager"), ("eager", "graph"), ("graph", "graph")])
def test_a_run_in_pieces_is_the_whole_run_whoever_captures(data, tmp_path, order):
    train("pretrain", data, tmp_path / "whole", EPOCHS)
    for stop, how in zip((5, 0), order):
        tape = Tape() if how == "graph" else None
        train("pretrain", data, tmp_path / "pieces", f"{EPOCHS} --resume auto --max_steps {stop}", tape)
        assert tape is None or tape.launched > 0
    assert same(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize(
    ("extra", "refused", "stretches"),
    [("", "aten.linalg_cholesky_ex", 1 + 2), ("--mi_train dib_mi", "aten._linalg_eigh", 2)],
)
def test_a_penalty_that_cannot_be_captured_runs_between_two_graphs(data, tmp_path, capsys, extra, refused, stretches):
    tape = Tape(refused)
    loop = train("pretrain", data, tmp_path / "graph", f"{EPOCHS} {extra}", tape)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step_graph: ")]
    train("pretrain", data, tmp_path / "eager", f"{EPOCHS} {extra}")
    assert same(tmp_path / "graph", tmp_path / "eager")
    assert (tape.begun, loop.engine.captured.reason) == (stretches, "")
    assert len(told) == (stretches == 3)
    assert all(
        "operation not permitted when stream is capturing); the penalty runs between two graphs" in line
        for line in told
    )


def test_a_step_that_cannot_be_captured_runs_uncaptured_and_says_so(data, tmp_path, capsys):
    tape = Tape("aten._fused_adamw_")
    loop = train("pretrain", data, tmp_path / "graph", EPOCHS, tape)
    assert "step_graph: the step could not be captured (aten._fused_adamw_" in capsys.readouterr().out
    assert loop.engine.captured.reason.startswith("its capture failed: aten._fused_adamw_")
    assert (tape.begun, tape.launched) == (3, 0)  # once, and with the penalty outside


def test_who_listens_to_stages_sees_the_step_uncaptured(data, tmp_path):
    tape, opened = Tape(), []
    with listening(lambda name: opened.append(name) or nullcontext()):
        train("pretrain", data, tmp_path / "graph", EPOCHS, tape)
    assert (tape.begun, opened.count("attack")) == (0, 18)


class SometimesInfinite(ToyTask):
    """Batches whose first pixel is bright have no finite loss."""

    def step(self, objective, attacked, functions, pixels, noise) -> ToyOutput:
        output = super().step(objective, attacked, functions, pixels, noise)
        return output._replace(loss=output.loss * torch.where(pixels[0, 0] > 0.5, torch.inf, 1.0))


def test_skipped_updates_are_counted_where_they_were(tmp_path):
    told = {}
    for how, tape in (("graph", Tape()), ("eager", None)):
        torch.manual_seed(3)
        run = toy_run(tmp_path / how, accum_iter=1, epochs=4)
        loop = Loop(SometimesInfinite(run, average_decay=0.5), World(), tape)
        assert loop.run() == 0
        loop.close()
        told[how] = (
            loop.engine.updater.counters.tolist(),
            [
                [row[key] for key in ("loss", "grad_norm", "skipped_steps")]
                for row in runs.lines(tmp_path / how / "metrics.jsonl")
            ],
        )
    assert told["graph"] == told["eager"]
    total, _, worst = told["eager"][0]
    assert 2 < total < 20
    assert worst > 0


def worker(rank: int, port: int, data: str, out: str, extra: str, captures: bool) -> None:
    """One of two processes of a pre-training."""
    torch.set_num_threads(1)
    finetune_runs.small_models(dict.__setitem__)
    own = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(own | {"MASTER_PORT": str(port)})
    tape = Tape() if captures else None
    loop = train("pretrain", Path(data), Path(out), f"{EPOCHS} {extra}", tape)
    assert isinstance(loop.engine.objective, DistributedDataParallel) is not captures
    assert tape is None or tape.launched > 0


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "--batch_size 2 --accum_iter 3 --grad_compression bf16"])
def test_two_processes_average_their_gradients_between_two_graphs(data, tmp_path, extra):
    """As DDP does; without accumulation and compression to the last bit."""
    for how in ("graph", "eager"):
        two_processes(worker, free_port(), str(data), str(tmp_path / how), extra, how == "graph")
    ours, theirs = (runs.load(tmp_path / how / "checkpoint-2.pth")["model"] for how in ("graph", "eager"))
    for name, parameter in ours.items():
        tolerance = {"rtol": 0, "atol": 2e-4} if extra else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(parameter, theirs[name], **tolerance, msg=name)
