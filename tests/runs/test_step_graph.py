"""The trainer on a simulated GPU: captured steps break none of CUDA's rules and launch what uncaptured ones launch, an update
issues a handful of operations, and nothing waits or allocates between two of them."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from mimir_fast.data.cache.format import Options
from tests.support import finetune_runs, runs
from tests.support.pictures import make_cache
from tests.support.simulation import needs_simulated_gpu, run_simulated

# Marks the log after every update, then runs the command of the words.
PROGRAM = """
import sys, torch
from bench.simulated_gpu import marker
from mimir_fast.cli import finetune, pretrain
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop

torch.backends.cuda.enable_cudnn_sdp(False)
mark, after = marker(), Loop._after_update

def marked(self, *arguments):
    after(self, *arguments)
    mark(f"update {self.position.update} {torch.cuda.memory_reserved()}")

Loop._after_update = marked
# Nothing is computed here, and means over no images are not defined.
World.mean = lambda self, values: values if values.ndim == 2 else torch.ones(values.shape)
sys.exit({"pretrain": pretrain, "finetune": finetune}[sys.argv[1]].main(sys.argv[2:]))
"""
WORK = ("KERNEL", "TRITON", "GEMM", "SOLVER", "MEMSET", "MEMCPY", "MEMCPY2D")
PLACES = "--device cuda --output_dir= --log_dir= --epochs 3 --no_compile --tune off"
UPDATES = 8


class Log:
    """What every update called, [call, ...] split at |, and how much memory the allocator held after it."""

    def __init__(self, path: Path, printed: str):
        self.printed = printed
        self.updates, self.reserved, calls = [], [], []
        for line in path.read_text().splitlines():
            kind, *rest = line.split("|")
            if kind == "MARK":
                self.updates.append(calls)
                self.reserved.append(int(rest[0].split()[2]))
                calls = []
            else:
                calls.append([kind, *rest])

    def graphs(self, *kinds: str) -> list[list[str]]:
        return [call for calls in self.updates for call in calls if call[0] == "GRAPH" and call[1] in kinds]

    def captured(self) -> tuple[Counter, Counter]:
        """What the first captured update launched inside of its graphs, and the update before it in all, by name and grid."""
        number = next(
            i for i, calls in enumerate(self.updates) if any(call[:2] == ["GRAPH", "begin"] for call in calls)
        )
        inside, recorded = False, Counter()
        for kind, *rest in self.updates[number]:
            if kind == "GRAPH" and rest[0] in ("begin", "end"):
                inside = rest[0] == "begin"
            elif inside and kind in WORK:
                recorded[(kind, *rest)] += 1
        return recorded, Counter(tuple(call) for call in self.updates[number - 1] if call[0] in WORK)


def trained(folder: Path, task: str, words: list[str], program: str = PROGRAM) -> Log:
    (folder / "program.py").write_text(program)
    return Log(folder / "log", run_simulated([sys.executable, folder / "program.py", task, *words], folder / "log"))


def beside(log: Log) -> str:
    """What the first capture launches from the side stream's beginning until it is waited for."""
    calls = next(calls for calls in log.updates if any(call[:2] == ["GRAPH", "fork"] for call in calls))
    first = next(i for i, call in enumerate(calls) if call[:2] == ["GRAPH", "fork"])
    last = calls.index(["GRAPH", "join", calls[first][2]], first)
    return " ".join(call[1] for call in calls[first:last] if call[0] in WORK)


