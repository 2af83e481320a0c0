"""A run's checkpoint: the original's format, its files, and every kind of file that a run goes on from."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.folder import save_checkpoint
from mimir_fast.checkpoints.reader import read
from mimir_fast.checkpoints.run_state import Position, checkpoint_state, find_state, restore
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.training.optimizer import Updater, build_optimizer
from tests.oracles.textbook import TextbookMAE
from tests.support.golden import golden_images, small_model

CPU = torch.device("cpu")


def trained(fp16: bool = False):
    model = small_model()
    updater = Updater(build_optimizer(model, 1e-3, 0.05), CPU, fp16)
    for _ in range(2):
        updater.backward(model(golden_images()[0])[0], 1)
        updater.update()
    return model, updater


def state_of(model, updater, position=None) -> dict:
    config = PretrainConfig().updated({"eps": 8.0, "alpha": 10.0, "output_dir": "runs/x"})
    return checkpoint_state(
        model.state_dict(),
        updater.optimizer.state_dict(),
        updater,
        position or Position(epoch=3),
        config.flat(),
        3e-4,
        "cifar10s",
        {"skipped_penalties": 1, "geometry": [1, 8, 1, 10, 0]},
    )


def test_format_is_the_originals(tmp_path):
    model, updater = trained()
    path = tmp_path / "checkpoint-2.pth"
    save_checkpoint(path, state_of(model, updater))
    state = torch.load(path, weights_only=False)
    assert list(state)[:5] == ["model", "optimizer", "epoch", "scaler", "args"]
    assert state["epoch"] == 2
    torch.amp.GradScaler("cpu", enabled=True).load_state_dict(state["scaler"])  # what the original does
    assert list(state["model"]) == list(model.state_dict())
    args = state["args"]
    assert type(args) is argparse.Namespace
    assert (args.eps, args.alpha, args.lr, args.dataset) == (8 / 255, 10 / 255, 3e-4, "cifar10s")
    plain = (int, float, str, bool, type(None))
    assert all(isinstance(value, plain) for value in vars(args).values())
    group = state["optimizer"]["param_groups"][0]
    assert {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "amsgrad",
        "maximize",
        "foreach",
        "capturable",
        "fused",
        "params",
    } <= set(group)
    first = state["optimizer"]["state"][0]
    assert list(first) == ["step", "exp_avg", "exp_avg_sq"]
    assert (first["step"].dtype, first["step"].item()) == (torch.float32, 2)
    assert list(vars(args)) == list(PretrainConfig().flat())


def test_loads_into_another_implementation_and_back(tmp_path):
    """What the original does on resume: unpickle, strict load, optimizer, scaler, epoch + 1."""
    model, updater = trained()
    path = tmp_path / "checkpoint-2.pth"
    save_checkpoint(path, state_of(model, updater))
    state = torch.load(path, map_location="cpu", weights_only=False)
    plain = TextbookMAE(32, 4, 48, 2, 3, 32, 1, 4, norm_pix_loss=True)
    plain.load_state_dict(state["model"], strict=True)
    images, noise = golden_images()[1], torch.rand(8, 64)
    assert abs(plain(images, noise=noise)[0] - model(images, noise=noise)[0]) < 1e-6
    groups = [[], []]
    for name, p in plain.named_parameters():
        if p.requires_grad:
            groups[0 if p.ndim <= 1 or name.endswith(".bias") else 1].append(p)
    optimizer = torch.optim.AdamW([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=1e-3)
    optimizer.load_state_dict(state["optimizer"])
    torch.amp.GradScaler("cpu", enabled=True).load_state_dict(state["scaler"])
    theirs = {"model": plain.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 7, "scaler": {}}
    theirs["args"] = argparse.Namespace(
        eps=torch.full((3, 1, 1), 0.03), alpha=0.04, lr=1e-3
    )  # normalised mode: a tensor
    torch.save(theirs, tmp_path / "original.pth")
    fresh = small_model()
    new = Updater(build_optimizer(fresh, 1e-3, 0.05), CPU, False)
    position, _ = restore(
        read(tmp_path / "original.pth", "resume").state, "original.pth", fresh, new, Position(), [], 10, print
    )
    assert (position.epoch, position.step, position.update) == (8, 0, 80)
    for mine, other in zip(fresh.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(mine, other)
    assert new.optimizer.param_groups[0]["fused"] is True
    before, after = updater.optimizer.state_dict()["state"], new.optimizer.state_dict()["state"]
    assert all(torch.equal(before[i][key], after[i][key]) for i in before for key in before[i])


def test_fp16_scaler_travels(tmp_path):
    model, updater = trained(fp16=True)
    updater.scaler.update(1234.0)
    save_checkpoint(tmp_path / "checkpoint-0.pth", state_of(model, updater))
    state = read(tmp_path / "checkpoint-0.pth", "resume").state
    assert set(state["scaler"]) == {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    fresh = Updater(build_optimizer(model, 1e-3, 0.05), CPU, True)
    restore(state, "x", model, fresh, Position(), [], 1, print)
    assert fresh.scaler.get_scale() == 1234.0


def test_changed_geometry_restarts_the_epoch():
    model, updater = trained()
    state = state_of(model, updater, Position(epoch=2, step=5, update=25))
    lines = []
    position, _ = restore(state, "x", model, updater, Position(), [2, 8, 1, 5, 0], 10, lines.append)
    assert (position.epoch, position.step) == (2, 0)
    assert "starts again" in lines[0]
    position, own = restore(state, "x", model, updater, Position(), [1, 8, 1, 10, 0], 10, lines.append)
    assert (position.epoch, position.step, position.update, own["skipped_penalties"]) == (2, 5, 25, 1)
    assert len(lines) == 1


def test_parameters_only_checkpoint_keeps_the_start():
    model, updater = trained()
    said = []
    position, _ = restore(
        {"model": model.state_dict()}, "x", model, updater, Position(epoch=4, update=40), [], 10, said.append
    )
    assert (position.epoch, position.update) == (4, 40)
    assert "parameters only" in said[0]


@pytest.mark.parametrize("kind", ["checkpoint", "wrapped", "bare", "safetensors", "folder"])
def test_resume_reads_whatever_evaluate_reads(tmp_path, kind):
    model, updater = trained()
    whole, bare = state_of(model, updater, Position(epoch=3, update=30)), model.state_dict()
    path = tmp_path / "checkpoint-2.pth"
    if kind == "safetensors":
        save_file(bare, path)
    else:
        wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in bare.items()}
        torch.save(bare if kind == "bare" else whole | {"model": wrapped} if kind == "wrapped" else whole, path)
    source, state = find_state("auto" if kind == "folder" else str(path), tmp_path, print)
    assert source == str(path)
    fresh = small_model()
    start = Position(epoch=1, update=10)
    position, _ = restore(
        state, source, fresh, Updater(build_optimizer(fresh, 1e-3, 0.05), CPU, False), start, [], 10, print
    )
    assert all(torch.equal(bare[name], tensor) for name, tensor in fresh.state_dict().items())
    assert position.epoch == (1 if kind in ("bare", "safetensors") else 3)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("mimir_fast", {"version": 2}, "does not say where its run stands"),
        ("mimir_fast", [1], "does not say where its run stands"),
        ("mimir_fast", {"counters": [0, 0, 0], "step": 1}, "does not say where its run stands"),
        ("optimizer", {"state": {}}, "the optimizer state of x does not fit"),
        ("optimizer", {"param_groups": [3, 4], "state": {}}, "the optimizer state of x does not fit"),
        ("optimizer", "sgd", "the optimizer state of x does not fit"),
    ],
)
def test_entries_of_another_program_are_an_error_of_ours(entry, value, message):
    model, updater = trained()
    state = state_of(model, updater, Position(epoch=2)) | {entry: value}
    with pytest.raises(CheckpointError, match=rf"^resume: .*{message}"):
        restore(state, "x", model, updater, Position(), [1, 8, 1, 10, 0], 10, print)
