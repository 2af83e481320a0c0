"""Layer decay, its optimizer, and the running average."""

import pytest
import torch

from mimir_fast.models import VisionTransformer
from mimir_fast.training.layer_decay import build_optimizer, parameter_groups
from mimir_fast.training.optimizer import set_learning_rate
from mimir_fast.training.parameter_ema import ParameterEMA
from tests.golden.test_classifier import SIZES


def test_every_parameter_is_in_one_group():
    model = VisionTransformer(**SIZES, global_pool=False)
    groups = parameter_groups(model, 0.05, 0.5)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == scales[id(model.norm.bias)] == 1
    assert scales[id(model.blocks[1].attn.qkv.weight)] == 0.5
    assert scales[id(model.pos_embed)] == scales[id(model.patch_embed.proj.weight)] == 0.125
    assert {group["lr_scale"] for group in parameter_groups(model, 0.05, 1.0)} == {1.0}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(model.pos_embed)] == decays[id(model.cls_token)] == decays[id(model.norm.bias)] == 0
    groups = parameter_groups(model, 0.05, 1.0, decay_tables=True)
    plain = [p for group in groups if not group["weight_decay"] for p in group["params"]]
    assert all(p.ndim == 1 for p in plain)
    assert len(plain) == sum(p.ndim == 1 for p in model.parameters())
    with pytest.raises(ValueError, match=r"layer_decay.*got 0"):
        parameter_groups(model, 0.05, 0.0)


def test_the_optimizer_moves_layers_by_their_share():
    model = VisionTransformer(**SIZES)
    optimizer = build_optimizer(model, 1.0, 0.0, 0.5)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert optimizer.defaults["fused"]
    set_learning_rate(optimizer, 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, share in (("head.bias", 1.0), ("blocks.1.norm1.weight", 0.5), ("blocks.0.mlp.fc1.bias", 0.25)):
        moved = before[name] - dict(model.named_parameters())[name]
        assert torch.allclose(moved, torch.full_like(moved, 1e-3 * share), rtol=1e-2), name


def averaged(first: int) -> list[float]:
    """Three averages of a parameter that was 1 and grows by 1, from update number `first` on."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = ParameterEMA(model, 0.9)
    values = []
    for number in range(first, first + 3):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update(number)
        values.append(average.module.weight.item())
    return values


def test_running_average():
    assert averaged(100) == pytest.approx([1.1, 1.29, 1.561])
    begun = 2 / 11 * 1 + 9 / 11 * 2
    assert averaged(1)[:2] == pytest.approx([begun, 3 / 12 * begun + 9 / 12 * 3])


def test_a_running_average_goes_on_where_it_stood():
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, mean=(0.5,) * 3, std=(0.5,) * 3)
    average = ParameterEMA(model, 0.99)
    assert list(average.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in average.module.parameters())
    assert not average.module.training
    other = None
    for number in range(1, 5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        if number == 3:
            other = ParameterEMA(model, 0.99)
            other.load_state_dict({key: value.clone() for key, value in average.state_dict().items()})
        for each in (average, other):
            if each:
                each.update(number)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in average.state_dict().items())
    assert not torch.equal(average.module.head.weight, model.head.weight)
    with pytest.raises(ValueError, match=r"model_ema_decay.*got 1.0"):
        ParameterEMA(model, 1.0)
