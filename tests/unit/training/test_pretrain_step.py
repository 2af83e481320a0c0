"""The step and the update: the penalty's guard, non-finite losses, fp16 scaling, accumulation, replay."""

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from mimir_fast.attacks.pgd_mae import (
    MaeAttackFunctions,
    ascend_reconstruction,
    frozen_twin,
    linf_bounds,
    reconstruction,
    starting_point,
)
from mimir_fast.kernels._shared.bytes import as_floats
from mimir_fast.objectives import reconstruction as objective_module
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.pretrain_step import MaeAttack, MaeNoise, draw_noise, pretrain_step
from mimir_fast.training.seeds import step_seed
from tests.oracles.textbook import textbook_step
from tests.support.golden import BOUNDS, golden_images, small_model

ATTACK = MaeAttack(1, BOUNDS)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
CPU = torch.device("cpu")


def noise_of(seed: int, attack: MaeAttack = ATTACK, batch: int = 8):
    return draw_noise(torch.Generator().manual_seed(seed), batch, 64, attack)


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def run_step(model, images, penalty="hsic", weight=1e-3, attack=ATTACK, seed=1):
    noise = noise_of(seed, attack, len(images))
    out = pretrain_step(ReconstructionObjective(model, 0.75, penalty, weight), model, images, noise, attack)
    model.zero_grad()
    out.loss.backward()
    return out


@pytest.mark.parametrize("penalty", ["hsic", "dib_mi", "renyi2"])
def test_penalty_adds_its_value_and_gradient(penalty):
    model, images = small_model(), golden_images()[0]
    with torch.no_grad():
        model.norm.weight *= 0.1  # the Rényi kernels are the identity between latents far apart
    plain = run_step(model, images, None)
    base = gradients(model)
    once = run_step(model, images, penalty, 1e-3)
    first = gradients(model)
    twice = run_step(model, images, penalty, 2e-3)
    second = gradients(model)
    assert once.loss.item() == pytest.approx(plain.loss.item() + 1e-3 * once.mi.item(), rel=1e-6)
    assert twice.recon.item() == plain.loss.item()
    key = "blocks.0.mlp.fc1.weight"
    assert (first[key] - base[key]).norm() > 0  # the original's dib_mi has no gradient
    change = (second[key] - base[key]).norm() / (first[key] - base[key]).norm()
    assert change.item() == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
def test_unusable_penalty_is_left_out(monkeypatch, bad):
    model, images = small_model(), golden_images()[0]
    run_step(model, images, None)
    clean = gradients(model)
    monkeypatch.setattr(objective_module, "penalty_value", lambda kind, latent, *_: latent.sum() * 0 + bad)
    out = run_step(model, images)
    assert not out.penalty_used
    assert out.loss.item() == out.recon.item()
    assert all(torch.equal(clean[name], grad) for name, grad in gradients(model).items())


def test_penalty_with_a_bad_gradient_is_left_out(monkeypatch):
    monkeypatch.setattr(
        objective_module, "penalty_value", lambda kind, latent, *_: (latent - latent.detach()).sum().sqrt() + 1
    )
    model = small_model()
    out = run_step(model, golden_images()[0])
    assert out.mi.item() == 1
    assert not out.penalty_used
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_plain_attack_is_a_clean_autoencoder_without_penalty():
    model, images = small_model(), golden_images()[0]
    noise = noise_of(1, MaeAttack())
    out = pretrain_step(ReconstructionObjective(model, 0.75, "hsic", 1.0), model, images, noise, MaeAttack())
    assert out.loss.item() == model(images, noise=noise.train_mask)[0].item()
    assert torch.equal(out.adv, images)
    assert out.penalty_used


