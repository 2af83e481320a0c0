"""The engine: position decides a micro-step, averages follow, the host does not wait; compiled it is the same step, nothing is
compiled twice, the attack trains nothing."""

from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.attacks.pgd_mae import frozen_twin, linf_bounds
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.finetune_step import (
    FP16_ATTACK_SCALE,
    ClassifierAttack,
    FinetuneOutput,
    attack_images,
)
from mimir_fast.training.pretrain_step import MaeAttack
from mimir_fast.training.validation import build_validation_attack, validate
from tests.golden.test_classifier import labels
from tests.support.golden import BOUNDS as MAE_BOUNDS
from tests.support.golden import golden_images, small_model
from tests.support.tasks import classifier_task, mae_task
from tests.support.toy_task import ToyStream, ToyTask, toy_run
from tests.support.waiting import no_waiting
from tests.unit.training.test_finetune_step import BOUNDS, classifier

STEPS = 3


def build(kind: str, backend="aot_eager", **flags) -> Engine:
    """Fine-tuning of the recorded classifier with stochastic depth; of one block where the model is compiled as one."""
    model = classifier(0.1)
    if flags.get("compile_region", "model") == "model":
        del model.blocks[0]
        model.drop_rates = model.drop_rates[1:]
    return Engine(classifier_task(model, ClassifierAttack(kind, 2, BOUNDS), **flags), World(), backend=backend)


def train(kind: str, backend="aot_eager", after=lambda: None, **flags) -> list[FinetuneOutput]:
    """Three updates of two images under an attack that grows."""
    engine = build(kind, backend, **flags)
    generator, outputs = torch.Generator().manual_seed(1), []
    for i in range(STEPS):
        batch = golden_images()[i][:2], labels()[:2]
        engine.task.attack = ClassifierAttack(kind, 2, linf_bounds((4 + i) / 255, 2 / 255, 0.0, 1.0, 3, "cpu"))
        outputs.append(engine.forward_backward(batch, engine.task.draw_noise(generator, batch)))
        engine.update()
        after()
    return outputs


class Graphs:
    """A backend for torch.compile that keeps what it is given: forward graphs and backward graphs."""

    def __init__(self):
        self.forwards, self.backwards = [], []
        self.backend = aot_autograd(fw_compiler=self._keep(self.forwards), bw_compiler=self._keep(self.backwards))

    def _keep(self, graphs):
        def compiler(graph, _):
            graphs.append(graph)
            return make_boxed_func(graph)

        return compiler


def weight_products(graph: torch.fx.GraphModule) -> list[bool]:
    """Of every matrix product of a backward graph, whether it has the shape of a weight."""
    weights = {tuple(p.shape) for p in classifier().parameters() if p.ndim == 2}
    nodes = [node for node in graph.graph.nodes if str(node.target).startswith(("aten.mm", "aten.addmm"))]
    return [tuple(node.meta["val"].shape) in weights | {shape[::-1] for shape in weights} for node in nodes]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "region"), [("apgd", "model"), ("pgd", "block"), ("trades", "model"), ("mart", "block")]
)
def test_compiled_is_the_same_step_compiles_once_and_attacks_without_weight_gradients(kind, region):
    torch._dynamo.reset()
    graphs, counts = Graphs(), []

    def note() -> None:
        counts.append(len(graphs.forwards))

    compiled = train(kind, graphs.backend, note, compile=True, compile_region=region)
    for ours, want in zip(compiled, train(kind, compile_region=region)):
        assert ours.loss.item() == pytest.approx(want.loss.item(), rel=1e-4)
        assert ((ours.adv - want.adv).abs() > 1e-5).float().mean() < 0.02
    assert counts[0] > 1
    assert counts[-1] == counts[0]  # other bounds, other images: nothing new
    attack, training = (weight_products(graphs.backwards[i]) for i in (0, -1))
    assert len(attack) == (6 if region == "model" else 4)  # the block's four, patches, head
    assert not any(attack)
    assert sum(training) >= 4


@pytest.mark.parametrize("region", ["model", "block"])
def test_validation_uses_the_compiled_attack_and_compiles_once(region):
    torch._dynamo.reset()
    graphs = Graphs()
    engine = build("pgd", graphs.backend, compile=True, compile_region=region)
    plain = frozen_twin(engine.task.model).eval()
    images = [(group[:2] * 255).round().byte() for group in golden_images()[:2]]
    stream = [*zip(images, (labels()[:2], labels()[2:4])), (images[0][:1], labels()[:1])]  # the last batch is smaller
    attack = build_validation_attack("pgd2", 8.0, torch.device("cpu"))
    whole = validate(engine.attacked, stream[:1], World(), torch.float32, attack, functions=engine.functions)
    count = len(graphs.forwards)
    options = {"functions": engine.functions, "fill": 2}
    scores = validate(engine.attacked, stream, World(), torch.float32, attack, **options)
    assert count > 1
    assert len(graphs.forwards) == count
    want = validate(plain, stream, World(), torch.float32, attack)
    assert scores == pytest.approx(want, rel=1e-4)
    assert whole == pytest.approx(validate(plain, stream[:1], World(), torch.float32, attack), rel=1e-4)


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.mm", "aten.addmm")):
            self.count += out.numel() * args[-1].shape[0]
        return out


def test_the_attack_costs_two_forward_passes_a_step():
    """Forward and input gradient; a weight gradient would be a third."""
    model, images = frozen_twin(classifier()).eval(), golden_images()[0][:2]
    with Products() as forward:
        model(images)
    assert forward.count > 0
    for steps in (0, 1, 2):
        with Products() as attack:
            attack_images(model, images, labels()[:2], torch.tensor(1), ClassifierAttack("pgd", steps, BOUNDS))
        assert attack.count == 2 * steps * forward.count


