"""The fine-tuning loop around step.py: schedules, accumulation, validation, logs, checkpoints, signals."""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.checkpoints import folder as ckpt
from mimir_fast.checkpoints.run_state import Position, checkpoint_state, due, end_status, open_folder, take_up
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.data import DataError, mix, mixing_seed, prefetch, to_float
from mimir_fast.training.compilation import CompileClock
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import build_computation, compile_rated
from mimir_fast.training.finetune_step import FinetuneOutput, draw_noise, finetune_step
from mimir_fast.training.finetuning import (
    build_attack,
    build_criterion,
    build_data,
    build_mixing,
    build_model,
    describe,
    information_weights,
    start_from_pretrained,
)
from mimir_fast.training.layer_decay import build_optimizer
from mimir_fast.training.logs import RunLog, peak_memory_gib
from mimir_fast.training.moving_average import RunningAverage, take_up_average
from mimir_fast.training.optimizer import Updater, learning_rate, set_learning_rate
from mimir_fast.training.precision import AUTOCAST
from mimir_fast.training.pretrain_step import step_seed
from mimir_fast.training.pretraining import peak_learning_rate
from mimir_fast.training.signals import StopSignals
from mimir_fast.training.stages import stage
from mimir_fast.training.validator import Rating, best_so_far, criterion

CHECKPOINT_EVERY, CHECKPOINT_ALSO = 20, 49  # epochs, the original's cadence
EPOCH_SUMS = ("loss", "finite", "grad_norm", "updates", "micro_steps", "lr")
TAGS = {"loss": "loss", "lr": "lr"}  # the original's, per update
RATINGS = ("test_acc1", "test_acc5", "test_loss", "robust_acc1", "val_acc1", "val_robust_acc1", "val_loss")
EPOCH_TAGS = {f"perf/{name}": name for name in RATINGS}  # the original's three, and ours


