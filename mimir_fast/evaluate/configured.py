"""Running an evaluation from its configuration (`mimir-fast evaluate`)."""

from pathlib import Path

from mimir_fast.attacks.named import parse_attacks
from mimir_fast.checkpoints.fetch import beside
from mimir_fast.checkpoints.trained_models import Trained, load_classifier, training_eps
from mimir_fast.config.evaluation import USUAL_EPS, EvaluateConfig
from mimir_fast.config.machine import prepare_machine
from mimir_fast.config.resolve import resolve_device
from mimir_fast.evaluate.entries import key_of, settings_of
from mimir_fast.evaluate.evaluation import run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes
from mimir_fast.evaluate.submission import is_asked, write_submissions
from mimir_fast.evaluate.team import ALONE, Team


def evaluate(config: EvaluateConfig, explicit: set[str] | None = None, team: Team = ALONE) -> dict:
    """Evaluate a classifier as `mimir-fast evaluate` does: prints a table, writes results.json, returns what it holds.

    config     EvaluateConfig().updated({"checkpoint": "best.pth", "attacks": "clean,pgd-20", "eps": 4.0}); eps and alpha
               in 1/255, images [B,3,H,W] in [0,1]; a flag is called as on the command line
    explicit   names of the flags that were asked for (default: those that `updated` named): a device that was
               asked for and is not there is an error, a default one is not
    team       the processes that share the images, all of which call; else this one evaluates all of them:
               `with mimir_fast.evaluate.joined(DistConfig(), device) as team`
    Every batch is saved, so the same call after an interruption goes on where it stopped.
    Raises ValueError (DataError, CheckpointError) for wrong input, OSError where the disk refuses.
    Source: docs/evaluate.md says what is counted and how.
    """
    prepare_machine()
    config = config.check()
    explicit = config.changed() | config.given if explicit is None else explicit
    device = resolve_device(config.run.device, explicit) if team.world.size == 1 else str(team.world.device)
    overrides = overrides_of(config.model.model, config.model.use_normalize, config.data.dataset)
    # The first one downloads it, where it is a URL, for all of its machine.
    with team.first():
        trained = load_classifier(config.model.checkpoint, overrides=overrides, device=device)
    eps, alpha = radius_and_step(config, trained)
    line = f"{trained.source}: {trained.args['model']}, eps {eps:g}/255, alpha {alpha:g}/255, on {device}{team.words()}"
    cut = ", images as they are" if config.data.eval_resize == "none" else ""
    team.say(*config.notes(explicit), *trained.notes, line + cut)
    return attacked(config, trained, eps, alpha, team)


def attacked(config: EvaluateConfig, trained: Trained, eps: float, alpha: float, team: Team) -> dict:
    """Run the attacks on a loaded classifier, eps and alpha in 1/255, and write what was asked for; what results.json holds."""
    a, run, place = config.attack, config.run, folder(config)
    attacks = parse_attacks(a.attacks, eps, alpha, a.restarts, a.mi_weight, a.eps_l2, a.alpha_l2)
    sizes = Sizes(run.batch_size, run.aa_batch)
    data = run_evaluation(
        trained.model,
        trained.source,
        chosen_images(config, trained),
        attacks,
        place,
        sizes=sizes,
        seed=run.seed,
        with_checks=a.checks,
        classes=trained.classes,
        team=team,
        launch=run.step_graph == "auto",
    )
    if is_asked(a.attacks) and team.is_main:
        keys = [key_of(settings_of(attack, sizes, run.seed)) for attack in attacks]
        team.say(*write_submissions(data, trained, keys, place, beside(config.model.checkpoint, "eval").name))
    return data


def radius_and_step(config: EvaluateConfig, trained: Trained) -> tuple[float, float]:
    """eps and alpha in 1/255: those of the flags, else the radius of the training and a quarter of it."""
    eps = config.attack.eps or training_eps(trained) or USUAL_EPS
    return eps, eps / 4 if config.attack.alpha is None else config.attack.alpha


def overrides_of(model: str | None, use_normalize: bool | None, dataset: str | None) -> dict:
    """Flags that override what a checkpoint says of itself (see load_classifier)."""
    overrides = {"model": model, "use_normalize": use_normalize}
    # The data set matters to the model only where images are normalised, by the data set's constants: a model may well be
    # evaluated on another data set than it was trained on.
    return overrides | {"dataset": dataset} if use_normalize else overrides


def dataset_of(trained: Trained, dataset: str | None) -> str:
    """The data set that was asked for, else that of the training.  Raises ValueError if the checkpoint does not say it."""
    known = dataset or trained.args.get("dataset")
    if not known:
        raise ValueError(f"dataset: {trained.source} does not say what it was trained on; pass --dataset")
    return known


def chosen_images(config: EvaluateConfig, trained: Trained) -> Images:
    """The images to evaluate on.  Raises ValueError if neither the flags nor the checkpoint name a data set."""
    data = config.data
    return Images(
        dataset_of(trained, data.dataset),
        data.data_root,
        trained.args["input_size"],
        data.split,
        data.num_images,
        data.image_list or None,
        data.held_out,
        data.num_workers,
        data.eval_resize,
    )


def folder(config: EvaluateConfig) -> Path:
    """Folder of the results: beside a file, or in the working directory for a URL."""
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    return beside(config.model.checkpoint, "eval")
