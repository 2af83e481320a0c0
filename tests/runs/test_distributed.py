"""Several processes: finding each other, equal gradients, one writer, the same end for all."""

import json

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.config.pretraining import DistConfig, PretrainConfig
from mimir_fast.models import create_model
from mimir_fast.objectives.reconstruction import ReconstructionObjective
from mimir_fast.training.distributed import World, find_rank, join_world
from mimir_fast.training.engine import Engine
from mimir_fast.training.optimizer import Updater, build_optimizer
from mimir_fast.training.pretrain_step import MaeAttack, MaeNoise, draw_noise, pretrain_step
from tests.support.golden import BOUNDS, golden_images, small_model
from tests.support.runs import finish, free_port, load, make_images, run, same_state, start, two_processes
from tests.support.tasks import mae_task

ATTACK = MaeAttack(1, BOUNDS)
CPU = torch.device("cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_find_rank_in_the_originals_order():
    ompi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "1"}
    everything = ompi | torchrun | slurm
    assert find_rank(DistConfig(dist_on_itp=True), everything) == (3, 8, 1)
    assert find_rank(DistConfig(), everything) == (2, 4, 0)
    assert find_rank(DistConfig(), slurm) == (5, 6, 1)
    assert find_rank(DistConfig(), {}) == (0, 1, 0)
    assert find_rank(DistConfig(), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) == (0, 1, 0)  # a batch script, no srun
    assert find_rank(DistConfig(local_rank=1), {"RANK": "1", "WORLD_SIZE": "2"}) == (1, 2, 1)
    with pytest.raises(ValueError, match="dist_on_itp"):
        find_rank(DistConfig(dist_on_itp=True), torchrun)


def test_a_process_waits_for_the_others_as_long_as_the_flag_says(monkeypatch):
    """Planted: half an hour whatever --dist_timeout says."""
    asked = []

    def join(*places, timeout, **words):
        asked.append(timeout.total_seconds())
        raise InterruptedError

    monkeypatch.setattr(dist, "init_process_group", join)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for flags in ({}, {"dist_timeout": 2.5}):
        with pytest.raises(InterruptedError):
            join_world(DistConfig(**flags), "cpu")
    assert asked == [1800, 150]
    with pytest.raises(ValueError, match="dist_timeout: got 0"):
        PretrainConfig().updated({"dist_timeout": 0.0}).check()


def half(noise: MaeNoise, rank: int) -> MaeNoise:
    part = slice(4 * rank, 4 * rank + 4)
    return MaeNoise(noise.start[part], [m[part] for m in noise.attack_masks], noise.train_mask[part])


def the_noise() -> MaeNoise:
    drawn = draw_noise(torch.Generator().manual_seed(7), 8, 64, ATTACK)
    return drawn._replace(start=0.01 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(8)))


# Penalty, and whether it compares the images of both processes.
PENALTIES = {"none": (None, False), "local": ("hsic", False)}
PENALTIES |= {name: (name, True) for name in ("hsic", "renyi2", "dib_mi")}
WEIGHT = 1.0


# The Rényi kernels are the identity between images or latents far apart.
def close_images() -> torch.Tensor:
    return 0.45 + 0.1 * golden_images()[0]


def close_latents():
    model = small_model()
    with torch.no_grad():
        model.norm.weight *= 0.1
    return model


def gradients(model) -> dict:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def replica(rank: int, world: World, penalty: str | None, gathers: bool) -> dict:
    """Gradients and penalty of one step on this process's half of the images."""
    model = close_latents()
    if rank == 1:
        with torch.no_grad():
            model.norm.weight += 1  # DDP starts everybody from rank 0's parameters
    objective = ReconstructionObjective(model, 0.75, penalty, WEIGHT, gathered=world if gathers else None)
    wrapped = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    images = close_images()[4 * rank : 4 * rank + 4]
    out = pretrain_step(wrapped, model, images, half(the_noise(), rank), ATTACK)
    Updater(build_optimizer(model, 1e-3, 0.05), CPU, False).backward(out.loss, 1)
    return {"grads": gradients(model), "mi": out.mi}


