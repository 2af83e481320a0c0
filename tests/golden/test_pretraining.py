"""Numbers recorded from the original code: forwards, gradients, attacks, penalties, whole training trajectories."""

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters

from mimir_fast.attacks.pgd_mae import frozen_twin, linf_bounds, pgd_mae
from mimir_fast.config.sections import OptimConfig
from mimir_fast.models import families
from mimir_fast.models.families.vit import VIT
from mimir_fast.objectives.information import bandwidth, nhsic, renyi_mi
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.optimizer import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    scheduled_rate,
    set_learning_rate,
)
from mimir_fast.training.pretrain_step import MaeAttack, MaeNoise, draw_noise, pretrain_step
from tests.support.golden import golden_images, load_golden, relative_error, small_model
from tests.support.interpreter import Sanitizer, interpret
from tests.support.tasks import mae_task

FORWARDS = ("forward_normpix_r75", "forward_normpix_r50", "forward_pix_r75", "forward_pix_r50")
ATTACKS = (
    "attack_unit_1step",
    "attack_unit_1step_nonormpix",
    "attack_unit_3step",
    "attack_norm_1step",
    "attack_norm_3step",
)


def test_state_dict_keys_order_and_frozen_tables():
    state, record = load_golden("mae_state")
    model = small_model()
    assert list(model.state_dict()) == record["key_order"]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == record["frozen"]
    fresh = type(model)(img_size=32, patch_size=4, embed_dim=48, num_heads=3, decoder_embed_dim=32).state_dict()
    for table in record["frozen"]:  # computed, not loaded
        assert torch.equal(fresh[table], state[table])


# the interpreter takes seconds for each recorded step
@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.slow)])
def kernels(request):
    """Both implementations of the operations; the Triton kernels run in the interpreter."""
    with interpret() if request.param == "triton" else nullcontext():
        yield request.param


@pytest.mark.parametrize("name", FORWARDS)
def test_forward(name, kernels):
    tensors, record = load_golden(name)
    model = small_model(record["norm_pix_loss"], kernels=kernels)
    loss, pred, mask, latent = model(golden_images()[0], record["mask_ratio"], noise=tensors["mask_noise"])
    assert abs(loss.item() - record["loss"]) < 1e-6
    assert (pred - tensors["pred"]).abs().max() < 5e-6
    assert (latent - tensors["latent"]).abs().max() < 5e-6
    assert torch.equal(mask, tensors["mask"].float())


def test_mask_indices():
    from mimir_fast.kernels import mask_indices

    for name in FORWARDS:
        tensors, record = load_golden(name)
        ids_shuffle, ids_restore = mask_indices(tensors["mask_noise"])
        assert torch.equal(ids_shuffle[:, : record["keep"]], tensors["ids_keep"].long())
        assert torch.equal(ids_restore, tensors["ids_restore"].long())