def check(log: Log, launches: int, issued: int) -> None:
    """Every captured update launches so many graphs and issues at most so many operations, the graphs among them."""
    assert "step one CUDA graph, " in log.printed
    assert not log.graphs("illegal", "outside")
    assert len(log.graphs("begin")) == launches
    recorded, eager = log.captured()
    # Of a micro-step that no update follows some results are kept: adv, pred, ids_removed.
    assert (recorded - eager).total() <= 3 * (launches - 1)
    # What the host puts into place is issued beside the graph.
    assert all(call[:2] == ("MEMCPY", "H2D") or "FillFunctor" in call[1] for call in eager - recorded)
    for calls in log.updates[5:]:
        kinds = Counter(call[0] if call[0] != "GRAPH" else call[1] for call in calls)
        assert kinds["launch"] == launches
        assert sum(kinds[kind] for kind in (*WORK, "launch")) <= issued
        assert not kinds["SYNC"]
        assert not kinds["MALLOC"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.make_images(tmp_path_factory.mktemp("images"), 80)


@pytest.fixture(scope="module")
def test_data(tmp_path_factory):
    return finetune_runs.make_data(tmp_path_factory.mktemp("images"), 80)


@needs_simulated_gpu
@pytest.mark.parametrize(
    ("extra", "launches"),
    [
        ("--use_normalize", 1),
        ("--accum_iter 2 --steps 2 --activation_checkpointing", 2),
        ("--precision fp16 --mi_train renyi2", 1),
        ("--precision fp32 --kernels reference", 1),
    ],
)
def test_pretraining(data, tmp_path, extra, launches):
    words = runs.command(data, tmp_path, f"{PLACES} {extra} --max_steps {UPDATES} --log_every 100")
    log = trained(tmp_path, "pretrain", words)
    check(log, launches, 8 * launches)
    # From the encoder's first kernel to the last of the decoder's backward pass.
    if "reference" not in extra:
        assert "_gather_kernel" in beside(log)
        assert "_mask_token_grad_kernel" in beside(log)
    # Bytes become floats where kernels of ours do not read them, or something is subtracted from them.
    floats = any("DivFunctor" in call[1] for call in log.captured()[0])
    assert floats == any(word in extra for word in ("reference", "normalize", "renyi2"))


@needs_simulated_gpu
@pytest.mark.parametrize(
    ("extra", "launches", "issued"),
    [
        # the drawn mixture and the average's decay are two operations more
        ("--layer_decay .7 --drop_path .1 --model_ema --mixup .8 --cutmix 1", 1, 10),
        ("--attack_train trades --clip_grad 1 --accum_iter 2", 2, 16),
        ("--attack_train mart --precision fp16", 1, 8),
        ("--attack_train apgd --steps 5", 1, 8),
        ("--attack_train pgd_best --steps 3 --alpha_warmup_epochs 2", 1, 8),
    ],
)
def test_finetuning(test_data, tmp_path, extra, launches, issued):
    words = finetune_runs.command(test_data, tmp_path, f"{PLACES} {extra} --max_steps {UPDATES} --log_every 100")
    check(trained(tmp_path, "finetune", words), launches, issued)


@needs_simulated_gpu
def test_validation_gets_the_memory_and_the_next_update_is_captured_again(tmp_path):
    data = finetune_runs.make_data(tmp_path / "images", 24)
    words = finetune_runs.command(data, tmp_path, f"{PLACES} --epochs 3 --val_attack pgd2 --val_every 1 --test_every 1")
    log = trained(tmp_path, "finetune", words)
    assert not log.graphs("illegal", "outside")
    assert len(log.updates) == 18
    assert [i for i, calls in enumerate(log.updates) if ["GRAPH", "begin", "mode=1"] in calls] == [3, 6, 12]


@needs_simulated_gpu
def test_dib_mi_runs_between_two_graphs(data, tmp_path):
    """Its eigenvalues make the host wait, and nothing else does."""
    words = runs.command(data, tmp_path, f"{PLACES} --mi_train dib_mi --max_steps {UPDATES} --log_every 100")
    log = trained(tmp_path, "pretrain", words)
    assert not log.graphs("illegal", "outside")
    for calls in log.updates[5:]:
        between = [call for call in calls if call[0] in (*WORK, "SYNC") or call[:2] == ["GRAPH", "launch"]]
        launches = [i for i, call in enumerate(between) if call[0] == "GRAPH"]
        assert len(launches) == 2
        assert all(launches[0] < i < launches[1] for i, call in enumerate(between) if call[0] == "SYNC")


@needs_simulated_gpu
def test_off_launches_every_operation_and_says_so(data, tmp_path):
    words = runs.command(data, tmp_path, f"{PLACES} --step_graph off --max_steps {UPDATES} --log_every 100")
    log = trained(tmp_path, "pretrain", words)
    assert "step uncaptured (--step_graph off), " in log.printed
    assert not log.graphs("begin", "launch")
    assert len(log.updates[-1]) > 100


WAITS = """
from mimir_fast.training.optimizer import Updater

count = Updater._count

def waits(self, bad):
    count(self, bad)
    self.counters.sum().item()

Updater._count = waits
"""


@needs_simulated_gpu
def test_a_step_that_waits_is_not_captured_and_trains_on(data, tmp_path):
    """torch ends the capture that an illegal call has invalidated, and goes on."""
    program = PROGRAM.replace("sys.exit(", WAITS + "sys.exit(")
    words = runs.command(data, tmp_path, f"{PLACES} --max_steps {UPDATES} --log_every 100")
    log = trained(tmp_path, "pretrain", words, program)
    told = [
        line for line in log.printed.splitlines() if line.startswith("step_graph: the step could not be captured (")
    ]
    assert ["runs between two graphs" in told[0], "runs uncaptured" in told[1]] == [True, True]
    assert len(log.updates) == UPDATES
    assert len(log.graphs("begin")) == 3
    assert not log.graphs("launch")
    counts = [Counter(tuple(call) for call in calls if call[0] in WORK) for calls in log.updates]
    assert counts[-1] == counts[2]


@needs_simulated_gpu
def test_two_hundred_updates_take_no_more_memory(data, tmp_path):
    words = runs.command(
        data, tmp_path, f"{PLACES} --epochs 40 --log_every 7"
    )
    log = trained(tmp_path, "pretrain", [*words, "--max_steps", "200", "--mi_train", "plain"])
    assert len(log.updates) == 200
    assert not log.graphs("illegal", "outside")
    assert log.reserved[10] == log.reserved[-1]
    assert not [call for calls in log.updates[10:] for call in calls if call[0] == "MALLOC"]


@needs_simulated_gpu
def test_crops_of_a_cache_are_written_where_the_captured_step_reads_them(test_data, tmp_path):
    """One launch a step makes the model's input: no copy, no conversion.

    Planted: `place` gives a new tensor; uint8 crops and to_float.
    """
    make_cache(test_data, tmp_path / "cache", Options("train", "yuv420", 16, 0, 10))
    words = runs.command(tmp_path / "cache", tmp_path, f"{PLACES} --max_steps {UPDATES} --log_every 100")
    log = trained(tmp_path, "pretrain", words)
    assert not log.graphs("illegal", "outside")
    labels = 4 * 8
    for calls in log.updates[5:]:
        assert sum(call[0] in WORK or call[:2] == ["GRAPH", "launch"] for call in calls) <= 8
        assert [call[1] for call in calls if call[0] == "TRITON"] == ["_crop_resize_yuv420_kernel"]
        assert {int(call[2]) for call in calls if call[:2] == ["MEMCPY", "D2D"]} == {labels}
    # to_float's is the only division of a step from image files
    assert not [call for call in log.captured()[0] if "DivFunctor" in call[1]]
