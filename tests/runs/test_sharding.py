"""Fully sharded data parallelism: the numbers of data parallelism, shares that add up, checkpoints of whole models."""

import copy
from functools import partialmethod
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from tests.runs.test_distributed import ATTACK, CPU, TORCHRUN, free_port, half, the_noise
from tests.support.golden import golden_images, small_model
from tests.support.runs import finish, make_images, run, start, two_processes
from tests.support.tasks import mae_task

pytestmark = pytest.mark.slow

LR = 1e-3
FLAGS = {"mi_train": "hsic", "mi_xpl": 1e-2, "lr": LR, "accum_iter": 2}
# A weight at which the penalty is most of the gradient.
GLOBAL = {"penalty_batch": "global", "mi_xpl": 10.0}
BLOCKS = {"compile": True, "compile_region": "block"}
RUNS = {
    "ddp": {},
    "fsdp": {"parallel": "fsdp"},
    "resumed": {"parallel": "fsdp"},
    "poisoned": {"parallel": "fsdp"},
    "bf16": {"parallel": "fsdp", "precision": "bf16"},
    "compressed": {"parallel": "fsdp", "precision": "bf16", "grad_compression": "bf16"},
    "global": GLOBAL,
    "global fsdp": GLOBAL | {"parallel": "fsdp", "activation_checkpointing": True},
    "compiled ddp": BLOCKS,
    "compiled fsdp": {"parallel": "fsdp"} | BLOCKS,
}


class Run:
    """A model in training on one of two processes."""

    def __init__(self, rank: int, flags: dict, states: dict | None = None):
        """states: a checkpoint's entries, to go on from."""
        self.rank, model = rank, small_model()
        model.activation_checkpointing = "activation_checkpointing" in flags
        if rank == 1:
            with torch.no_grad():
                model.norm.weight += 1  # everybody starts from rank 0's parameters
        world = World(self.rank, 2, self.rank, CPU, dist.group.WORLD)
        task = mae_task(model, ATTACK, world, **FLAGS | flags)
        updater = task.updater(LR)
        if states:
            model.load_state_dict(states["model"])
            updater.optimizer.load_state_dict(states["optimizer"])
        self.engine = Engine(task, world, updater)

    def update(self, poison: bool) -> torch.Tensor:
        """Two micro-steps and an update; the gradients' norm."""
        for i in range(2):
            images = golden_images()[i][4 * self.rank : 4 * self.rank + 4]
            if poison and self.rank == 1:
                images = images * torch.inf
            self.engine.forward_backward(images, half(the_noise(), self.rank), last=i == 1)
        return self.engine.update()


def train(rank: int, name: str) -> dict:
    """Two updates; whole states and what this process holds afterwards."""
    run, norms = Run(rank, RUNS[name]), []
    for _ in range(2):
        norms.append(run.update(name == "poisoned"))
        if name == "resumed" and len(norms) == 1:
            run = Run(rank, RUNS[name], copy.deepcopy(run.engine.states()))
    states, updater = run.engine.states(), run.engine.updater
    means = [state["exp_avg"] for _, state in sorted(states["optimizer"]["state"].items())]
    held = sum(p.numel() for group in updater.optimizer.param_groups for p in group["params"])
    skipped = updater.counters.tolist()
    return {"weights": states["model"], "means": means, "held": held, "norms": norms, "skipped": skipped}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    quick = patch.object(nn.Module, "compile", partialmethod(_compile_quickly))
    with quick:
        torch.save({name: train(rank, name) for name in RUNS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _compile_quickly(module: nn.Module, mode: str, backend: str, **options) -> None:
    """Graphs and gradients as for Inductor, without generating code."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    two_processes(worker, free_port(), str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def assert_close(run: dict, reference: dict, tolerance: float) -> None:
    """Moments (averages of gradients) as parts of the largest of their tensor; weights, which moved by 2 LR at most."""
    for mean, expected in zip(run["means"], reference["means"], strict=True):
        assert (mean - expected).abs().max() <= tolerance * expected.abs().max() + 1e-9
    for name, expected in reference["weights"].items():
        assert (run["weights"][name] - expected).abs().median() <= tolerance * LR, (
            name
        )  # the keys' biases move by chance
    for norm, expected in zip(run["norms"], reference["norms"]):
        torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)


def test_shards_train_like_replicas(results):
    assert_close(results[0]["fsdp"], results[0]["ddp"], 1e-3)
    ours, theirs = (result["fsdp"] for result in results)
    assert all(torch.equal(ours["weights"][n], theirs["weights"][n]) for n in ours["weights"])
    trainable = results[0]["ddp"]["held"]
    assert ours["held"] + theirs["held"] == trainable
    assert max(ours["held"], theirs["held"]) < 0.52 * trainable
    assert list(ours["weights"]) == list(small_model().state_dict())


def test_a_penalty_of_all_processes_is_that_of_one_process(results):
    """With accumulation, in replicas and in shards whose blocks are computed again."""
    engine = Engine(mae_task(small_model(), ATTACK, **FLAGS | GLOBAL), World())
    norms = []
    for _ in range(2):
        for i in range(2):
            engine.forward_backward(golden_images()[i], the_noise(), last=i == 1)
        norms.append(engine.update())
    moments = engine.states()["optimizer"]["state"]
    alone = {"weights": engine.states()["model"], "norms": norms}
    alone["means"] = [state["exp_avg"] for _, state in sorted(moments.items())]
    for name in ("global", "global fsdp"):
        assert_close(results[0][name], alone, 1e-3)


def test_whole_states_continue_exactly(results):
    whole, resumed = results[0]["fsdp"], results[0]["resumed"]
    assert all(torch.equal(whole["weights"][n], resumed["weights"][n]) for n in whole["weights"])
    assert all(map(torch.equal, whole["means"], resumed["means"]))


def test_shards_in_bf16_with_compressed_gradients(results):
    for name in ("bf16", "compressed"):
        means, expected = (torch.cat([m.flatten() for m in results[0][n]["means"]]) for n in (name, "fsdp"))
        assert 0 < (means - expected).norm() < 0.1 * expected.norm(), name
        assert torch.equal(*(result[name]["weights"]["norm.weight"] for result in results))
        assert results[0][name]["weights"]["norm.weight"].dtype == torch.float32
    assert not torch.equal(*(results[0][name]["means"][0] for name in ("bf16", "compressed")))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiles_block_by_block(results, parallel):
    assert_close(results[0][f"compiled {parallel}"], results[0]["ddp"], 1e-2)


def test_non_finite_loss_on_one_process_skips_the_update_on_all(results):
    for result in results:
        assert result["poisoned"]["skipped"] == [2, 2, 2]
        expected = small_model().state_dict()
        assert all(torch.equal(p, expected[name]) for name, p in result["poisoned"]["weights"].items())


def test_checkpoints_are_anybodys(tmp_path):
    data = make_images(tmp_path / "images")
    extra = "--batch_size 2 --epochs 2 --warmup_epochs 0"
    child = start(data, tmp_path / "two", f"{extra} --parallel fsdp --max_steps 2", TORCHRUN)
    out = finish(child)
    assert child.returncode == 0, out
    assert out.count("device cpu x 2, fsdp, ") == 1, out
    assert run(data, tmp_path / "one", f"{extra} --max_steps 3 --resume {tmp_path / 'two' / 'resume-0-2.pth'}") == 0