@pytest.mark.parametrize("penalty", ["hsic", "renyi2"])
@pytest.mark.parametrize("attack", [ATTACK, MaeAttack()], ids=["attacked", "plain"])
def test_images_in_bytes_give_what_their_floats_give(penalty, attack):
    model, images = small_model(), torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    in_bytes, first = run_step(model, images, penalty, attack=attack), gradients(model)
    in_floats = run_step(model, as_floats(images), penalty, attack=attack)
    assert [torch.equal(a, b) for a, b in zip(in_bytes[:4], in_floats)] == 4 * [True]
    assert torch.equal(as_floats(in_bytes.adv), in_floats.adv)
    assert all(torch.equal(first[name], grad) for name, grad in gradients(model).items())


def test_noise_is_a_function_of_the_position():
    seeds = {step_seed(s, r, e, t) for s in range(3) for r in range(3) for e in range(3) for t in range(3)}
    assert len(seeds) == 81
    assert step_seed(0, 1, 2, 3) == step_seed(0, 1, 2, 3)
    first, again, other = noise_of(5), noise_of(5), noise_of(6)
    assert first.start == again.start != other.start
    assert torch.equal(first.attack_masks[0], again.attack_masks[0])
    assert not torch.equal(first.train_mask, other.train_mask)
    assert not torch.equal(first.train_mask, first.attack_masks[0])
    images, eps = torch.full((8, 3, 32, 32), 0.5), torch.tensor([0.1, 0.2, 0.3])
    moved = starting_point(images, linf_bounds(eps, 0.0, 0.0, 1.0, 3, "cpu"), first.start) - images
    assert torch.allclose(moved.abs().amax((0, 2, 3)), eps, rtol=0.01)


def updater_of(model, fp16=False):
    return Updater(build_optimizer(model, 1e-3, 0.05), CPU, fp16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_loss_skips_the_update(bad):
    model = small_model()
    updater = updater_of(model)
    images = golden_images()[0]
    updater.backward(model(images)[0], 1)
    updater.update()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(updater.optimizer.state_dict()["state"])
    for _ in range(2):
        updater.backward(model(images)[0] * bad, 1)
        updater.update()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = updater.optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in ("step", "exp_avg", "exp_avg_sq"))
    assert updater.counters.tolist() == [2, 2, 2]
    updater.backward(model(images)[0], 1)
    assert updater.update().isfinite()
    assert updater.counters.tolist() == [2, 0, 2]
    assert not torch.equal(before["norm.weight"], model.norm.weight)


def test_infinite_value_with_finite_gradients_is_caught_too():
    model = small_model()
    updater = updater_of(model)
    before = copy.deepcopy(model.state_dict())
    updater.backward(model(golden_images()[0])[0] + torch.inf, 1)
    assert updater.update().isnan()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_accumulation_equals_the_average_of_gradients():
    images = golden_images()
    model = small_model()
    objective, noises = ReconstructionObjective(model, 0.75, "hsic", 1e-3), [noise_of(i) for i in range(2)]
    expected = []
    for i in range(2):
        model.zero_grad()
        pretrain_step(objective, model, images[i], noises[i], ATTACK).loss.backward()
        expected.append(gradients(model))
    model.zero_grad()
    updater = updater_of(model)
    for i in range(2):
        updater.backward(pretrain_step(objective, model, images[i], noises[i], ATTACK).loss, 2)
    for name, grad in gradients(model).items():
        assert torch.allclose(grad, (expected[0][name] + expected[1][name]) / 2, atol=1e-7), name


def test_grad_norm_is_the_global_norm():
    model = small_model()
    updater = updater_of(model)
    updater.backward(model(golden_images()[0])[0], 1)
    expected = torch.cat([g.flatten() for g in gradients(model).values()]).norm()
    assert updater.update().item() == pytest.approx(expected.item(), rel=1e-5)


def test_fp16_scales_the_loss_and_backs_off():
    model = small_model()
    updater = updater_of(model, fp16=True)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(golden_images()[0])[0]
    updater.backward(loss, 1)
    scaled = gradients(model)["norm.weight"]
    assert updater.scaler.get_scale() == 65536
    reference = small_model()
    reference(golden_images()[0])  # same draw count
    norm = updater.update()
    assert scaled.norm() > 100 * norm  # the logged norm is the unscaled one
    updater.backward(loss.detach() * model.norm.weight.sum() * torch.inf, 1)
    updater.update()
    assert updater.scaler.get_scale() == 32768
    assert updater.counters.tolist() == [1, 1, 1]
    assert updater_of(model).scaler.state_dict() == {}


