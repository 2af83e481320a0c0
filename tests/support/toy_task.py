"""The smallest task, and a stream of images that is made on the spot: what the loop and the engine ask, and no more."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import Run, resolve
from mimir_fast.training.distributed import World
from mimir_fast.training.loop import Loop
from mimir_fast.training.optimizer import Updater
from mimir_fast.training.task import Measured

CPU = torch.device("cpu")
STEPS, BATCH = 5, 2  # micro-batches of an epoch, images of a micro-batch


class ToyStream:
    """Images uint8 [2,3,2,2] and labels [2], a function of (epoch, step)."""

    name, num_images, bad_files, fingerprint, origin = "toy", STEPS * BATCH, (), "10-toy", ""

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int, start_step: int = 0):
        for step in range(start_step, STEPS):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            yield torch.randint(256, (BATCH, 3, 2, 2), dtype=torch.uint8, generator=generator), torch.arange(BATCH)

    def close(self) -> None:
        """Nothing is open."""


class ToyOutput(NamedTuple):
    loss: Tensor
    noise: Tensor

    @property
    def checked(self) -> Tensor:
        return self.loss


class ToyTask:
    """A linear model learns to add up pixels, to which a little noise was added."""

    tags, summary = {"loss": "loss"}, "a toy"
    form, uncapturable, pixels = None, "", torch.float32

    def __init__(self, run: Run, average_decay: float | None = None):
        self.run, self.stream, self.model, self.average_decay = run, ToyStream(), nn.Linear(12, 1), average_decay
        self.told: list[tuple] = []  # what the loop asked for, in its order
        self.best: int | None = None

    def updater(self, lr: float) -> Updater:
        return Updater(torch.optim.SGD(self.model.parameters(), lr=lr, fused=True), CPU, fp16=False)

    def attack_functions(self, compiler) -> None:
        """Nothing is attacked."""

    def objective(self, model: nn.Module, compiler) -> nn.Module:
        return model

    def host_draws(self, images: Tensor, epoch: int, step: int) -> None:
        self.told.append((epoch, step))

    def prepare(self, images: Tensor, labels: Tensor, draws: None) -> Tensor:
        return images.flatten(1) / 255

    def draw_noise(self, generator: torch.Generator, pixels: Tensor) -> Tensor:
        return 0.1 * torch.rand(pixels.shape, generator=generator)

    def step(self, objective, attacked, functions, pixels: Tensor, noise: Tensor) -> ToyOutput:
        error = objective(pixels + noise)[:, 0] - pixels.sum(dim=1)
        return ToyOutput(error.square().mean(), noise)

    def start_epoch(self, epoch: int) -> None:
        self.told.append((f"epoch {epoch}",))

    def end_epoch(self, engine, epoch: int, ends) -> Measured | None:
        self.told.append((f"end {epoch}",))
        self.best = epoch if epoch == 1 else self.best
        return Measured({"bias": engine.rated.bias.item()}, is_best=epoch == 1)

    def keeps(self, epoch: int) -> bool:
        return epoch == 0

    def terms(self, output: ToyOutput) -> dict[str, Tensor]:
        return {"noise": output.noise.mean()}

    def scalars(self, output: ToyOutput) -> dict[str, Tensor]:
        return {"largest": output.noise.max()}

    def epoch_row(self, epoch: int, means: dict[str, float], measured: Measured) -> dict:
        return {"epoch": epoch, "noise": means["noise"] / means["micro_steps"], **measured.row}

    def save_samples(self, folder, position, images: Tensor, output: ToyOutput) -> None:
        (folder / "sample.txt").write_text(str(images[0, 0, 0, 0].item()))

    def fit(self, state: dict) -> None:
        """Nothing is missing."""

    def resume(self, state: dict, own: dict, say) -> None:
        self.best = own.get("best")

    def state(self) -> dict:
        return {"best": self.best}


def toy_run(folder="", **flags) -> Run:
    """Three epochs of two updates of two micro-batches; the fifth micro-batch of an epoch is left over."""
    own = {"output_dir": str(folder), "log_dir": "", "batch_size": BATCH, "accum_iter": 2, "epochs": 3, "lr": 0.1}
    schedule = {"warmup_epochs": 1, "device": "cpu", "precision": "fp32", "compile": False, "log_every": 1}
    return resolve(PretrainConfig().updated(own | schedule | flags), set())


def build_loop(folder="", task_type=ToyTask, **flags) -> Loop:
    torch.manual_seed(3)
    return Loop(task_type(toy_run(folder, **flags)), World())


def finish(loop: Loop) -> int:
    try:
        return loop.run()
    finally:
        loop.close()