def ddp_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    world = World(rank, 2, rank, CPU, dist.group.WORLD)
    steps = {name: replica(rank, world, *how) for name, how in PENALTIES.items()}
    told = [world.any(rank == 1), world.any(False), world.mean(torch.tensor(float(rank))).item()]
    told += [world.same([3, 5]), world.same([3, rank])]
    torch.save({"steps": steps, "told": told}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def alone(penalty: str | None, whole: bool) -> dict:
    """The same of one process, on all images, or half by half as two processes' own batches."""
    model, images, noise = close_latents(), close_images(), the_noise()
    objective = ReconstructionObjective(model, 0.75, penalty, WEIGHT)
    parts = [(images, noise)] if whole else [(images[4 * r : 4 * r + 4], half(noise, r)) for r in range(2)]
    for part, its_noise in parts:
        out = pretrain_step(objective, model, part, its_noise, ATTACK)
        (out.loss / len(parts)).backward()
    return {"grads": gradients(model), "mi": out.mi}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Planted: a process's part of the gradient not times their number, or another process's part; adversarial images where the
    clean ones are compared."""
    two_processes(ddp_worker, free_port(), str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(result["told"] == [True, False, 0.5, True, False] for result in results)
    for case, (penalty, gathers) in PENALTIES.items():
        expected = alone(penalty, whole=penalty is None or gathers)
        ours, theirs = (result["steps"][case] for result in results)
        largest = max(grad.abs().max() for grad in expected["grads"].values())
        for name, grad in expected["grads"].items():
            assert torch.equal(ours["grads"][name], theirs["grads"][name])
            assert (ours["grads"][name] - grad).abs().max() < 2e-6 * largest, (case, name)
        if gathers:
            torch.testing.assert_close(
                torch.stack([ours["mi"], theirs["mi"]]), expected["mi"].expand(2), rtol=2e-6, atol=0
            )


def statistics_worker(rank: int, port: int, parallel: str, folder: str) -> None:
    """A micro-step and an update of a model whose normalisation has running statistics."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 4, "cls_attn_layers": 1, "decoder_num_heads": 4}
    model = create_model("xcit", img_size=32, patch_size=8, **sizes)
    world = World(rank, 2, rank, CPU, dist.group.WORLD)
    engine = Engine(mae_task(model, ATTACK, world, parallel=parallel), world)
    noise = draw_noise(torch.Generator().manual_seed(rank), 4, 16, ATTACK)
    engine.forward_backward(golden_images()[0][4 * rank : 4 * rank + 4], noise)
    own = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine.update()
    torch.save({"own": own, "model": engine.states()["model"]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_running_statistics_are_the_mean_of_the_processes(tmp_path, parallel):
    """Planted: those of each process's own batches."""
    two_processes(statistics_worker, free_port(), parallel, str(tmp_path))
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours["model"][name], theirs["model"][name]) for name in ours["model"])
    running = [name for name in ours["own"] if ".running_" in name]
    assert len(running) == 2 * (3 + 2 + 2)
    for name in running:
        assert not torch.equal(ours["own"][name], theirs["own"][name])
        torch.testing.assert_close(ours["model"][name], (ours["own"][name] + theirs["own"][name]) / 2)


def computation_worker(rank: int, port: int, compression: str, folder: str) -> None:
    """Two accumulated micro-steps and an update, in bf16, from parameters that differ between the processes at first."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    world, model = World(rank, 2, rank, CPU, dist.group.WORLD), small_model()
    if rank == 1:
        with torch.no_grad():
            for p in model.parameters():
                p += 1
    flags = {"precision": "bf16", "grad_compression": compression, "accum_iter": 2, "lr": 1e-3}
    engine = Engine(mae_task(model, ATTACK, world, **flags), world)
    for i in range(2):
        images = golden_images()[i][4 * rank : 4 * rank + 4]
        engine.forward_backward(images, half(the_noise(), rank), last=i == 1)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    engine.update()
    torch.save({"grads": grads, "model": model.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_two_processes_in_bf16_stay_the_same(tmp_path, compression):
    two_processes(computation_worker, free_port(), compression, str(tmp_path))
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(ours["model"][n], theirs["model"][n]) for n in ours["model"])
    model = small_model()
    objective = ReconstructionObjective(model, 0.75)
    for i in range(2):
        (pretrain_step(objective, model, golden_images()[i], the_noise(), ATTACK).loss / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (ours["grads"][name] - p.grad).norm() < 0.1 * p.grad.norm() + 1e-5, name


@pytest.mark.slow
def test_non_finite_loss_on_one_rank_skips_the_step_on_all(tmp_path):
    two_processes(bad_worker, free_port(), str(tmp_path))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["counters"] == [1, 1, 1]
        assert result["same"]


def bad_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model = small_model()
    wrapped = DistributedDataParallel(model)
    updater = Updater(build_optimizer(model, 1e-3, 0.05), CPU, False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = wrapped(golden_images()[rank])[0]
    updater.backward(loss + torch.inf if rank == 1 else loss, 1)
    updater.update()
    same = all(torch.equal(before[n], p) for n, p in model.named_parameters())
    torch.save({"counters": updater.counters.tolist(), "same": same}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.mark.slow
def test_torchrun_one_writer_and_resume_after_a_process_was_killed(data, tmp_path, monkeypatch):
    """Planted, it was seen to fail: a resume that begins the epoch again."""
    # Before the last of three updates.
    monkeypatch.setenv("TEST_KILL", "1 3")
    extra = "--batch_size 2 --mi_train renyi2 --accum_iter 2 --epochs 1 --warmup_epochs 0"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    older = (
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={free_port()}",
    )  # passes --local-rank
    runs = [
        (whole, extra, TORCHRUN, "mimir_fast.pretrain"),
        (broken, f"{extra} --checkpoint_steps 1", older, "tests.support.killed"),
        (broken, f"{extra} --resume auto", TORCHRUN, "mimir_fast.pretrain"),
    ]
    for folder, words, launcher, module in runs:
        child = start(data, folder, words, launcher, module)
        out = finish(child)
        # The launcher says who was killed, and ends the other.
        assert ("Signal 9 (SIGKILL)" in out) == (child.returncode != 0) == (module == "tests.support.killed"), out
        assert out.count("device cpu x 2") == 1, out  # rank 1 is silent
        assert list(folder.glob("resume-0-*.pth")) or module == "mimir_fast.pretrain"
    assert same_state(load(whole / "checkpoint-0.pth"), load(broken / "checkpoint-0.pth"))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3]  # 26 images, 2 processes x 2 images x 2 micro-batches
    assert len(list(whole.glob("events*"))) == 1
    assert len((whole / "log.txt").read_text().splitlines()) == 1
    alone = tmp_path / "alone"
    assert run(data, alone, f"{extra} --batch_size 4") == 0
    assert not same_state(
        load(whole / "checkpoint-0.pth"), load(alone / "checkpoint-0.pth")
    )  # another noise, another penalty