def test_compiled_attack_has_the_same_result_and_no_weight_gradient():
    model, images = small_model(), golden_images()[0]
    noise = {"start": torch.tensor(3), "mask_noise": [torch.rand(8, 64)]}
    eager = ascend_reconstruction(model, images, BOUNDS, **noise)
    graphs = []

    def recording(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(reconstruction, fullgraph=True, backend=aot_autograd(fw_compiler=recording))
    twin = frozen_twin(model)
    ours = ascend_reconstruction(twin, images, BOUNDS, **noise, functions=MaeAttackFunctions(compiled))
    assert ((ours - eager).abs() > 1e-6).sum() <= 4  # pixels whose gradient is rounding noise
    products = [sum(node.target in PRODUCTS for node in graph.graph.nodes) for graph in graphs]
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules()) + 1
    assert products == [linears, linears]  # the backward pass has one product per layer, not two
    assert all(p.grad is None for p in [*model.parameters(), *twin.parameters()])


def test_frozen_twin_follows_the_model():
    model = small_model()
    twin = frozen_twin(model)
    with torch.no_grad():
        model.norm.weight += 1
    assert torch.equal(twin.norm.weight, model.norm.weight)
    assert not any(p.requires_grad for p in twin.parameters())
    assert list(twin.state_dict()) == list(model.state_dict())


def test_textbook_rival_computes_the_same_step():
    """The benchmark's baseline is honest: same loss from the same draws."""
    model = small_model()
    torch.manual_seed(5)
    theirs = textbook_step(model, golden_images()[0], 8 / 255, 10 / 255, 0.75, 1e-3)
    torch.manual_seed(5)
    start = (2 * torch.rand(8, 3, 32, 32) - 1) * 8 / 255
    noise = MaeNoise(start, [torch.rand(8, 64)], torch.rand(8, 64))
    ours = pretrain_step(
        ReconstructionObjective(model, 0.75, "hsic", 1e-3), model, golden_images()[0], noise, ATTACK
    ).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


class Stream:
    """Stands for a CUDA stream and writes down what it is told."""

    def __init__(self, name: str, told: list[str]):
        self.name, self.told = name, told

    def wait_stream(self, other) -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.told.append(f"on {self.name}")

    def __exit__(self, *_):
        self.told.append(f"off {self.name}")


def test_penalty_runs_beside_both_passes_of_the_decoder(monkeypatch):
    told: list[str] = []
    main, side = Stream("main", told), Stream("side", told)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    original = objective_module.guarded_penalty

    def penalty(*arguments):
        told.append("penalty")
        return original(*arguments)

    monkeypatch.setattr(objective_module, "guarded_penalty", penalty)
    model = small_model()

    def reconstruct(latent, *arguments):
        told.append("decoder")
        if latent.requires_grad:
            latent.register_hook(lambda grad: told.append("decoder's gradient"))
        return model.reconstruct(latent, *arguments)

    def encode(*arguments):
        told.append("encoder")
        return model.encode(*arguments)

    objective = ReconstructionObjective(model, 0.75, "hsic", 1e-3, encode, reconstruct)
    objective.side = side
    out = pretrain_step(objective, model, golden_images()[0], noise_of(1), ATTACK)
    beside = ["side waits for main", "on side", "off side"]
    # The images' part begins before the encoder, the latent's after it.
    assert told == [*beside, "encoder", *beside[:2], "penalty", *beside[2:], "decoder", *beside]
    told.clear()
    updater_of(model).backward(out.loss, 1, out.checked)
    assert told == ["decoder's gradient", "main waits for side"]
    assert out.penalty_used
    told.clear()
    with torch.no_grad():
        pretrain_step(objective, model, golden_images()[0], noise_of(1), ATTACK)
    assert told[-1] == "main waits for side"
