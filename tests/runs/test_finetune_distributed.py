"""Fine-tuning in two processes: equal parameters, one writer, a shared validation that sees every image once."""

import pytest
import torch
import torch.distributed as dist

from mimir_fast.data import DataError
from mimir_fast.training.distributed import World
from mimir_fast.training.validation import validate
from tests.runs.test_distributed import CPU, free_port
from tests.support.finetune_runs import finetune, lines, load, make_data, same_run, start, small_models
from tests.support.runs import finish, two_processes

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
EXTRA = "--batch_size 2 --accum_iter 2 --epochs 1 --warmup_epochs 0 --held_out 5 --val_attack fgsm --model_ema --drop_path 0"


@pytest.fixture(autouse=True, scope="module")
def _tiny():
    with pytest.MonkeyPatch.context() as patch:
        small_models(patch.setitem)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("images"))


def test_torchrun_one_writer_and_resume(data, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, words in ((whole, EXTRA), (broken, f"{EXTRA} --max_steps 1"), (broken, f"{EXTRA} --resume auto")):
        child = start(data, folder, words, TORCHRUN)
        out = finish(child)
        assert child.returncode == 0, out
        assert out.count("device cpu x 2") == 1, out  # rank 1 is silent
    assert same_run(load(whole / "checkpoint-0.pth"), load(broken / "checkpoint-0.pth"))
    assert [row["update"] for row in lines(whole / "metrics.jsonl")] == [1, 2]  # 21 images, 2 processes x 2 x 2
    assert len(list(whole.glob("events*"))) == 1
    (row,) = lines(whole / "log.txt")
    assert row["val_acc1"] == pytest.approx(100 * round(row["val_acc1"] / 20) / 5)  # of five images
    check_against_one_process(data, whole, tmp_path / "alone", row)


def check_against_one_process(data, whole, alone, row: dict) -> None:
    """The same parameters rated by one process: nine test images in batches of two, one of them odd, make the same means."""
    state = load(whole / "checkpoint-0.pth")
    del state["optimizer"]  # parameters only: the run starts afresh from them
    state["model"] = state.pop("model_ema")
    path = alone.with_suffix(".pth")
    torch.save(state, path)
    extra = f"{EXTRA} --attack_train plain --lr 0 --min_lr 0 --resume {path}"
    assert finetune(data, alone, extra) == 0
    (ours,) = lines(alone / "log.txt")
    for name in ("test_loss", "test_acc1", "val_loss", "val_acc1", "val_robust_acc1"):
        assert ours[name] == pytest.approx(row[name], rel=1e-5), name


class Stream:
    """Two batches of two images; the second one of rank 1 is unreadable."""

    def __init__(self, rank: int):
        self.rank = rank

    def __len__(self) -> int:
        return 2

    def __iter__(self):
        batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        yield batch
        if self.rank == 1:
            raise DataError("a.png is unreadable")
        yield batch


def unreadable_worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    world = World(rank, 2, rank, CPU, dist.group.WORLD)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    try:
        validate(model, Stream(rank), world, torch.float32)
    except DataError as error:
        torch.save(str(error), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_an_unreadable_image_ends_the_validation_of_both(tmp_path):
    two_processes(unreadable_worker, free_port(), str(tmp_path))
    assert torch.load(tmp_path / "1.pt") == "a.png is unreadable"
    assert "another process names it" in torch.load(tmp_path / "0.pt")