@pytest.mark.parametrize("name", ["forward_normpix_r75", "forward_pix_r75"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.float64, 2e-7)])
def test_every_parameter_gradient(name, dtype, bound):
    tensors, record = load_golden(name)
    truth = load_golden(f"{name}_grads64")[0]  # float64 gradients, stored as fp32
    model = small_model(record["norm_pix_loss"], dtype)
    model(golden_images()[0].to(dtype), noise=tensors["mask_noise"].to(dtype))[0].backward()
    scale = max(t.abs().max() for t in truth.values())
    trainable = {f"grad/{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == truth.keys()
    for key, grad in trainable.items():
        assert (grad - truth[key]).abs().max() < bound * max(truth[key].abs().max(), 1e-2 * scale), key


@pytest.mark.parametrize(
    ("name", "kernels"),
    [*product(ATTACKS, ["reference"]), *(pytest.param(a, "triton", marks=pytest.mark.slow) for a in ATTACKS)],
    indirect=["kernels"],
)
def test_attack(name, kernels):
    assert_recorded_attack(name, attacked(name, kernels))


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_on_whole_images(name, monkeypatch):
    """The way of families whose encoder is given whole images leads to the same adversarial images."""
    by_patches = attacked(name)
    monkeypatch.setattr(families, "FAMILIES", (replace(VIT, masking="images"),))
    adv = attacked(name)
    assert_recorded_attack(name, adv)
    assert (adv - by_patches).abs().gt(1e-6).sum() <= 4


def attacked(name: str, kernels: str = "reference") -> torch.Tensor:
    """The attack of a recording, on the recorded model and images, with the recorded draws: of two images if interpreted."""
    tensors, r = load_golden(name)
    tensors = {key: tensor[: 2 if kernels == "triton" else None] for key, tensor in tensors.items()}
    images = golden_images()[0][: len(tensors["start_noise"])]
    eps, alpha, lo, hi = r["eps_255"] / 255, r["alpha_255"] / 255, 0.0, 1.0
    if r["normalised"]:
        mean, std = (torch.tensor(r[k]).view(3, 1, 1) for k in ("mean", "std"))
        images, lo, hi = (images - mean) / std, (0 - mean) / std, (1 - mean) / std
        eps, alpha = (torch.tensor(r[f"{k}_per_channel"]).view(3, 1, 1) for k in ("eps", "alpha"))
    return pgd_mae(
        small_model(r["norm_pix_loss"], kernels=kernels),
        images,
        eps,
        alpha,
        r["steps"],
        lo,
        hi,
        start_noise=tensors["start_noise"],
        mask_noise=[tensors[f"step{i}_mask_noise"] for i in range(r["steps"])],
    )


def assert_recorded_attack(name: str, adv: torch.Tensor) -> None:
    """Equal but for pixels whose gradient is rounding noise."""
    assert ((adv - load_golden(name)[0]["adv"][: len(adv)]).abs() > 1e-6).sum() <= 4


@pytest.mark.parametrize("name", ["hsic_gauss", "hsic_latent_like", "hsic_linear_y", "hsic_offset"])
@pytest.mark.parametrize(
    ("dtype", "value_bound", "grad_bound"), [(torch.float32, 1e-6, 3e-5), (torch.float64, 1e-11, 1e-6)]
)
def test_nhsic_against_float64_truth(name, dtype, value_bound, grad_bound):
    tensors, record = load_golden(name)
    x, y = (tensors[k].to(dtype).detach().clone().requires_grad_() for k in ("x", "y"))
    value = nhsic(x, y, sigma=record["sigma"], kernel_y=record["k_type_y"])
    value.backward()
    assert abs(value.item() - tensors["value64"].item()) < value_bound * tensors["value64"].item()
    assert relative_error(x.grad, tensors["grad_x64"]) < grad_bound
    assert relative_error(y.grad, tensors["grad_y64"]) < grad_bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-10)])
def test_renyi(dtype, bound):
    tensors, record = load_golden("dib_mi")
    x, z = tensors["x"].to(dtype), tensors["z"].to(dtype).detach().clone().requires_grad_()
    value = renyi_mi(x, z, alpha=record["alpha"])
    value.backward()
    assert value.item() == pytest.approx(tensors["mi64"].item(), rel=bound)
    assert bandwidth(x).item() == pytest.approx(tensors["sigma_x64"].item(), rel=bound)
    assert relative_error(z.grad, tensors["grad_z64"]) < bound


