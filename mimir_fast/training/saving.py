"""Checkpoints that a training loop writes: resume points, kept epochs, best.pth, and the state after too many bad updates."""

from pathlib import Path

from torch import Tensor

from mimir_fast.checkpoints import folder as ckpt
from mimir_fast.checkpoints.run_state import Position, checkpoint_state
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.task import Output, Task

# Images [B,3,H,W], uint8 or fp32 in [0,1], and labels int64 [B], on the device.
Batch = tuple[Tensor, Tensor]


class Saver:
    """Writes the state of one run; every rank calls `save`, rank 0 writes.

    position    of the run, which the loop moves
    folder      None: nothing is written
    lr          the peak learning rate, for the args of a checkpoint
    wandb_run   of Weights & Biases, where the run has one
    """

    def __init__(self, task: Task, world: World, engine: Engine, position: Position, folder: Path | None, lr: float):
        self.task, self.world, self.engine, self.position = task, world, engine, position
        self.folder, self.lr = folder, lr
        self.wandb_run: str | None = None

    def save(
        self, name: str, batch: Batch | None = None, output: Output | None = None, extra: dict | None = None
    ) -> list[str]:
        """Write a checkpoint, then retire those that it replaces; returns lines about these.

        batch, output   of the last micro-step: samples of them are drawn beside the checkpoint
        extra           entries that it gets besides
        """
        task, stream = self.task, self.task.stream
        assert stream is not None
        own = {"geometry": geometry(task, self.world), "images": stream.fingerprint, **task.state()}
        own |= {"wandb": self.wandb_run} if self.wandb_run else {}
        moved: list[str] = []
        states = self.engine.states() if self.folder else {}
        # Between two epochs there are none.
        self.position.sums = self.engine.meters.sums.means(self.world) if self.position.step else {}
        if self.folder and self.world.is_main:
            weights, moments = states.pop("model"), states.pop("optimizer")
            entries = (self.engine.updater, self.position, task.run.flat(), self.lr, stream.name)
            state = checkpoint_state(weights, moments, *entries, own) | (extra or {}) | states
            ckpt.save_checkpoint(self.folder / name, state)
            moved = ckpt.supersede(self.folder, self.position.epoch, self.position.step)
            # Temporary files stay: a report of the run may be writing its own.
            ckpt.drop_resume_points(self.folder)
            if batch is not None and output is not None:
                task.save_samples(self.folder, self.position, batch[0], output)
        self.world.barrier()
        return moved

    def save_failure(self, batch: Batch, output: Output) -> str:
        """Save the state with the last micro-step's batch and results; returns a line that says so."""
        p, most = self.position, self.task.run.config.optim.max_bad_steps
        name = f"failed-{p.epoch}-{p.step}.pth"
        made = {key: value.detach().cpu() for key, value in output._asdict().items()}
        self.save(name, batch, output, {"batch": {"images": batch[0].cpu(), "labels": batch[1].cpu(), **made}})
        return (
            f"error: {most} updates in a row (max_bad_steps) had a non-finite loss or gradient, "
            f"up to epoch {p.epoch}, micro-step {p.step}; the parameters are those before them. State and last batch: "
            f"{self.folder / name if self.folder else 'not saved, no output_dir'}; try a lower --lr, or --precision fp32"
        )


def geometry(task: Task, world: World) -> list[int]:
    """The numbers that a position inside an epoch depends on."""
    o, stream = task.run.config.optim, task.stream
    assert stream is not None
    return [world.size, o.batch_size, o.accum_iter, len(stream), task.run.config.run.seed]
