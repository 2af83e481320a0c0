"""Validation of a fine-tuning after its epochs, and which epoch was the best."""

from collections.abc import Callable
from functools import partial

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.resolve import Run
from mimir_fast.data import DataError, EvalStream, eval_batches
from mimir_fast.data.cache.staging import staged_if_cached
from mimir_fast.models import Classifier
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import FP16_ATTACK_SCALE, ClassifierAttackFunctions
from mimir_fast.training.step_graph import Recorder
from mimir_fast.training.validation import Scores, build_validation_attack, validate


def criterion(config: FinetuneConfig) -> list:
    """What the best epoch is chosen by: attack, radius, and the number of held-out images or the list's file."""
    v = config.validation
    return [v.val_attack, config.attack.eps, v.val_list or v.held_out]


def best_so_far(own: dict, config: FinetuneConfig, say: Callable[[str], None]) -> list[float] | None:
    """The best epoch of a checkpoint's own entry; None, with a line printed, if it was chosen by another criterion."""
    before, now = own.get("best_by", criterion(config)), criterion(config)
    if before == now or own.get("best") is None:
        return own.get("best")
    counts = [images if isinstance(images, int) else 0 for *_, images in (before, now)]
    leak = "; images that were trained on are now held out" if counts[1] > counts[0] else ""
    words = [f"{attack} at eps {eps:g} on {_images(images)}" for attack, eps, images in (before, now)]
    say(f"resume: best.pth was chosen by {words[0]}, is now by {words[1]}: no epoch is the best so far{leak}")
    return None


def _images(images: int | str) -> str:
    return f"{images} held-out images" if isinstance(images, int) else f"the images of {images}"


def build_eval_data(config: FinetuneConfig, world: World, split: str, image_list: str = "") -> EvalStream:
    """This rank's share of the images of a split, val or held_out, or of a list of images of the split."""
    d = config.data
    return eval_batches(
        d.dataset,
        staged_if_cached(d.data_root, d.stage, "train" if split == "held_out" else split),
        config.model.input_size,
        config.optim.batch_size,
        split=split,
        image_list=image_list or None,
        held_out=config.validation.held_out,
        num_classes=config.model.nb_classes,
        use_edm=d.use_edm,
        rank=world.rank,
        world_size=world.size,
        num_workers=d.num_workers,
        eval_resize=config.validation.eval_resize,
        pin_memory=d.pin_mem and world.device.type == "cuda",
    )


class Validator:
    """Clean test accuracy, robust accuracy, and the images that the best epoch is chosen by, each in the epochs when due.

    The latter are held out from the training, or those of a list.

    best      [robust accuracy on these images, clean accuracy on them, epoch] of the best epoch so far, or None
    is_best   whether the epoch measured last was the best; without --val_attack clean accuracy decides
    """

    def __init__(self, run: Run[FinetuneConfig], world: World, best: list[float] | None):
        config, v = run.config, run.config.validation
        self.config, self.compute, self.world = config, run.compute, world
        self.best, self.is_best = best, False
        scale = FP16_ATTACK_SCALE if run.compute.scaled else 1.0
        self.attack = build_validation_attack(v.val_attack, config.attack.eps, world.device, scale)
        self.choosing: EvalStream | None = None
        if v.val_list:
            self.choosing = build_eval_data(config, world, "val", v.val_list)
        elif v.held_out:
            self.choosing = build_eval_data(config, world, "held_out")
        tests = v.test_every or (self.attack and self.choosing is None)
        self.test = self._test_images(config, world) if tests else None

    def rate(
        self,
        model: Classifier,
        functions: ClassifierAttackFunctions,
        epoch: int,
        ends: Callable[[], bool],
        recorder: Recorder | None = None,
        trained: Classifier | None = None,
    ) -> dict | None:
        """Measure what is due after an epoch; returns None if `ends` returns True before that.

        model       the running average, or the frozen twin of the trained model that the attack runs on
        functions   the training attack's, as they are or compiled
        recorder    what captures batches of one size; None: they run as they are
        trained     the twin of the trained model where `model` is its average, to measure on listed images as well
        The result has test_loss, test_acc1 and test_acc5 (None where they are not due), robust_acc1 if it was measured on the
        test images, and val_loss, val_acc1 and val_robust_acc1 of the images to choose by if they are due; of `trained` the
        same with model_ before their names.
        """
        self.is_best, rates = False, partial(self._validate, functions, ends, recorder)
        rated = dict.fromkeys(("test_loss", "test_acc1", "test_acc5"))
        robust = self._due(epoch, self.config.validation.val_every)
        attacks_test = robust and self.attack is not None and self.choosing is None
        tests = attacks_test or self._due(epoch, self.config.validation.test_every)
        if tests and self.test is not None:
            scores = rates(model, self.test, attacks_test)
            if scores is None:
                return None
            rated |= {"test_loss": scores.loss, "test_acc1": scores.acc1, "test_acc5": scores.acc5}
            rated |= {"robust_acc1": scores.robust_acc1} if attacks_test else {}
        if robust and self.choosing is not None:
            both = {"": model} | ({"model_": trained} if trained and self.config.validation.val_list else {})
            for prefix, one in both.items():
                scores = rates(one, self.choosing, self.attack is not None)
                if scores is None:
                    return None
                names = (f"{prefix}val_{name}" for name in ("loss", "acc1", "robust_acc1"))
                rated |= dict(zip(names, (scores.loss, scores.acc1, scores.robust_acc1)))
                if one is model:
                    chosen = scores
            self._compare(chosen, epoch)
        return rated

    def due(self, epoch: int) -> bool:
        """Whether anything is measured after an epoch."""
        v, every = self.config.validation, [self.config.validation.test_every]
        if self.attack is not None or self.choosing is not None:
            every.append(v.val_every)
        return any(self._due(epoch, epochs) for epochs in every)

    def _test_images(self, config: FinetuneConfig, world: World) -> EvalStream:
        try:
            return build_eval_data(config, world, "val")
        except DataError as error:
            attacked = self.attack is not None and self.choosing is None
            needed = ", --val_attack on --held_out N images (or none)" if attacked else ""
            raise DataError(f"{error}; to train without test images: --test_every 0{needed}") from error

    def _due(self, epoch: int, every: int) -> bool:
        return bool(every) and ((epoch + 1) % every == 0 or epoch + 1 == self.config.optim.epochs)

    def _validate(
        self,
        functions: ClassifierAttackFunctions,
        ends: Callable[[], bool],
        recorder: Recorder | None,
        model: Classifier,
        images: EvalStream,
        attacked: bool,
    ) -> Scores | None:
        attack = self.attack if attacked else None
        fill = self.config.optim.batch_size if self.compute.compile else 0
        return validate(model, images, self.world, self.compute.dtype, attack, ends, functions, fill, recorder)

    def _compare(self, scores: Scores, epoch: int) -> None:
        robust = scores.acc1 if scores.robust_acc1 is None else scores.robust_acc1
        if self.best is None or [robust, scores.acc1] > self.best[:2]:
            self.best, self.is_best = [robust, scores.acc1, float(epoch)], True