def test_learning_rate():
    for row in load_golden("lr_schedule")[1]["rows"]:
        args = (row["epoch"], row["base_lr"], row["min_lr"], row["warmup_epochs"], row["epochs"])
        assert learning_rate(*args) == pytest.approx(row["lr"], rel=1e-12, abs=1e-18)
        optimizer = torch.optim.SGD(
            [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr_scale": 0.65}], lr=9
        )
        set_learning_rate(optimizer, learning_rate(*args))
        expected = [row["group_lr_no_scale"], row["group_lr_scale_0p65"]]
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_learning_rate_of_ares():
    """Every update of a run of 6 epochs of 4: the cosine begins in epoch 0, the warm-up above 0."""
    record = load_golden("ares_schedule")[1]
    call = record["call"]
    o = OptimConfig(min_lr=call["min_lr"], warmup_epochs=call["warmup_epochs"], epochs=call["num_epochs"])
    o = replace(o, lr_at_start=call["warmup_lr"], cosine_from="start")
    per_epoch, expected = call["updates_per_epoch"], record["lr_of_update"]
    rates = [scheduled_rate(update / per_epoch, record["base_lr"], o) for update in range(len(expected))]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_parameter_groups():
    record = load_golden("pretrain_param_groups")[1]
    model = small_model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = [
        {"weight_decay": g["weight_decay"], "params": [names[id(p)] for p in g["params"]]}
        for g in parameter_groups(model, 0.05)
    ]
    assert groups == record["groups"]
    optimizer = build_optimizer(model, 1e-3, 0.05)
    assert [list(optimizer.defaults["betas"]), optimizer.defaults["eps"]] == [record["betas"], record["eps"]]


def replay(name: str, model, compile: bool):
    """Train the model on a recorded trajectory; yields (micro-step, updated, x, output, lr, gradients) of each micro-step."""
    tensors, r = load_golden(f"traj_{name}_noise")
    images, eps, alpha, lo, hi = golden_images(), r["eps"] / 255, r["alpha"] / 255, 0.0, 1.0
    if r["normalised"]:
        record = load_golden("attack_norm_1step")[1]
        mean, std = (torch.tensor(record[k]).view(3, 1, 1) for k in ("mean", "std"))
        images, eps, alpha, lo, hi = (images - mean) / std, eps / std, alpha / std, (0 - mean) / std, (1 - mean) / std
    attack = MaeAttack(r["steps"], linf_bounds(eps, alpha, lo, hi, 3, "cpu"))
    names = {"mask_ratio": "mask_ratio", "mi_train": "mi_train", "mi_xpl": "mi_xpl", "lr": "lr", "accum": "accum_iter"}
    flags = {flag: r[name] for name, flag in names.items()}
    engine = Engine(mae_task(model, attack, compile=compile, weight_decay=r["weight_decay"], **flags), World())
    for step in range(4):
        where = r["start_epoch"] + step / 4
        if step % r["accum"] == 0:
            lr = learning_rate(where, r["lr"], r["min_lr"], r["warm"], r["epochs"])
            set_learning_rate(engine.updater.optimizer, lr)
        noise = MaeNoise(
            tensors["start_noise"][step], list(tensors["attack_mask_noise"][step]), tensors["train_mask_noise"][step]
        )
        updates = (step + 1) % r["accum"] == 0
        out = engine.forward_backward(images[step], noise, updates)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        if updates:
            engine.update()
        yield step, updates, int(1000 * where), out, lr, grads


TRAJECTORIES = pytest.mark.parametrize(("name", "grad_bound", "mi_bound"), [("A", 5e-6, 1e-5), ("B", 2e-3, 1e-4)])


@TRAJECTORIES
def test_trajectory(name, grad_bound, mi_bound, kernels):
    follow(name, grad_bound, mi_bound, kernels, first_only=kernels == "triton" and name == "B")  # B takes minutes


@pytest.mark.slow
@TRAJECTORIES
def test_compiled_trajectory(name, grad_bound, mi_bound):
    torch._dynamo.reset()
    counters.clear()
    attention = {"A": "narrow", "B": "auto"}[name]  # A as the trainer chooses with --compile on a CPU
    follow(name, grad_bound, mi_bound, "reference", compile=True, attention=attention)
    assert counters["stats"]["unique_graphs"] == 5  # encoder, decoder with its loss; the attack's loss, start and step


def follow(
    name: str,
    grad_bound: float,
    mi_bound: float,
    kernels: str,
    compile: bool = False,
    first_only: bool = False,
    attention: str = "auto",
) -> None:
    """Train on a recorded trajectory and compare everything that was recorded, or up to the first update only."""
    record = load_golden(f"traj_{name}_noise")[1]
    logged, losses, lrs, first_grads = [], [], [], None
    model = small_model(record["norm_pix_loss"], kernels=kernels, attention=attention)
    for step, updates, x, out, lr, grads in replay(name, model, compile):
        losses.append(out.loss.item())
        lrs.append(lr)
        if step == 0:
            assert ((out.adv - load_golden(f"traj_{name}_adv")[0]["adv_first"]).abs() > 1e-6).sum() <= 4
        if updates:
            first_grads = first_grads or grads
            logged += [["train_loss", out.loss.item(), x], ["lr", lr, x], ["mi", out.mi.item(), x]]
            if first_only:
                break
    expected = record["log_records"][:3] if first_only else record["log_records"]
    for (tag, value, x), (tag0, value0, x0) in zip(logged, expected, strict=True):
        assert (tag, x) == (tag0, x0)
        assert value == pytest.approx(value0, rel=mi_bound if tag == "mi" else 5e-6), (tag, x)
    truth = load_golden(f"traj_{name}_grad1")[0]
    largest = max(t.abs().max() for t in truth.values())
    for key, grad in first_grads.items():
        assert (grad - truth[f"grad/{key}"]).abs().max() < grad_bound * largest, key
    if first_only:
        return
    assert sum(losses) / 4 == pytest.approx(record["epoch_stats"]["loss"], rel=5e-6)
    assert sum(lrs) / 4 == pytest.approx(record["epoch_stats"]["lr"], rel=1e-9)
    final = load_golden(f"traj_{name}_final")[0]
    trained = [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
    errors = torch.cat([(p - final[f"param/{n}"]).abs().flatten() for n, p in trained])
    assert errors.quantile(0.98) < 0.02 * record["lr"]  # Adam turns rounding noise into whole steps on a few entries


@pytest.mark.slow
def test_a_step_runs_every_kernel():
    model, images = small_model(kernels="triton"), golden_images()[0, :2]
    attack = MaeAttack(1, linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu"))
    noise = draw_noise(torch.Generator().manual_seed(0), 2, model.num_patches, attack)
    with interpret(Sanitizer()) as s:
        objective = ReconstructionObjective(model, 0.75, "hsic", 1e-5)
        pretrain_step(objective, frozen_twin(model), images, noise, attack).loss.backward()
    assert not s.errors
    expected = {name: 2 for name in ("mask_indices", "gather", "restore", "patch_error", "grad_pred")}
    expected |= {
        "linf_start": 1,
        "linf_patch_step": 1,
        "mean": 2,
        "shift": 2,
        "gram": 2,
        "gaussian": 2,
        "double_center": 2,
        "value": 1,
        "weights": 1,
        "matmul": 3,
        "mask_token_grad": 1,
        "attend": 6,  # two encoder blocks and one of the decoder, in the attack and in training
        "attend_grad": 4,
        "attend_long_grad": 2,  # the decoder's
    }
    assert {name: s.launches[f"_{name}_kernel"] for name in expected} == expected


def test_penalty_gradient_of_a_step_against_float64():
    truth, _ = load_golden("traj_A_truth_hsic_grad1")
    tensors, r = load_golden("traj_A_noise")
    model = small_model()
    adv = load_golden("traj_A_adv")[0]["adv_first"]
    latent = model(golden_images()[0], r["mask_ratio"], adv, tensors["train_mask_noise"][0])[3]
    nhsic(latent.flatten(1), adv.flatten(1)).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {f"grad/{n}" for n in grads} == truth.keys()
    largest = max(t.abs().max() for t in truth.values())
    for name, grad in grads.items():
        assert (grad - truth[f"grad/{name}"]).abs().max() < 1e-4 * largest, name
