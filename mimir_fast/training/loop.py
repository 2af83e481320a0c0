"""Training loop of every task: epochs, accumulation, schedule, logs, checkpoints, signals."""

import time
from pathlib import Path

from mimir_fast.checkpoints import folder as ckpt
from mimir_fast.checkpoints.run_state import (
    Position,
    due,
    end_status,
    find_state,
    open_folder,
    resume,
)
from mimir_fast.data import DataError, prefetch
from mimir_fast.data.errors import NoBatchError
from mimir_fast.training.compilation import CompileClock
from mimir_fast.training.describe import describe
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.failures import rescue
from mimir_fast.training.logs import RunLog, peak_memory_gib
from mimir_fast.training.optimizer import peak_learning_rate, scheduled_rate
from mimir_fast.training.saving import Batch, Saver, geometry
from mimir_fast.training.signals import StopSignals
from mimir_fast.training.stages import stage
from mimir_fast.training.step_graph import Recorder
from mimir_fast.training.task import Measured, Output, Task
from mimir_fast.tuning.decisions import decide


class Loop:
    """One run of a task: made, it is started or resumed; then `run()`.  Raises ValueError where something does not fit."""

    def __init__(self, task: Task, world: World, recorder: Recorder | None = None):
        """recorder: see Engine."""
        if task.stream is None:
            raise ValueError("stream: a loop needs a task with images, got None")
        self.task, self.world, self.config, self.stream = task, world, task.run.config, task.stream
        o, r = self.config.optim, self.config.run
        if len(self.stream) < o.accum_iter:
            raise ValueError(f"accum_iter: {o.accum_iter} exceeds the {len(self.stream)} micro-batches of an epoch")
        self.updates_per_epoch = len(self.stream) // o.accum_iter
        self.lr = peak_learning_rate(o, world.size)
        self.folder = Path(r.output_dir) if r.output_dir else None
        notes = list(task.run.notes)
        found = find_state(r.resume, self.folder, notes.append)
        state = found[1] if found else {}
        # Before the optimizer is made, which takes the parameters that the model then has.
        task.fit(state)
        updater = task.updater(self.lr)
        start = Position(o.start_epoch, update=o.start_epoch * self.updates_per_epoch)
        entries = (task.model, updater, start, geometry(task, world), self.updates_per_epoch)
        self.position, own = resume(found, world, *entries, notes.append, self.stream.fingerprint)
        task.resume(state, own, notes.append)
        self.first_update = self.position.update + 1
        decide(task, world, state, print if world.is_main else notes.append)
        self.engine = Engine(task, world, updater, state.get("model_ema"), recorder=recorder)
        self.compile_clock = CompileClock()
        self.engine.meters.sums.restart(self.position.sums)
        self.saver = Saver(task, world, self.engine, self.position, self.folder, self.lr)
        self.saver.wandb_run = own.get("wandb")
        self._open_outputs(notes)

    def _open_outputs(self, notes: list[str]) -> None:
        o, r, p = self.config.optim, self.config.run, self.position
        own, flags = self.task.state(), self.task.run.flat()
        writes = self.folder if self.world.is_main else None
        # What an earlier run got done is what a kill goes back to, until the start of this one is on the disk.
        past = self.world.any(writes is not None and open_folder(writes, flags, p))
        if past:
            notes += self.saver.save(f"resume-{p.epoch}-{p.step}.pth")
        if writes and "best" in own and (past or own["best"] is None):
            notes += ckpt.set_best_aside(writes, own["best"])
        self.total_updates = o.epochs * self.updates_per_epoch
        if r.max_steps:
            self.total_updates = min(self.total_updates, r.max_steps)
        where, rows = (p.epoch, p.update, p.epoch + p.step / len(self.stream)), self.engine.meters.rows
        self.log = RunLog(r, flags, self.world, self.task.tags, self.total_updates, where, rows, self.saver.wandb_run)
        self.engine.captured.say = self.log.say
        if self.log.wandb:
            self.saver.wandb_run = self.log.wandb.identity
        for line in [*notes, *describe(self.task, self.stream, self.world, self.lr, self.engine.captured.reason)]:
            self.log.say(line)

    # ---- the loop

    def run(self) -> int:
        """Train to the end, to --max_steps, or to a signal; returns the exit status (0, 1 diverged, 130 Ctrl-C)."""
        self.compile_clock.start()
        with StopSignals() as stop, self.engine.captured.context():
            self.stream.interrupted = lambda: stop.received is not None
            most, p = self.config.run.max_steps, self.position
            # The run was stopped between an epoch's last update and its end.
            unmeasured = p.step == len(self.stream)
            reason = "max_steps" if most and p.update >= most and not unmeasured else None
            while reason is None and self.position.epoch < self.config.optim.epochs:
                reason = self._train_epoch(stop)
        return end_status(reason, stop.received, self.position, self.folder, self.log.say)

    def _train_epoch(self, stop: StopSignals) -> str | None:
        """One epoch from the current position; returns why the run ends, or None to go on."""
        o, p, device = self.config.optim, self.position, self.world.device
        # Gradients of an epoch's last micro-steps, too few for an update, are dropped.
        self.engine.updater.optimizer.zero_grad(set_to_none=True)
        self.task.start_epoch(p.epoch)
        self.engine.meters.sums.restart(p.sums)
        batches = prefetch(self.stream.epoch(p.epoch, p.step), device, self.engine.place)
        batch = output = None
        lr, waited = 0.0, 0.0
        for step in range(p.step, len(self.stream)):
            first, last = step % o.accum_iter == 0, (step + 1) % o.accum_iter == 0
            if first:
                # Once per update and by fractions of an epoch, as in MAE.
                lr = self._set_learning_rate(p.epoch + step / len(self.stream))
            try:
                started = time.perf_counter()
                with stage("data"):
                    batch = next(batches)
                waited += time.perf_counter() - started
                # Free the last step's tensors before the next step needs the memory.
                output = None
                output = self.engine.advance(*batch, p.epoch, step, p.update + 1 if last else None, first)
            except Exception as error:
                batch = output = None
                return self._rescue(error, stop)
            p.step = step + 1
            if last:
                self._after_update(lr, waited)
                waited = 0.0
                if reason := self._save_or_stop(stop, batch, output):
                    return reason
        return self._end_epoch(stop, batch, output)

    def _set_learning_rate(self, epoch: float) -> float:
        lr = scheduled_rate(epoch, self.lr, self.config.optim)
        self.engine.updater.set_learning_rate(lr)
        return lr

    def _after_update(self, lr: float, waited: float) -> None:
        o, p, clock = self.config.optim, self.position, self.compile_clock
        p.update += 1
        if clock.count and p.update == self.first_update:
            self.log.say(f"compiled {clock.count} functions in {clock.seconds:.0f} s")
        epoch = p.epoch + (p.step - 1) / len(self.stream)
        self.log.add_update(p.update, epoch, lr, o.batch_size * o.accum_iter, waited)

    def _save_or_stop(self, stop: StopSignals, batch: Batch, output: Output) -> str | None:
        """After an update: logs, resume points, and the reasons to end."""
        p, ends = self.position, self._stops(stop)
        log, resume_point, reason = due(self.config.run, p, len(self.stream), self.first_update, ends)
        if log:
            self.log.flush(wait=resume_point or reason is not None)
            # Every rank has the same count, so that all of them end.
            if self.log.skipped_in_a_row >= self.config.optim.max_bad_steps:
                self.log.say(self.saver.save_failure(batch, output))
                return "diverged"
        if resume_point:
            self.saver.save(f"resume-{p.epoch}-{p.step}.pth", batch, output)
        return reason

    def _stops(self, stop: StopSignals) -> bool:
        """Whether a signal asks any process to end."""
        return self.world.any(stop.received is not None)

    def _end_epoch(self, stop: StopSignals, batch: Batch | None, output: Output | None) -> str | None:
        """Measure, log and save after an epoch's last micro-step; returns why the run ends, or None to go on.

        batch, output   of the last micro-step; None if an earlier run did them all
        """
        o, r, p = self.config.optim, self.config.run, self.position
        self.log.flush(wait=True)
        measured = self._measure(stop, batch, output)
        # The saved position is the end of this epoch: the run that resumes measures it.
        if measured is None:
            return "signal"
        self._log_epoch(measured)
        epoch = p.epoch
        # Before best.pth is written too: a run that resumes from it begins the next epoch.
        p.epoch, p.step, p.sums = epoch + 1, 0, {}
        if measured.is_best:
            self.saver.save(ckpt.BEST_FILE, batch, output)
        ends, enough = self._stops(stop), r.max_steps and p.update >= r.max_steps
        if self.task.keeps(epoch) or p.epoch == o.epochs:
            self.saver.save(f"checkpoint-{epoch}.pth", batch, output)
        elif ends or enough or (r.checkpoint_steps and p.update % r.checkpoint_steps == 0):
            self.saver.save(f"resume-{p.epoch}-0.pth", batch, output)
        if p.epoch == o.epochs:
            return None
        return "signal" if ends else "max_steps" if enough else None

    def _measure(self, stop: StopSignals, batch: Batch | None, output: Output | None) -> Measured | None:
        """The task's measurement; None if a signal interrupts it.  If it is not finished, a resume point is saved before it."""
        p = self.position
        point = f"resume-{p.epoch}-{len(self.stream)}.pth"
        with self.log.paused():
            try:
                measured = self.task.end_epoch(self.engine, p.epoch, lambda: stop.received is not None)
            # Raised on every rank.
            except DataError:
                self.saver.save(point, batch, output)
                raise
        if measured is None:
            self.saver.save(point, batch, output)
        return measured

    def _log_epoch(self, measured: Measured) -> None:
        s, updater = self.engine.meters.sums.means(self.world), self.engine.updater
        row = {
            "train_lr": s["lr"] / s["micro_steps"],
            "train_loss": s["loss"] / s["finite"] if s["finite"] else float("nan"),
            **self.task.epoch_row(self.position.epoch, s, measured),
            "grad_norm": s["grad_norm"] / max(s["updates"], 1),
            "images_per_s": self.log.epoch_rate(),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "skipped_steps": int(updater.counters[0]),
            "bad_files": self.world.total(len(self.stream.bad_files)),
        }
        self.log.add_epoch(row)

    def _rescue(self, error: Exception, stop: StopSignals) -> str:
        """After an error between two updates: save if that is possible; raises it unless a signal ends the run anyway."""
        p = self.position

        def save() -> None:
            self.engine.updater.optimizer.zero_grad(set_to_none=True)
            self.log.flush()
            self.saver.save(f"resume-{p.epoch}-{p.step}.pth")

        # All processes would have to save, and no checkpoint holds the gradients of an update's first micro-steps.
        possible = self.folder and self.world.size == 1 and p.step % self.config.optim.accum_iter == 0
        rescue(error, bool(possible and not self.engine.updating and p.update >= self.first_update), save, self.log.say)
        if isinstance(error, NoBatchError) and stop.received is not None:
            return "signal"
        raise error

    def close(self) -> None:
        """End the data workers and close the logs."""
        self.compile_clock.stop()
        self.stream.close()
        self.log.close()