def test_16_bit_copies_follow_the_parameters():
    engine = build("pgd", precision="bf16")
    model = engine.task.model
    assert engine.attacked.head.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in engine.attacked.parameters())
    before = model.head.weight.detach().clone()
    output = engine.micro_step((255 * golden_images()[0]).byte(), labels())
    assert output.adv.dtype == torch.float32
    assert output.loss.dtype == torch.float32
    engine.update()
    assert not torch.equal(model.head.weight, before)
    assert torch.equal(engine.attacked.head.weight, model.head.weight.bfloat16())
    states = engine.states()
    assert states["model"]["head.weight"].dtype == torch.float32
    assert len(states["optimizer"]["state"]) == len(list(model.parameters()))


def test_fp16_finds_the_same_signs():
    """The sum's gradient, scaled, stays inside of fp16 at both ends."""
    model, images = frozen_twin(classifier()).eval(), golden_images()[0].clamp(0.2, 0.8)
    attack = ClassifierAttack("pgd", 1, BOUNDS)
    full = attack_images(model, images, labels(), None, attack)
    with torch.autocast("cpu", dtype=torch.float16):
        half = attack_images(model, images, labels(), None, attack._replace(loss_scale=FP16_ATTACK_SCALE))
    assert half.isfinite().all()
    assert ((half - full).abs() < 1e-6).float().mean() > 0.97


def toy_engine(**flags) -> Engine:
    torch.manual_seed(3)
    return Engine(ToyTask(toy_run(**flags), average_decay=0.5), World())


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return next(ToyStream().epoch(0, step))


def test_a_micro_step_is_a_function_of_its_position():
    engine = toy_engine()
    first, again, other = (engine.micro_step(*batch(0), epoch=1, step=step) for step in (2, 2, 3))
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, toy_engine(seed=1).micro_step(*batch(0), epoch=1, step=2).noise)
    second = Engine(engine.task, replace(engine.world, rank=1))
    assert not torch.equal(first.noise, second.micro_step(*batch(0), epoch=1, step=2).noise)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_written_as_the_task_takes_them(dtype):
    engine = toy_engine()
    engine.task.pixels = dtype
    assert engine.place((2, 3, 2, 2)).dtype == dtype


def test_gradients_of_micro_steps_are_averaged_and_an_update_clears_them():
    engine = toy_engine()
    model, singles = engine.task.model, []
    for step in (0, 1):
        prepared, noise = engine.prepare(*batch(step), 0, step)
        loss = engine.task.step(engine.objective, None, None, prepared, noise).loss
        singles.append(torch.autograd.grad(loss, model.weight)[0])
    for step in (0, 1):
        engine.micro_step(*batch(step), step=step)
    assert torch.allclose(model.weight.grad, sum(singles) / 2)
    norm = torch.cat([model.weight.grad.flatten(), model.bias.grad]).norm()
    assert engine.update() == pytest.approx(norm.item())
    assert model.weight.grad is None


def test_the_average_follows_every_update_and_is_what_is_rated_and_saved():
    engine = toy_engine(lr=0.5)
    assert engine.rated is engine.average.module
    assert not any(p.requires_grad for p in engine.rated.parameters())
    expected = engine.task.model.weight.detach().clone()
    for number in (1, 2):
        engine.micro_step(*batch(0))
        engine.update(number)
        share = min(0.5, (1 + number) / (10 + number))
        expected = share * expected + (1 - share) * engine.task.model.weight.detach()
    states = engine.states()
    assert torch.allclose(states["model_ema"]["weight"], expected)
    assert torch.equal(states["model"]["weight"], engine.task.model.weight)
    assert list(states) == ["model", "optimizer", "model_ema"]
    resumed = Engine(engine.task, World(), average=states["model_ema"])
    assert torch.allclose(resumed.rated.weight, expected)


@pytest.mark.parametrize("task", ["mae", "classifier"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_after_prepare_the_host_neither_waits_nor_decides(task, precision):
    """What a CUDA graph could hold."""
    if task == "mae":
        built = mae_task(small_model(), MaeAttack(1, MAE_BOUNDS), mi_train="hsic", precision=precision)
    else:
        built = classifier_task(
            classifier(0.1), ClassifierAttack("pgd", 2, BOUNDS), precision=precision, model_ema=True
        )
    engine, images_u8 = Engine(built, World()), (255 * golden_images()[0]).byte()
    engine.micro_step(images_u8, labels())
    engine.update()  # makes the optimizer's state
    prepared = engine.prepare(images_u8, labels(), 0, 1)
    with no_waiting():
        engine.forward_backward(*prepared)
        engine.update(2)


def test_the_first_lines_say_whose_images_the_penalty_compares():
    """Planted: the step of --penalty_batch global left to a graph; the same words whatever the flag says."""
    told = {
        (batch, size): mae_task(small_model(), MaeAttack(), World(0, size), mi_train="hsic", penalty_batch=batch)
        for batch in ("local", "global")
        for size in (1, 2)
    }
    assert told["local", 2].summary.endswith("penalty hsic of each process's own images")
    assert told["global", 2].summary.endswith("penalty hsic of all 2 processes' images together")
    assert {told[batch, 1].summary.partition("penalty ")[2] for batch in ("local", "global")} == {"hsic"}
    assert [bool(task.uncapturable) for task in told.values()] == [False, False, False, True]
