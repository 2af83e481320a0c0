"""What a run measures after its epochs, and which epoch was the best."""

from collections.abc import Callable

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.data import DataError, EvalStream
from mimir_fast.models import VisionTransformer
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import FP16_ATTACK_SCALE, AttackFunctions
from mimir_fast.training.finetuning import build_eval_data
from mimir_fast.training.precision import AUTOCAST
from mimir_fast.training.validation import Scores, build_validation_attack, validate


def criterion(config: FinetuneConfig) -> list:
    """What a best epoch is chosen by: attack, radius and held-out images."""
    v = config.validation
    return [v.val_attack, config.attack.eps, v.held_out]


def best_so_far(own: dict, config: FinetuneConfig, say: Callable[[str], None]) -> list[float] | None:
    """The best epoch of a checkpoint's own entry; None, and said so, if it was chosen by something else."""
    before, now = own.get("best_by", criterion(config)), criterion(config)
    if before == now or own.get("best") is None:
        return own.get("best")
    leak = "; images that were trained on are now held out" if now[2] > before[2] else ""
    words = [f"{attack} at eps {eps:g} on {count} held-out images" for attack, eps, count in (before, now)]
    say(f"resume: best.pth was chosen by {words[0]}, is now by {words[1]}: no epoch is the best so far{leak}")
    return None


class Rating:
    """Clean test accuracy, robust accuracy and the held-out images, each when it is due.

    model     what is rated: the running average, or the frozen twin of the trained model that the attack runs on
    functions the training attack's, plain or compiled
    best      [robust accuracy on the held-out images, clean accuracy on them, epoch] of the best epoch so far, or None
    is_best   whether the epoch rated last was it; without --val_attack clean accuracy decides
    """

    def __init__(
        self,
        config: FinetuneConfig,
        world: World,
        model: VisionTransformer,
        functions: AttackFunctions,
        best: list[float] | None,
    ):
        v = config.validation
        self.config, self.world, self.model, self.functions = config, world, model, functions
        self.best, self.is_best = best, False
        scale = FP16_ATTACK_SCALE if config.compute.precision == "fp16" else 1.0
        self.attack = build_validation_attack(v.val_attack, config.attack.eps, world.device, scale)
        tests = v.test_every or (self.attack and not v.held_out)
        self.test = self._test_images(config, world) if tests else None
        self.held_out = build_eval_data(config, world, "held_out") if v.held_out else None

    def rate(self, epoch: int, ends: Callable[[], bool]) -> dict | None:
        """Measure what is due after an epoch, the rest being None; returns None if a signal asks to end before that.

        test_loss, test_acc1, test_acc5, robust_acc1: test images; val_loss, val_acc1, val_robust_acc1: held-out ones.
        """
        self.is_best = False
        rated = dict.fromkeys(("test_loss", "test_acc1", "test_acc5"))
        robust = self._due(epoch, self.config.validation.val_every)
        attacks_test = robust and self.attack is not None and self.held_out is None
        if attacks_test or self._due(epoch, self.config.validation.test_every):
            scores = self._validate(self.test, attacks_test, ends)
            if scores is None:
                return None
            rated |= {"test_loss": scores.loss, "test_acc1": scores.acc1, "test_acc5": scores.acc5}
            rated |= {"robust_acc1": scores.robust_acc1} if attacks_test else {}
        if robust and self.held_out is not None:
            scores = self._validate(self.held_out, self.attack is not None, ends)
            if scores is None:
                return None
            rated |= {"val_loss": scores.loss, "val_acc1": scores.acc1, "val_robust_acc1": scores.robust_acc1}
            self._compare(scores, epoch)
        return rated

    def _test_images(self, config: FinetuneConfig, world: World) -> EvalStream:
        try:
            return build_eval_data(config, world, "val")
        except DataError as error:
            attacked = self.attack is not None and not config.validation.held_out
            needed = ", --val_attack on --held_out N images (or none)" if attacked else ""
            raise DataError(f"{error}; to train without test images: --test_every 0{needed}") from error

    def _due(self, epoch: int, every: int) -> bool:
        return bool(every) and ((epoch + 1) % every == 0 or epoch + 1 == self.config.optim.epochs)

    def _validate(self, images: EvalStream, attacked: bool, ends: Callable[[], bool]) -> Scores | None:
        c = self.config.compute
        attack, fill = self.attack if attacked else None, self.config.optim.batch_size if c.compile else 0
        return validate(self.model, images, self.world, AUTOCAST[c.precision], attack, ends, self.functions, fill)

    def _compare(self, scores: Scores, epoch: int) -> None:
        robust = scores.acc1 if scores.robust_acc1 is None else scores.robust_acc1
        if self.best is None or [robust, scores.acc1] > self.best[:2]:
            self.best, self.is_best = [robust, scores.acc1, float(epoch)], True
