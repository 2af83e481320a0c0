"""An evaluation from its configuration: which model, which images, which attacks, and where the results go."""

from pathlib import Path

import torch

from mimir_fast.attacks.named import parse_attacks
from mimir_fast.checkpoints.fetch import beside
from mimir_fast.checkpoints.trained_models import Trained, load_classifier, training_eps
from mimir_fast.config.evaluation import USUAL_EPS, EvaluateConfig
from mimir_fast.config.resolve import resolve_device
from mimir_fast.evaluate.evaluation import run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes


def evaluate(config: EvaluateConfig, explicit: set[str] | None = None) -> dict:
    """Evaluate a classifier as `mimir-fast evaluate` does: prints a table, writes results.json, returns what it holds.

    config     EvaluateConfig().updated({"checkpoint": "best.pth", "attacks": "clean,pgd-20", "eps": 4.0}); eps and alpha
               in 1/255, images [B,3,H,W] in [0,1]; a flag is called as on the command line
    explicit   names of the flags that were asked for (default: those that differ from their defaults): a device that was
               asked for and is not there is an error, a default one is not
    Every batch is saved, so the same call after an interruption goes on where it stopped.
    Raises ValueError (DataError, CheckpointError) for wrong input, OSError where the disk refuses.
    Source: docs/evaluate.md says what is counted and how.
    """
    config = config.check()
    torch.set_float32_matmul_precision("highest")
    device = resolve_device(config.run.device, config.changed() if explicit is None else explicit)
    overrides = {"model": config.model.model, "use_normalize": config.model.use_normalize}
    if config.model.use_normalize:  # whose constants
        overrides["dataset"] = config.data.dataset
    trained = load_classifier(config.model.checkpoint, overrides=overrides, device=device)
    eps = config.attack.eps or training_eps(trained) or USUAL_EPS
    alpha = eps / 4 if config.attack.alpha is None else config.attack.alpha
    print(f"{trained.source}: {trained.args['model']}, eps {eps:g}/255, alpha {alpha:g}/255, on {device}")
    return run_evaluation(
        trained.model,
        trained.source,
        chosen_images(config, trained),
        parse_attacks(config.attack.attacks, eps, alpha, config.attack.restarts, config.attack.mi_weight),
        folder(config),
        sizes=Sizes(config.run.batch_size, config.run.aa_batch),
        seed=config.run.seed,
        with_checks=config.attack.checks,
    )


def chosen_images(config: EvaluateConfig, trained: Trained) -> Images:
    """Raises ValueError if neither the command line nor the checkpoint names a data set."""
    data = config.data
    dataset = data.dataset or trained.args.get("dataset")
    if not dataset:
        raise ValueError(f"dataset: {trained.source} does not say what it was trained on; pass --dataset")
    return Images(
        dataset,
        data.data_root,
        trained.args["input_size"],
        data.split,
        data.num_images,
        data.image_list or None,
        data.held_out,
        data.num_workers,
    )


def folder(config: EvaluateConfig) -> Path:
    """Where the results go: beside a file, or in the working directory for a URL."""
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    return beside(config.model.checkpoint, "eval")
