"""Small complete trainings whose steps are captured on a tape (tests/support/tape.py), or are not."""

from pathlib import Path

from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.resolve import resolve
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop
from mimir_fast.training.running import running
from mimir_fast.training.train import build_task
from tests.support import finetune_runs, runs
from tests.support.tape import Tape

TIMES = ("images_per_s", "data_wait", "peak_memory_gib")


def train(task: str, data: Path, out: Path, extra: str = "", tape: Tape | None = None) -> Loop:
    """The loop of a tiny training that ran to its end; task: pretrain or finetune."""
    command, words = (PRETRAIN, runs.command) if task == "pretrain" else (FINETUNE, finetune_runs.command)
    run = resolve(*parse_args(command, words(data, out, extra)))

    def build(run, world: World) -> Loop:
        return Loop(build_task(run, world, data=True), world, tape)

    with running(run, build) as loop:
        assert loop.run() == 0
    return loop


def same(a: Path, b: Path) -> bool:
    """Whether two runs' folders hold the same checkpoints to the last bit, and the same logs but for times."""
    files = [sorted(path.name for path in folder.glob("checkpoint-*.pth")) for folder in (a, b)]
    if files[0] != files[1]:
        return False
    same_states = all(_same(runs.load(a / name), runs.load(b / name)) for name in files[0])
    return same_states and all(_rows(a / name) == _rows(b / name) for name in ("metrics.jsonl", "log.txt"))


def _rows(path: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in runs.lines(path)]


def _same(a: dict, b: dict) -> bool:
    tensors = all(a[key].keys() == b[key].keys() for key in ("model_ema",) if key in a)
    averages = all(a["model_ema"][name].equal(b["model_ema"][name]) for name in a.get("model_ema", {}))
    rates = [[group["lr"] for group in state["optimizer"]["param_groups"]] for state in (a, b)]
    return (
        tensors and averages and runs.same_state(a, b) and rates[0] == rates[1] and a["mimir_fast"] == b["mimir_fast"]
    )