class Trainer:
    """One run: builds every object from the configuration (raises ValueError where it does not fit), then `run()`."""

    def __init__(self, config: FinetuneConfig, world: World, notes: list[str]):
        self.world = world
        self.stream = build_data(config, world)
        self.config = config = config.updated({"nb_classes": self.stream.num_classes})
        o, r = config.optim, config.run
        self.updates_per_epoch = len(self.stream) // o.accum_iter
        self.model = build_model(config, self.stream, world.device)
        self.lr = peak_learning_rate(config, world)
        optimizer = build_optimizer(self.model, self.lr, o.weight_decay, o.layer_decay)
        self.updater = Updater(optimizer, world.device, config.compute.precision == "fp16", max_norm=o.clip_grad)
        self.generator = torch.Generator(world.device)
        self.position = Position(o.start_epoch, update=o.start_epoch * self.updates_per_epoch)
        self.folder = Path(r.output_dir) if r.output_dir else None
        notes = list(notes)
        entries = (self.model, self.updater, self.position, self._geometry(), self.updates_per_epoch)
        self.position, state, own = take_up(r.resume, self.folder, world, *entries, notes.append)
        if not state:
            start_from_pretrained(self.model, config, notes.append)
        self.first_update = self.position.update + 1
        self._start_epoch()
        self._build_computation(state, own, notes)
        self.compile_clock = CompileClock()
        self._open_outputs(notes)

    def _build_computation(self, state: dict, own: dict, notes: list[str]) -> None:
        """What a step runs, the running average, and what rates them; state, own: the resumed checkpoint's, empty without."""
        config, world, o = self.config, self.world, self.config.optim
        parts = (self.model, self.updater, self.attack, build_criterion(config))
        self.computation = build_computation(
            config.compute, world, *parts, information=information_weights(config), accum_iter=o.accum_iter
        )
        self.average = RunningAverage(self.model, o.model_ema_decay) if o.model_ema else None
        if state:
            take_up_average(self.average, state.get("model_ema"), notes.append)
        judged = self.average.module if self.average else self.computation.attacked
        if self.average:
            compile_rated(judged, config.compute)
        best = best_so_far(own, config, notes.append)
        self.rating = Rating(config, world, judged, self.computation.functions, best)

    def _open_outputs(self, notes: list[str]) -> None:
        o, r, p = self.config.optim, self.config.run, self.position
        if self.folder and self.world.is_main:
            notes += open_folder(self.folder, self.config.flat(), p)
            if self.rating.best is None:
                notes += ckpt.set_best_aside(self.folder)
        self.total_updates = o.epochs * self.updates_per_epoch
        if r.max_steps:
            self.total_updates = min(self.total_updates, r.max_steps)
        where = (p.epoch, p.update, int(1000 * (p.epoch + p.step / len(self.stream))))
        self.log = RunLog(r, self.config.flat(), self.world, TAGS, self.total_updates, where)
        for line in [*notes, *describe(self.config, self.world, self.stream, self.model, self.lr)]:
            self.log.say(line)

    # ---- the loop

    def run(self) -> int:
        """Train to the end, to --max_steps, or to a signal; returns the exit status (0, 1 diverged, 130 Ctrl-C)."""
        self.compile_clock.start()
        with StopSignals() as stop:
            most, p = self.config.run.max_steps, self.position
            unrated = p.step == len(self.stream)  # stopped between an epoch's last update and its validation
            reason = "max_steps" if most and p.update >= most and not unrated else None
            while reason is None and self.position.epoch < self.config.optim.epochs:
                reason = self._train_epoch(stop)
        return end_status(reason, stop.received, self.position, self.folder, self.log.say)

    def _train_epoch(self, stop: StopSignals) -> str | None:
        """One epoch from the current position; returns why the run ends, or None to go on."""
        o, p, device = self.config.optim, self.position, self.world.device
        self.updater.optimizer.zero_grad(set_to_none=True)  # gradients of an incomplete last group are dropped
        self._start_epoch()
        sums = torch.tensor([p.sums.get(name, 0.0) for name in EPOCH_SUMS], dtype=torch.float64, device=device)
        batches = prefetch(self.stream.epoch(p.epoch, p.step), device)
        lr, waited = 0.0, 0.0
        for step in range(p.step, len(self.stream)):
            if step % o.accum_iter == 0:
                where = p.epoch + step / len(self.stream)
                lr = learning_rate(where, self.lr, o.min_lr, o.warmup_epochs, o.epochs)
                set_learning_rate(self.updater.optimizer, lr)
            started = time.perf_counter()
            with stage("data"):
                batch = next(batches)
            waited += time.perf_counter() - started
            updates = (step + 1) % o.accum_iter == 0
            output = None  # let go of the last step's before the next one needs the room
            output = self._micro_step(*batch, step, updates)
            grad_norm = self.updater.update() if updates else None
            sums += self._terms(output, grad_norm, lr)
            p.step = step + 1
            if updates:
                self._after_update(output, grad_norm, lr, waited)
                waited = 0.0
                if reason := self._save_or_stop(stop, batch, output, sums):
                    return reason
        return self._end_epoch(stop, sums)

    def _start_epoch(self) -> None:
        """What depends on the number of the epoch."""
        epoch = self.position.epoch
        self.attack = build_attack(self.config, epoch, self.world.device)
        self.mixing = build_mixing(self.config, epoch)

    def _micro_step(self, images_u8: Tensor, labels: Tensor, step: int, updates: bool) -> FinetuneOutput:
        c, device, epoch = self.config, self.world.device, self.position.epoch
        with stage("prepare"):
            images, targets = to_float(images_u8), labels
            if self.mixing:
                images, targets = mix(
                    self.mixing, images, labels, mixing_seed(c.run.seed, self.world.rank, epoch, step)
                )
            self.generator.manual_seed(step_seed(c.run.seed, self.world.rank, epoch, step))
            noise = draw_noise(self.generator, self.model, images, self.attack)
        dtype = AUTOCAST[c.compute.precision]
        objective, attacked, functions, _ = self.computation
        # 16-bit gradients are averaged over ranks before they are added up in fp32, so never held back
        held = self.world.size > 1 and not updates and not self.updater.compute
        with objective.no_sync() if held else nullcontext():
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                output = finetune_step(objective, attacked, images, targets, noise, self.attack, functions)
            self.updater.backward(output.loss, c.optim.accum_iter)
        return output

    def _terms(self, output: FinetuneOutput, grad_norm: Tensor | None, lr: float) -> Tensor:
        """This micro-step's contribution to the epoch's sums, in the order of EPOCH_SUMS; stays on the device."""
        loss, finite = output.loss.detach(), output.loss.isfinite()
        norm = torch.zeros_like(loss) if grad_norm is None else torch.where(grad_norm.isfinite(), grad_norm, 0)
        one = torch.ones_like(loss)
        terms = (torch.where(finite, loss, 0), finite, norm, one * (grad_norm is not None), one, lr * one)
        return torch.stack([term.double() for term in terms])

    def _after_update(self, output: FinetuneOutput, grad_norm: Tensor, lr: float, waited: float) -> None:
        o, p, clock = self.config.optim, self.position, self.compile_clock
        p.update += 1
        if self.average:
            self.average.update(p.update)
        if clock.count and p.update == self.first_update:
            self.log.say(f"compiled {clock.count} functions in {clock.seconds:.0f} s")
        scalars = {"loss": output.loss, "grad_norm": grad_norm, "skipped_steps": self.updater.counters[0]}
        epoch = p.epoch + (p.step - 1) / len(self.stream)
        self.log.add_update(p.update, epoch, lr, scalars, o.batch_size * o.accum_iter, waited)

    def _save_or_stop(self, stop: StopSignals, batch, output: FinetuneOutput, sums: Tensor) -> str | None:
        """After an update: logs, resume points, and the reasons to end."""
        p, ends = self.position, self.world.any(stop.received is not None)
        log, resume_point, reason = due(self.config.run, p, len(self.stream), self.first_update, ends)
        if log:
            self.log.flush()
            if int(self.updater.counters[2]) >= self.config.optim.max_bad_steps:  # every rank counts alike
                self._save_failure(batch, output, sums)
                return "diverged"
        if resume_point:
            self._save(f"resume-{p.epoch}-{p.step}.pth", sums)
        return reason

    def _end_epoch(self, stop: StopSignals, sums: Tensor) -> str | None:
        """Validate, log and save.  Interrupted validations are repeated: the saved position is the end of this epoch."""
        o, r, p = self.config.optim, self.config.run, self.position
        self.log.flush()
        unrated = f"resume-{p.epoch}-{len(self.stream)}.pth"
        with self.log.paused():
            try:
                rated = self.rating.rate(p.epoch, lambda: stop.received is not None)
            except DataError:  # on every rank
                self._save(unrated, sums)
                raise
        if rated is None:
            self._save(unrated, sums)
            return "signal"
        self._log_epoch(sums, rated)
        epoch = p.epoch
        p.epoch, p.step, p.sums = epoch + 1, 0, {}
        if self.rating.is_best:
            self._save(ckpt.BEST_FILE, None)
        ends = self.world.any(stop.received is not None)
        enough = r.max_steps and p.update >= r.max_steps
        if epoch % CHECKPOINT_EVERY == 0 or epoch == CHECKPOINT_ALSO or p.epoch == o.epochs:
            self._save(f"checkpoint-{epoch}.pth", None)
        elif ends or enough or (r.checkpoint_steps and p.update % r.checkpoint_steps == 0):
            self._save(f"resume-{p.epoch}-0.pth", None)
        if p.epoch == o.epochs:
            return None
        return "signal" if ends else "max_steps" if enough else None

    def _log_epoch(self, sums: Tensor, rated: dict) -> None:
        s = dict(zip(EPOCH_SUMS, self.world.mean(sums).tolist()))
        row = {
            "train_lr": s["lr"] / s["micro_steps"],
            "train_loss": s["loss"] / s["finite"] if s["finite"] else float("nan"),
            **{name: rated.pop(name) for name in ("test_loss", "test_acc1", "test_acc5")},
            "epoch": self.position.epoch,
            "n_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            **rated,
            "grad_norm": s["grad_norm"] / max(s["updates"], 1),
            "images_per_s": self.log.epoch_rate(),
            "peak_memory_gib": peak_memory_gib(self.world.device),
            "skipped_steps": int(self.updater.counters[0]),
            "bad_files": self.world.total(len(self.stream.bad_files)),
        }
        self.log.add_epoch(row, EPOCH_TAGS)

    # ---- state

    def _save(self, name: str, sums: Tensor | None, extra: dict | None = None) -> None:
        """Write a checkpoint on rank 0; every rank calls.  sums: the unfinished epoch's, None at an epoch's end."""
        if sums is not None:
            self.position.sums = dict(zip(EPOCH_SUMS, self.world.mean(sums).tolist()))
        if self.folder and self.world.is_main:
            own = {"geometry": self._geometry(), "best": self.rating.best, "best_by": criterion(self.config)}
            entries = (*self.computation.states(), self.updater, self.position, self.config, self.lr, self.stream.name)
            state = checkpoint_state(*entries, own) | (extra or {})
            if self.average:
                state["model_ema"] = self.average.state_dict()
            ckpt.save_checkpoint(self.folder / name, state)
            ckpt.clean_folder(self.folder)
        self.world.barrier()

    def _save_failure(self, batch: tuple[Tensor, Tensor], output: FinetuneOutput, sums: Tensor) -> None:
        p = self.position
        name = f"failed-{p.epoch}-{p.step}.pth"
        last = {"images": batch[0].cpu(), "labels": batch[1].cpu(), "adv": output.adv.cpu()}
        self._save(name, sums, {"batch": last})
        self.log.say(
            f"error: {self.config.optim.max_bad_steps} updates in a row (max_bad_steps) had a non-finite loss or gradient, "
            f"up to epoch {p.epoch}, micro-step {p.step}; the parameters are those before them. State and last batch: "
            f"{self.folder / name if self.folder else 'not saved, no output_dir'}; try a lower --lr, or --precision fp32"
        )

    def _geometry(self) -> list[int]:
        """What a position inside an epoch depends on."""
        o = self.config.optim
        return [self.world.size, o.batch_size, o.accum_iter, len(self.stream), self.config.run.seed]

    def close(self) -> None:
        """End the data workers and close the logs."""
        self.compile_clock.stop()
        self.stream.close()
        self.log.close()
