"""What tables and plots may show of the rows: bounds from priced steps, measurements from devices that have times."""

from collections.abc import Iterable
from dataclasses import dataclass

from bench.records import is_pretend
from bench.rows import FINETUNE, PRETRAIN, Reading, Row, newest, varying

SIZES = {"nano": "nano", "ti": "Ti", "small": "S", "small_ds": "S (8 wide blocks)", "base": "B", "large": "L"}
STEPS = {"ours": "mimir_fast", "references": "references", "textbook": "textbook"}
SHOWN = ("model", "patch_size", "batch_size", "input_size", "precision", "residual_dtype", "compile")
ATTACK = ("attack_train", "steps")  # of a fine-tuning step: part of its name
CHOSEN = {"variant": "ours", "peaks": "h100", "config.residual_dtype": "bf16"}
HEADLINE = {
    PRETRAIN: CHOSEN | {"config.model": "mae_vit_base"},
    FINETUNE: CHOSEN | {"config.model": "vit_base", "config.attack_train": "pgd", "config.steps": 1},
}
UNKNOWN = "—"
TERA = 1e12


@dataclass(frozen=True)
class Measurement:
    """One reading of a row that was measured.  Raises ValueError for a row of a pretend GPU: there is no other way in."""

    row: Row
    reading: Reading

    def __post_init__(self):
        if is_pretend(self.row.device):
            raise ValueError(f"{self.row.where}: {self.row.device} has no times: this is no measurement")

    @property
    def on_gpu(self) -> bool:
        return self.row.device != "cpu"


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    return [row for row in rows if row.kind.name == kind]


def of_task(rows: Iterable[Row], task: str) -> list[Row]:
    """Those of pre-training or of fine-tuning; kinds that only one of them has belong to pre-training."""
    return [row for row in rows if row.record["task"] == task]


def bounds(rows: Iterable[Row], task: str = PRETRAIN) -> list[Row]:
    """The newest priced step of every variant, GPU and configuration, wherever it was priced; smallest model first."""
    found = [group[-1] for group in newest(of_task(of_kind(rows, "step"), task), "device").values()]
    return sorted(found, key=_place)


def measurements(rows: Iterable[Row], kind: str, figure: str) -> list[Measurement]:
    """The newest reading of every row of a kind that has one.  Raises ValueError if one is of a pretend GPU."""
    groups = newest(row for row in of_kind(rows, kind) if figure in row.readings).values()
    return [Measurement(group[-1], group[-1].readings[figure]) for group in groups]


def headline(rows: Iterable[Row], task: str = PRETRAIN) -> Row | None:
    """The newest priced step of ours, ViT-B with a bf16 residual on an H100: what plots and the README speak of."""
    found = [row for row in bounds(rows, task) if HEADLINE[task].items() <= row.subject.items()]
    return max(found, key=lambda row: row.record["date"], default=None)


def beside(rows: Iterable[Row], row: Row) -> list[Row]:
    """The bounds of the same task, GPU, batch and image size as this row's."""
    same = ("peaks", "config.batch_size", "config.input_size", "config.patch_size")
    return [
        other
        for other in bounds(rows, row.record["task"])
        if all(other.subject[name] == row.subject[name] for name in same)
    ]


def mfu_at_bound(row: Row, peak_flops: float) -> float:
    """Share of the peak [FLOP/s] that the products and attention of a priced step would reach at its bound."""
    return model_tflop(row) * TERA / (row.record["totals"]["bound_ms"] / 1e3 * peak_flops)


def model_tflop(row: Row) -> float:
    """Products and attention of a priced step."""
    return sum(row.record["classes"][kind]["tflop"] for kind in ("GEMM", "attention"))


# ---- how rows are called


def model(config: dict) -> str:
    """ViT-B/16"""
    name = _size(config)
    return f"ViT-{SIZES.get(name, name)}/{config['patch_size']}"


def _size(config: dict) -> str:
    return config["model"].removeprefix("mae_").removeprefix("vit_")


def setting(row: Row, among: list[Row]) -> str:
    """The configuration in words, with the flags that set it apart from the rows beside it."""
    c = row.record["config"]
    words = [f"batch {c['batch_size']}, {c['input_size']} px"]
    if "precision" in c:  # the trainer's
        words += [c["precision"], f"{c['residual_dtype']} residual"]
    words.append("compiled" if c["compile"] else "eager")
    shown = {f"config.{name}" for name in (*SHOWN, *(ATTACK if row.record["task"] == FINETUNE else ()))}
    others = [other for other in among if _same(other, row, shown)]
    flags = {name for name in row.subject if name.startswith("config.")} - shown
    words += [f"{name.removeprefix('config.')} {row.subject[name]}" for name in varying(others, flags)]
    return ", ".join(words)


def step(row: Row) -> str:
    """The variant; of fine-tuning with its attack: mimir_fast, PGD-1."""
    name = STEPS[row.record["variant"]]
    return name if row.record["task"] == PRETRAIN else f"{name}, {attack(row.record)}"


def attack(record: dict) -> str:
    """Of a fine-tuning step: PGD-10."""
    config = record["config"]
    return f"{config['attack_train'].upper()}-{config['steps']}"


def threads(record: dict) -> str:
    return f"{record['threads']} thread{'s' if record['threads'] > 1 else ''}"


def source(row: Row) -> str:
    """Device, CUDA driver, torch, Triton, commit, date."""
    r = row.record
    driver = f"driver {r.get('driver') or UNKNOWN}"
    return " · ".join([row.device, driver, f"torch {r['torch']}", f"Triton {r['triton']}", r["commit"], r["date"][:10]])


def _same(other: Row, row: Row, shown: set[str]) -> bool:
    names = shown | {"variant", "peaks"}
    return all(other.subject.get(name) == row.subject.get(name) for name in names)


def _place(row: Row) -> tuple:
    c, peaks = row.record["config"], row.record["peaks"]
    names = list(SIZES)
    size = names.index(_size(c)) if _size(c) in names else len(names)
    return peaks != "h100", peaks, size, c["steps"], list(STEPS).index(row.record["variant"]), row.key()
