"""Shards of a classifier: the numbers of data parallelism, with an average, clipping, layer decay and validation."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.finetune_step import ClassifierAttack
from mimir_fast.training.validation import Scores, build_validation_attack, validate
from tests.golden.test_classifier import labels
from tests.runs.test_distributed import CPU, TORCHRUN, free_port
from tests.runs.test_sharding import LR, assert_close
from tests.support.finetune_runs import finetune, lines, load, make_data, same_run, start, small_models
from tests.support.golden import golden_images
from tests.support.runs import finish, two_processes
from tests.support.tasks import classifier_task
from tests.unit.training.test_finetune_step import BOUNDS, classifier

pytestmark = pytest.mark.slow

FLAGS = {"lr": LR, "accum_iter": 2, "clip_grad": 0.5, "model_ema": True, "model_ema_decay": 0.5}
SHARDS = {"parallel": "fsdp"}
RUNS = {
    "pgd ddp": {},
    "pgd fsdp": SHARDS,
    "pgd resumed": SHARDS,
    "pgd bf16": SHARDS | {"precision": "bf16"},
    "trades ddp": {"model_ema": False},
    "trades fsdp": SHARDS | {"model_ema": False},
    "plain ddp": {"model_ema": False},
    "plain fsdp": SHARDS | {"model_ema": False},
}


def build(rank: int, name: str, states: dict | None = None) -> Engine:
    """On one of two processes; states: a checkpoint's entries, to go on from."""
    world, model = World(rank, 2, rank, CPU, dist.group.WORLD), classifier(0.1)
    if rank == 1:
        with torch.no_grad():
            model.head.weight += 1  # everybody starts from rank 0's parameters
    task = classifier_task(model, ClassifierAttack(name.split()[0], 2, BOUNDS), world, **FLAGS | RUNS[name])
    updater = task.updater(LR)
    if states:
        model.load_state_dict(states["model"])
        updater.optimizer.load_state_dict(states["optimizer"])
    return Engine(task, world, updater, (states or {}).get("model_ema"))


def update(engine: Engine, number: int) -> torch.Tensor:
    rank = engine.world.rank
    for i in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        batch = golden_images()[i][mine], labels()[mine]
        noise = engine.task.draw_noise(torch.Generator().manual_seed(10 * number + 2 * i + rank), batch)
        engine.forward_backward(batch, noise, last=i == 1)
    return engine.update(number)


def measure(engine: Engine) -> Scores:
    """Of eight images, of which rank 1 has a batch less."""
    images = (255 * golden_images()[0]).byte()
    parts = [slice(0, 3), slice(3, 5)] if engine.world.rank == 0 else [slice(5, 8)]
    stream = [(images[part], labels()[part]) for part in parts]
    attack = build_validation_attack("pgd2", 8.0, CPU)
    return validate(engine.rated, stream, engine.world, engine.dtype, attack, functions=engine.functions)


def train(rank: int, name: str) -> dict:
    """Three updates, each followed by a validation; whole states and what this process holds afterwards."""
    engine, norms, scores = build(rank, name), [], []
    for number in (1, 2, 3):
        norms.append(update(engine, number))
        scores.append(tuple(measure(engine)))
        if name == "pgd resumed" and number == 1:
            engine = build(rank, name, copy.deepcopy(engine.states()))
    states, groups = engine.states(), engine.updater.optimizer.param_groups
    means = [state["exp_avg"] for _, state in sorted(states["optimizer"]["state"].items())]
    return {
        "weights": states["model"],
        "average": states.get("model_ema"),
        "means": means,
        "held": sum(p.numel() for group in groups for p in group["params"]),
        "scales": [group["lr_scale"] for group in groups],
        "norms": norms,
        "scores": scores,
    }


