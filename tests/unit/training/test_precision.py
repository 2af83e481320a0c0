"""16-bit arithmetic on fp32 parameters: same gradients as casting at every use, fp32 accumulation, the perturbation kept."""

import pytest
import torch
from torch import nn

from mimir_fast.attacks.pgd_mae import frozen_twin
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.precision import ComputeCopy
from mimir_fast.training.pretrain_step import MaeAttack, draw_noise, pretrain_step
from tests.support.golden import BOUNDS, golden_images, small_model

CPU = torch.device("cpu")


def loss_of(model, noise):
    with torch.autocast("cpu", torch.bfloat16):
        return model(golden_images()[0, :4], noise=noise)[0]


def test_gradients_are_those_of_casting_at_every_use():
    model, noise = small_model(), torch.rand(4, 64)
    loss_of(model, noise).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model = small_model()
    compute = ComputeCopy(model, torch.bfloat16)
    loss_of(compute.module, noise).backward()
    compute.take_gradients()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.dtype == torch.float32
            assert torch.equal(p.grad, expected[name]), name
    assert all(c.grad is None for c in compute.copies)


def test_only_linear_layers_are_copied():
    model = small_model()
    copy = dict(ComputeCopy(model, torch.bfloat16).module.named_parameters())
    linear = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, nn.Linear) for k in ("weight", "bias")}
    assert {n for n, p in copy.items() if p.dtype == torch.bfloat16} == linear
    for name, p in model.named_parameters():
        assert (copy[name] is p) == (name not in linear)
    assert list(copy) == [n for n, _ in model.named_parameters()]


def test_micro_steps_add_up_in_fp32():
    layer = nn.Linear(1, 1, bias=False)
    compute = ComputeCopy(nn.Sequential(layer), torch.bfloat16)
    updater = Updater(torch.optim.AdamW(layer.parameters(), fused=True), CPU, False, compute)
    for value in (1.0, 2**-9, 2**-9):  # in bf16 the small ones would vanish
        updater.backward(compute.module(torch.full((1, 1), value).bfloat16()).sum().float(), 1)
    assert layer.weight.grad.item() == 1 + 2**-8


def test_updates_reach_the_copies_and_the_attacks_twin():
    model = small_model()
    compute = ComputeCopy(model, torch.bfloat16)
    twin = frozen_twin(compute.module)
    updater = Updater(build_optimizer(model, 1e-2, 0.05), CPU, False, compute)
    before = model.decoder_pred.weight.clone()
    attack = MaeAttack(1, BOUNDS)
    noise = draw_noise(torch.Generator().manual_seed(0), 4, 64, attack)
    with torch.autocast("cpu", torch.bfloat16):
        out = pretrain_step(
            ReconstructionObjective(compute.module, 0.75, "hsic", 1e-5), twin, golden_images()[0, :4], noise, attack
        )
    updater.backward(out.loss, 1)
    assert updater.update().isfinite()
    assert not torch.equal(before, model.decoder_pred.weight)
    for copy in (compute.module, twin):
        assert torch.equal(copy.decoder_pred.weight, model.decoder_pred.weight.bfloat16())
        assert torch.equal(copy.norm.weight, model.norm.weight)
    updater.backward(out.loss.detach() * torch.nan * compute.module.decoder_pred.weight.sum(), 1)
    updater.update()
    assert updater.counters.tolist() == [1, 1, 1]
    assert compute.module.decoder_pred.weight.isfinite().all()


def tf32(x: torch.Tensor) -> torch.Tensor:
    """fp32 with 10 bits of mantissa, the rest cut off, the worst that a GPU does to an operand."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("kind", ["module under autocast", "tf32", "bf16"])
def test_patch_embedding_keeps_the_perturbation(kind):
    embed = small_model().patch_embed
    clean = golden_images()[0].unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(8, 64, 48).contiguous()
    adv = (clean + 8 / 255 * (torch.rand_like(clean) - 0.5).sign()).clamp(0, 1)
    weight = embed.proj.weight.detach().flatten(1)
    truth = (adv.double() - clean.double()) @ weight.double().T

    def embedded(x):
        if kind == "module under autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return embed(x).detach()
        rounded = tf32 if kind == "tf32" else torch.Tensor.bfloat16
        return rounded(x).float() @ rounded(weight).float().T

    error = ((embedded(adv) - embedded(clean)).double() - truth).norm() / truth.norm()
    assert error > 0.01 if kind == "bf16" else error < 0.01


def test_residual_dtype():
    seen = set()
    model = small_model()
    model.residual_dtype = torch.bfloat16
    for block in [*model.blocks, *model.decoder_blocks]:
        block.register_forward_hook(lambda _, inputs, output: seen.update((inputs[0].dtype, output[0].dtype)))
    noise = torch.rand(4, 64)
    loss = loss_of(model, noise)
    assert seen == {torch.bfloat16}
    assert loss.item() == pytest.approx(loss_of(small_model(), noise).item(), rel=5e-3)
