"""The study's jobs: command lines of mimir-fast, in order, and what each of them waits for."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.study.plan import Arm, Candidate, Flags, Study
from examples.study.recipe import chosen, tried

# What every job of an arm waits for while the search is not finished.
RECIPE = "recipe"
MACHINE: Flags = {"device": "cpu", "num_workers": 0}
# Updates between two resume points: a kill costs at most about a minute.
SAVED: Flags = {"log_dir": "", "resume": "auto", "checkpoint_steps": 100}
# AutoAttack's passes of an image that no attack breaks, see mimir_fast/evaluate/autoattack.py.
AUTOATTACK_PASSES = 9700
# Of the images, for estimates of time: those that are classified rightly, and that stay so under attack.
RIGHT, ROBUST = 0.4, 0.25


class Costs(NamedTuple):
    """CPU seconds of one core, from which the time left is estimated until the study's own rows tell.

    tuned         an image of fine-tuning, attack included
    pretrained    an image of pre-training without the attack; attacked: what an attack step adds to it
    attack_step   an image in a step of an evaluation's attack; passed: one forward or backward pass of it
    analyzed      a checkpoint; started: what every job begins with
    """

    tuned: float = 0.0048
    pretrained: float = 0.0028
    attacked: float = 0.0028
    attack_step: float = 0.002
    passed: float = 0.001
    analyzed: float = 30.0
    started: float = 3.0


COSTS = Costs()


class Job(NamedTuple):
    """A command of mimir-fast.

    part      search, compared, autoattack, varied or analysis
    what      pretrain, finetune, accuracy, autoattack or analysis
    verb      of mimir-fast, or pretrain_hidden; with its words
    product   a file that exists when it is done
    needs     names of jobs
    seconds   of one core, an estimate
    """

    part: str
    arm: str
    seed: int
    what: str
    verb: str
    words: list[str]
    product: Path
    needs: tuple[str, ...]
    seconds: float

    @property
    def name(self) -> str:
        """ARM/SEED/WHAT, of which each is once in the study."""
        return f"{self.arm}/{self.seed}/{self.what}"


def words(flags: Flags) -> list[str]:
    """Flags as on a command line; True: a switch."""
    return [word for name, value in flags.items() for word in _word(name, value)]


def _word(name: str, value: str | int | float | bool) -> tuple[str, ...]:
    return (f"--{name}",) if value is True else (f"--{name}", str(value))


class Planner:
    """Lays out the jobs of a study in a folder; recipe: the chosen candidate, None while there is none."""

    def __init__(self, study: Study, root: Path, recipe: Candidate | None):
        self.study, self.root = study, root
        self.recipe, self.needs = recipe or study.candidates[0], () if recipe else (RECIPE,)

    def folder(self, arm: str, seed: int, what: str) -> Path:
        return self.root / "runs" / arm / str(seed) / what

    def data(self) -> Flags:
        return {**self.study.data, "data_root": str(self.root / "data")}

    def pretraining(self, part: str, arm: Arm, seed: int) -> Job:
        study = self.study
        flags = {**self.data(), **study.pretraining, **(arm.pretraining or {})}
        folder, epochs = self.folder(arm.name, seed, "pretrain"), int(flags["epochs"])
        steps = int(flags.get("steps", 1)) if flags.get("attack") == "pgd_mae" else 0
        # All training images: without labels none needs to be held out.
        images = (study.train_images + study.held_out) * epochs
        seconds = COSTS.started + images * (COSTS.pretrained + COSTS.attacked * steps)
        line = words({**flags, **MACHINE, **SAVED, "seed": seed, "output_dir": str(folder)})
        verb = "pretrain_hidden" if arm.hidden else "pretrain"
        return Job(part, arm.name, seed, "pretrain", verb, line, _last(folder, epochs), (), seconds)

    def fine_tuning(self, part: str, arm: Arm, recipe: Candidate, seed: int, needs: tuple[str, ...]) -> Job:
        """needs: beside the arm's pre-training."""
        study = self.study
        flags = {**self.data(), **study.fine_tuning, **recipe.flags, "eps": recipe.eps, "alpha": 1.25 * recipe.eps}
        flags |= {"held_out": study.held_out, "test_every": 0, "epochs": int(flags["epochs"]) + arm.epochs}
        # The held-out images choose the recipe, by an evaluation; the last epoch is always validated.
        flags |= {"val_every": flags["epochs"]}
        if arm.pretraining is not None:
            encoder = self.pretraining(part, arm, seed)
            flags, needs = {**flags, "finetune": str(encoder.product)}, (encoder.name, *needs)
        folder, epochs = self.folder(arm.name, seed, "finetune"), int(flags["epochs"])
        seconds = COSTS.started + study.train_images * epochs * COSTS.tuned
        line = words({**flags, **MACHINE, **SAVED, "seed": seed, "output_dir": str(folder)})
        return Job(part, arm.name, seed, "finetune", "finetune", line, _last(folder, epochs), needs, seconds)

    def evaluation(self, tuned: Job, what: str, eps: float, flags: Flags, seconds: float) -> Job:
        """An evaluation of what a fine-tuning makes; flags: attacks and images."""
        folder = self.folder(tuned.arm, tuned.seed, what)
        common: Flags = {
            "checkpoint": str(tuned.product),
            "data_root": str(self.root / "data"),
            "eps": eps,
            "alpha": eps / 4,
        }
        line = words({**common, **flags, **MACHINE, "seed": tuned.seed, "output_dir": str(folder)})
        product, needs = folder / "results.json", (tuned.name,)
        return tuned._replace(what=what, verb="evaluate", words=line, product=product, needs=needs, seconds=seconds)

    def accuracy(self, tuned: Job, eps: float, flags: Flags | None = None) -> Job:
        """Clean and PGD-20 accuracy, on test images unless the flags name others."""
        images = self.study.test_images
        seconds = COSTS.started + images * (COSTS.passed + RIGHT * 20 * COSTS.attack_step)
        chosen_images = {"num_images": images} if flags is None else flags
        return self.evaluation(tuned, "accuracy", eps, {"attacks": "clean,pgd-20", **chosen_images}, seconds)

    def autoattack(self, tuned: Job) -> Job:
        """AutoAttack, and PGD-20 on the same images."""
        images = self.study.aa_images
        seconds = COSTS.started + images * ROBUST * AUTOATTACK_PASSES * COSTS.passed
        flags: Flags = {"attacks": "clean,pgd-20,aa", "num_images": images}
        return self.evaluation(tuned, "autoattack", self.recipe.eps, flags, seconds)._replace(part="autoattack")

    def analysis(self, arm: Arm, tuned: Job) -> Job:
        """The information of all checkpoints of the pre-training and of the last one of the fine-tuning, all at one radius."""
        folder = self.folder(arm.name, tuned.seed, "analysis")
        encoders = [] if arm.pretraining is None else [str(self.pretraining("", arm, tuned.seed).product.parent)]
        # Several words after one flag.
        line = ["--checkpoint", *encoders, str(tuned.product)]
        flags: Flags = {"data_root": str(self.root / "data"), "num_images": self.study.analyzed, "split": "val"}
        line += words({**flags, "eps": self.recipe.eps, "device": "cpu", "seed": tuned.seed, "output_dir": str(folder)})
        seconds = COSTS.started + COSTS.analyzed * (1 + 2 * len(encoders))
        product, needs = folder / "analysis.json", (tuned.name,)
        return Job("analysis", arm.name, tuned.seed, "analysis", "analyze", line, product, needs, seconds)

    def search(self, candidates: list[Candidate]) -> Iterator[Job]:
        """Every candidate from scratch, judged by the held-out images."""
        held_out: Flags = {"split": "held_out", "held_out": self.study.held_out}
        for candidate in candidates:
            tuned = self.fine_tuning("search", Arm(candidate.name, "", None), candidate, self.study.search_seed, ())
            yield from (tuned, self.accuracy(tuned, candidate.eps, held_out))

    def trained(self, part: str, arms: tuple[Arm, ...], seeds: int) -> Iterator[Job]:
        """Training and evaluation of arms, seed after seed: what is there after a stop can be compared."""
        for seed in range(seeds):
            for arm in arms:
                tuned = self.fine_tuning(part, arm, self.recipe, seed, self.needs)
                if arm.pretraining is not None:
                    yield self.pretraining(part, arm, seed)
                yield from (tuned, self.accuracy(tuned, self.recipe.eps))

    def closer(self) -> Iterator[Job]:
        """AutoAttack on the compared arms, then the analysis."""
        arms, seeds = self.study.compared
        pairs = [(arm, seed) for seed in range(seeds) for arm in arms]
        tuned = [self.fine_tuning("compared", arm, self.recipe, seed, self.needs) for arm, seed in pairs]
        if self.study.aa_images:
            yield from map(self.autoattack, tuned)
        if self.study.analyzed:
            yield from (self.analysis(arm, job) for (arm, _), job in zip(pairs, tuned))


def plan(study: Study, root: Path, rows: list[dict], recipe: Candidate | None = None) -> list[Job]:
    """All jobs in the order in which they are begun.

    rows     the results so far, which decide how far the search goes and what it finds
    recipe   a candidate; None: search for it
    Raises NoRecipeError if the search is finished and no candidate is enough.
    """
    found = recipe or chosen(study, rows)
    planner = Planner(study, root, found)
    jobs = [] if recipe else list(planner.search(tried(study, rows)))
    jobs += planner.trained("compared", *study.compared)
    jobs += planner.trained("varied", *study.varied)
    return jobs + list(planner.closer())


def _last(folder: Path, epochs: int) -> Path:
    return folder / f"checkpoint-{epochs - 1}.pth"