class Gathers(TorchDispatchMode):
    """Counts groups of parameters that FSDP gathers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith("fsdp.all_gather_copy_in")
        return func(*args, **(kwargs or {}))


def gathers(rank: int, steps: int) -> int:
    """How often parameters are gathered in a micro-step under an attack of so many steps."""
    engine = build(rank, "pgd fsdp")
    engine.task.attack = engine.task.attack._replace(steps=steps)
    batch = golden_images()[0][:2], labels()[:2]
    noise = engine.task.draw_noise(torch.Generator().manual_seed(0), batch)
    with Gathers() as counted:
        engine.forward_backward(batch, noise)
    return counted.count


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    results = {name: train(rank, name) for name in RUNS} | {"gathers": [gathers(rank, steps) for steps in (1, 4)]}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    two_processes(worker, free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["pgd", "trades", "plain"])
def test_shards_train_and_validate_like_replicas(results, kind):
    ours, theirs = results[0][f"{kind} fsdp"], results[0][f"{kind} ddp"]
    assert_close(ours, theirs, 1e-3)
    assert ours["scales"] == theirs["scales"]
    assert min(ours["norms"]) > FLAGS["clip_grad"]  # so that clipping has something to do
    for mine, expected in zip(ours["scores"], theirs["scores"], strict=True):
        assert mine == pytest.approx(expected, rel=1e-3)
    assert ours["scores"][0] != ours["scores"][2]
    shares = [result[f"{kind} fsdp"]["held"] for result in results]
    assert sum(shares) == theirs["held"]
    assert max(shares) < 0.53 * theirs["held"]  # tables are one row, which one process has


def test_an_attack_gathers_the_parameters_once_for_all_its_steps(results):
    once, more = results[0]["gathers"]
    assert once == more == 2 * 3  # the attack's and the training pass: two blocks, and the rest


def test_the_average_is_gathered_and_is_that_of_replicas(results):
    ours, theirs = results[0]["pgd fsdp"], results[0]["pgd ddp"]
    assert list(ours["average"]) == list(ours["weights"]) == list(classifier().state_dict())
    for name, expected in theirs["average"].items():
        assert (ours["average"][name] - expected).abs().median() <= 1e-3 * LR, name
        assert torch.equal(ours["average"][name], results[1]["pgd fsdp"]["average"][name])
    moved = (ours["average"]["head.weight"] - ours["weights"]["head.weight"]).abs().median()
    assert moved > 0.1 * LR
    assert theirs["scores"][-1] != results[0]["plain ddp"]["scores"][-1]


def test_whole_states_continue_exactly(results):
    whole, resumed = results[0]["pgd fsdp"], results[0]["pgd resumed"]
    for entry in ("weights", "average"):
        assert all(torch.equal(whole[entry][n], resumed[entry][n]) for n in whole[entry])
    assert all(map(torch.equal, whole["means"], resumed["means"]))


def test_shards_in_bf16(results):
    means, expected = (torch.cat([m.flatten() for m in results[0][n]["means"]]) for n in ("pgd bf16", "pgd fsdp"))
    assert 0 < (means - expected).norm() < 0.1 * expected.norm()
    assert results[0]["pgd bf16"]["average"]["head.weight"].dtype == torch.float32


def test_checkpoints_are_anybodys_and_resume_exactly(tmp_path, monkeypatch):
    small_models(monkeypatch.setitem)
    data, extra = make_data(tmp_path / "images"), "--batch_size 2 --epochs 1 --warmup_epochs 0 --held_out 5 --model_ema"
    shards = f"{extra} --val_attack fgsm --parallel fsdp"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, words in ((whole, shards), (broken, f"{shards} --max_steps 2"), (broken, f"{shards} --resume auto")):
        child = start(data, folder, words, TORCHRUN)
        out = finish(child)
        assert child.returncode == 0, out
        assert out.count("device cpu x 2, fsdp, ") == 1, out
    assert same_run(load(whole / "checkpoint-0.pth"), load(broken / "checkpoint-0.pth"))
    assert lines(whole / "log.txt")[0]["val_robust_acc1"] is not None
    assert finetune(data, tmp_path / "one", f"{extra} --max_steps 3 --resume {broken / 'resume-0-2.pth'}") == 0
