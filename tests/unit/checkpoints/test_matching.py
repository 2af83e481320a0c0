"""What does not match between a file and a model, and what is said about it."""

import pytest
import torch

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.matching import compare, load_all, load_model_state, load_optimizer_state
from mimir_fast.models import MaskedAutoencoderViT, create_classifier, create_model
from mimir_fast.training.optimizer import build_optimizer
from tests.support.golden import SMALL, small_model
from tests.unit.checkpoints.test_run_state import trained


def test_another_model_is_named():
    with torch.device("meta"):
        state = {"model": create_model("mae_vit_ti", img_size=32, patch_size=4).state_dict()}
    with pytest.raises(CheckpointError, match=r"other shapes.*--model") as error:
        load_model_state(small_model(), state, "ti.pth")
    assert "132 unexpected parameters (e.g. blocks.2.norm1.weight; " in str(error.value)
    assert "\n" not in str(error.value)
    heads = [create_classifier("vit_ti", img_size=8, patch_size=4, num_classes=n) for n in (2, 3)]
    with pytest.raises(CheckpointError, match=r"2 other shapes.*the classes of its head"):
        load_model_state(heads[0], {"model": heads[1].state_dict()}, "three.pth")
    with pytest.raises(CheckpointError, match="--finetune"):
        load_model_state(heads[0], state, "ti.pth")


def test_optimizer_of_another_model_is_named():
    _, updater = trained()
    state = updater.optimizer.state_dict()
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    with pytest.raises(CheckpointError, match="optimizer state"):
        load_optimizer_state(updater.optimizer, state, "x.pth")


def test_step_counters_of_an_unfused_optimizer_land_beside_the_parameters():
    """The original's optimizer is not fused: its counters stay on the CPU; ours needs them on the device (meta stands in)."""
    model, updater = trained()
    state = updater.optimizer.state_dict()
    for group in state["param_groups"]:
        group["fused"] = None
        del group["decoupled_weight_decay"]
    with torch.device("meta"):
        elsewhere = MaskedAutoencoderViT(**SMALL)
    optimizer = build_optimizer(elsewhere, 1e-3, 0.05)
    load_optimizer_state(optimizer, state, "theirs.pth")
    devices = {value.device.type for entry in optimizer.state.values() for value in entry.values()}
    assert devices == {"meta"}
    assert all(group["fused"] and group["decoupled_weight_decay"] for group in optimizer.param_groups)
    assert model is not elsewhere


def test_every_kind_of_difference_is_told_with_examples():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    given = {"0.weight": torch.zeros(3, 2), "0.bias": torch.zeros(4), "extra": torch.zeros(1)}
    match = compare(model, given)
    assert list(match.tensors) == ["0.weight"]
    assert (match.missing, match.unexpected) == (["1.weight", "1.bias"], ["extra"])
    assert match.misshapen == {"0.bias": ((4,), (3,))}
    assert match.report() == (
        "2 missing parameters (e.g. 1.weight; 1.bias), 1 unexpected parameter (e.g. extra), "
        "1 other shape (e.g. 0.bias of shape (4,), expected (3,))"
    )
    same = compare(model, model.state_dict())
    assert not same.differs
    assert list(same.tensors) == list(model.state_dict())


@pytest.mark.parametrize("wrong", [{"extra": torch.ones(1)}, {"0.bias": torch.ones(4)}])
def test_a_model_is_loaded_whole_or_not_at_all(wrong):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {name: tensor + 1 for name, tensor in before.items()}
    with pytest.raises(CheckpointError, match=r"^x.pth is another: 1 .*; look there$"):
        load_all(model, given | wrong, "x.pth is another", lambda match: "; look there")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    load_all(model, given, "x.pth is another")
    assert all(torch.equal(given[name], tensor) for name, tensor in model.state_dict().items())


def test_an_average_of_another_model_is_named():
    model = torch.nn.Linear(2, 3)
    state = {"model": model.state_dict(), "model_ema": torch.nn.Linear(2, 4).state_dict()}
    with pytest.raises(CheckpointError, match=r"^resume: the average in x.pth is of another model: 2 other shapes"):
        load_model_state(model, state, "x.pth")
