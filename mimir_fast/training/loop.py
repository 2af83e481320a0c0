"""The pre-training loop around step.py: schedule, accumulation, logs, checkpoints, signals."""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.checkpoints import folder as ckpt
from mimir_fast.checkpoints.run_state import Position, checkpoint_state, due, end_status, open_folder, take_up
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.data import prefetch, to_float
from mimir_fast.report.samples import save_samples
from mimir_fast.training.compilation import CompileClock
from mimir_fast.training.distributed import World
from mimir_fast.training.logs import RunLog, peak_memory_gib
from mimir_fast.training.optimizer import Updater, build_optimizer, learning_rate, set_learning_rate
from mimir_fast.training.precision import AUTOCAST
from mimir_fast.training.pretrain_step import StepOutput, draw_noise, pretrain_step, step_seed
from mimir_fast.training.pretraining import (
    build_attack,
    build_computation,
    build_data,
    build_model,
    describe,
    peak_learning_rate,
    penalty_name,
)
from mimir_fast.training.signals import StopSignals
from mimir_fast.training.stages import stage

CHECKPOINT_EVERY = 20  # epochs, the original's cadence
EPOCH_SUMS = ("loss", "finite", "mi", "mi_used", "grad_norm", "updates", "micro_steps", "lr")


class Trainer:
    """One run: builds every object from the configuration (raises ValueError where it does not fit), then `run()`."""

    def __init__(self, config: PretrainConfig, world: World, notes: list[str]):
        self.config, self.world = config, world
        self.stream = build_data(config, world)
        self.constants = (self.stream.mean, self.stream.std) if config.data.use_normalize else (None, None)
        self.updates_per_epoch = len(self.stream) // config.optim.accum_iter
        self.model = build_model(config, world.device)
        self.attack = build_attack(config, self.stream, world.device)
        self.penalty = penalty_name(config)
        self.lr = peak_learning_rate(config, world)
        optimizer = build_optimizer(self.model, self.lr, config.optim.weight_decay)
        self.updater = Updater(optimizer, world.device, config.compute.precision == "fp16")
        self.generator = torch.Generator(world.device)
        self.skipped_penalties = torch.zeros((), dtype=torch.float64, device=world.device)
        self.position = Position(config.optim.start_epoch, update=config.optim.start_epoch * self.updates_per_epoch)
        self.folder = Path(config.run.output_dir) if config.run.output_dir else None
        notes = notes + self._resume()
        self.first_update = self.position.update + 1
        self.computation = build_computation(config, world, self.model, self.updater)
        self.compile_clock = CompileClock()
        self._open_outputs(notes)

    def _open_outputs(self, notes: list[str]) -> None:
        o, r, p = self.config.optim, self.config.run, self.position
        if self.folder and self.world.is_main:
            notes = notes + open_folder(self.folder, self.config.flat(), p)
        self.total_updates = o.epochs * self.updates_per_epoch
        if r.max_steps:
            self.total_updates = min(self.total_updates, r.max_steps)
        x = int(1000 * (p.epoch + p.step / len(self.stream)))
        where = (p.epoch, p.update, x)
        tags = {"train_loss": "loss", "lr": "lr"} | ({"mi": "mi"} if self.penalty else {})
        self.log = RunLog(r, self.config.flat(), self.world, tags, self.total_updates, where)
        for line in [*notes, *describe(self.config, self.world, self.stream, self.model, self.lr)]:
            self.log.say(line)

    # ---- the loop

    def run(self) -> int:
        """Train to the end, to --max_steps, or to a signal; returns the exit status (0, 1 diverged, 130 Ctrl-C)."""
        self.compile_clock.start()
        with StopSignals() as stop:
            enough = self.config.run.max_steps and self.position.update >= self.config.run.max_steps
            reason = "max_steps" if enough else None
            while reason is None and self.position.epoch < self.config.optim.epochs:
                reason = self._train_epoch(stop)
        return end_status(reason, stop.received, self.position, self.folder, self.log.say)

    def _train_epoch(self, stop: StopSignals) -> str | None:
        """One epoch from the current position; returns why the run ends, or None to go on."""
        o, p = self.config.optim, self.position
        self.updater.optimizer.zero_grad(set_to_none=True)  # gradients of an incomplete last group are dropped
        sums = torch.tensor(
            [p.sums.get(name, 0.0) for name in EPOCH_SUMS], dtype=torch.float64, device=self.world.device
        )
        batches = prefetch(self.stream.epoch(p.epoch, p.step), self.world.device)
        lr, waited = 0.0, 0.0
        for step in range(p.step, len(self.stream)):
            if step % o.accum_iter == 0:
                where = p.epoch + step / len(self.stream)
                lr = learning_rate(where, self.lr, o.min_lr, o.warmup_epochs, o.epochs)
                set_learning_rate(self.updater.optimizer, lr)
            started = time.perf_counter()
            with stage("data"):
                images_u8, _ = next(batches)
            waited += time.perf_counter() - started
            updates = (step + 1) % o.accum_iter == 0
            images = output = None  # let go of the last step's before the next one needs the room
            images, output = self._micro_step(images_u8, step, updates)
            grad_norm = self.updater.update() if updates else None
            sums += self._terms(output, grad_norm, lr)
            p.step = step + 1
            if updates:
                self._after_update(output, grad_norm, lr, waited)
                waited = 0.0
                if reason := self._save_or_stop(stop, images_u8, images, output, sums):
                    return reason
        return self._end_epoch(stop, images, output, sums)

    def _micro_step(self, images_u8: Tensor, step: int, updates: bool) -> tuple[Tensor, StepOutput]:
        c, device = self.config, self.world.device
        with stage("prepare"):
            images = to_float(images_u8, *self.constants)
            self.generator.manual_seed(step_seed(c.run.seed, self.world.rank, self.position.epoch, step))
            noise = draw_noise(self.generator, len(images), self.model.num_patches, self.attack)
        dtype = AUTOCAST[c.compute.precision]
        computation = self.computation
        # 16-bit gradients are averaged over ranks before they are added up in fp32, so never held back
        held = self.world.size > 1 and not updates and not self.updater.compute
        hold_gradients = computation.objective.no_sync() if held else nullcontext()
        with hold_gradients:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                objective, attacked, functions = computation[:3]
                output = pretrain_step(objective, attacked, images, noise, self.attack, functions)
            self.updater.backward(output.loss, c.optim.accum_iter)
        self.skipped_penalties += ~output.penalty_used
        return images, output

    def _terms(self, output: StepOutput, grad_norm: Tensor | None, lr: float) -> Tensor:
        """This micro-step's contribution to the epoch's sums, in the order of EPOCH_SUMS; stays on the device."""
        loss, finite = output.loss.detach(), output.loss.isfinite()
        norm = torch.zeros_like(loss) if grad_norm is None else torch.where(grad_norm.isfinite(), grad_norm, 0)
        one = torch.ones_like(loss)
        mi = torch.where(output.penalty_used, output.mi, 0)
        terms = (
            torch.where(finite, loss, 0),
            finite,
            mi,
            output.penalty_used,
            norm,
            one * (grad_norm is not None),
            one,
            lr * one,
        )
        return torch.stack([term.double() for term in terms])

    def _after_update(self, output: StepOutput, grad_norm: Tensor, lr: float, waited: float) -> None:
        o, p = self.config.optim, self.position
        p.update += 1
        clock = self.compile_clock
        if clock.count and p.update == self.first_update:
            self.log.say(f"compiled {clock.count} functions in {clock.seconds:.0f} s")
        scalars = {
            "loss": output.loss,
            "recon": output.recon,
            "mi": output.mi if self.penalty else torch.full_like(output.mi, torch.nan),
            "grad_norm": grad_norm,
            "skipped_penalties": self.skipped_penalties * self.world.size,  # the mean over ranks is taken later
            "skipped_steps": self.updater.counters[0],
        }
        epoch = p.epoch + (p.step - 1) / len(self.stream)
        self.log.add_update(p.update, epoch, lr, scalars, o.batch_size * o.accum_iter, waited)

    def _save_or_stop(self, stop, images_u8, images, output, sums) -> str | None:
        """After an update: logs, resume points, and the reasons to end."""
        p, ends = self.position, self.world.any(stop.received is not None)
        log, resume_point, reason = due(self.config.run, p, len(self.stream), self.first_update, ends)
        if log:
            self.log.flush()
            if int(self.updater.counters[2]) >= self.config.optim.max_bad_steps:  # every rank counts alike
                self._save_failure(images_u8, images, output, sums)
                return "diverged"
        if resume_point:
            self._save(f"resume-{p.epoch}-{p.step}.pth", images, output, sums)
        return reason

    def _end_epoch(self, stop, images, output, sums) -> str | None:
        o, r, p = self.config.optim, self.config.run, self.position
        self.log.flush()
        self._log_epoch(sums)
        epoch = p.epoch
        p.epoch, p.step, p.sums = epoch + 1, 0, {}
        ends = self.world.any(stop.received is not None)
        enough = r.max_steps and p.update >= r.max_steps
        if epoch % CHECKPOINT_EVERY == 0 or p.epoch == o.epochs:
            self._save(f"checkpoint-{epoch}.pth", images, output, None)
        elif ends or enough or (r.checkpoint_steps and p.update % r.checkpoint_steps == 0):
            self._save(f"resume-{p.epoch}-0.pth", images, output, None)
        if p.epoch == o.epochs:
            return None
        return "signal" if ends else "max_steps" if enough else None

    def _log_epoch(self, sums: Tensor) -> None:
        s = dict(zip(EPOCH_SUMS, self.world.mean(sums).tolist()))
        row = {
            "train_lr": s["lr"] / s["micro_steps"],
            "train_loss": s["loss"] / s["finite"] if s["finite"] else float("nan"),
            "epoch": self.position.epoch,
            "mi": s["mi"] / s["mi_used"] if self.penalty and s["mi_used"] else None,
            "grad_norm": s["grad_norm"] / max(s["updates"], 1),
            "images_per_s": self.log.epoch_rate(),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "skipped_penalties": self.world.total(self.skipped_penalties),
            "skipped_steps": int(self.updater.counters[0]),
            "bad_files": self.world.total(len(self.stream.bad_files)),
        }
        self.log.add_epoch(row)

    # ---- state

    def _save(
        self, name: str, images: Tensor, output: StepOutput, sums: Tensor | None, extra: dict | None = None
    ) -> None:
        """Write a checkpoint on rank 0; every rank calls.  sums: the unfinished epoch's, None at an epoch's end."""
        own = {"skipped_penalties": self.world.total(self.skipped_penalties), "geometry": self._geometry()}
        states = self.computation.states() if self.folder else ()
        if sums is not None:
            self.position.sums = dict(zip(EPOCH_SUMS, self.world.mean(sums).tolist()))
        if self.folder and self.world.is_main:
            entries = (*states, self.updater, self.position, self.config, self.lr, self.stream.name)
            ckpt.save_checkpoint(self.folder / name, checkpoint_state(*entries, own) | (extra or {}))
            ckpt.clean_folder(self.folder)
            where = {"epoch": self.position.epoch, "update": self.position.update, "eps_255": self.config.attack.eps}
            patches = (self.config.model.patch_size, self.config.model.norm_pix_loss)
            save_samples(self.folder / "samples.npz", images, output, *patches, *self.constants, where)
        self.world.barrier()

    def _save_failure(self, images_u8: Tensor, images: Tensor, output: StepOutput, sums: Tensor) -> None:
        p = self.position
        name = f"failed-{p.epoch}-{p.step}.pth"
        batch = {"images": images_u8.cpu(), "adv": output.adv.cpu(), "ids_removed": output.ids_removed.cpu()}
        self._save(name, images, output, sums, {"batch": batch})
        self.log.say(
            f"error: {self.config.optim.max_bad_steps} updates in a row (max_bad_steps) had a non-finite loss or gradient, "
            f"up to epoch {p.epoch}, micro-step {p.step}; the parameters are those before them. State and last batch: "
            f"{self.folder / name if self.folder else 'not saved, no output_dir'}; try a lower --lr, or --precision fp32"
        )

    def _geometry(self) -> list[int]:
        """What a position inside an epoch depends on."""
        o = self.config.optim
        return [self.world.size, o.batch_size, o.accum_iter, len(self.stream), self.config.run.seed]

    def _resume(self) -> list[str]:
        """Continue from --resume; returns lines to print."""
        notes: list[str] = []
        r, lengths = self.config.run, (self._geometry(), self.updates_per_epoch)
        entries = (self.model, self.updater, self.position)
        self.position, _, own = take_up(r.resume, self.folder, self.world, *entries, *lengths, notes.append)
        if self.world.is_main:
            self.skipped_penalties += own.get("skipped_penalties", 0)
        return notes

    def close(self) -> None:
        """End the data workers and close the logs."""
        self.compile_clock.stop()
        self.stream.close()
        self.log.close()
