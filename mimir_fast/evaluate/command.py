"""mimir-fast evaluate: accuracy of a classifier, clean and under attack.  Also `python -m mimir_fast.evaluate`."""

import sys
from pathlib import Path, PurePosixPath

import torch

from mimir_fast.arguments import Command, parse_args
from mimir_fast.evaluate.attacks import parse_attacks
from mimir_fast.evaluate.config import RECIPES, EvaluateConfig
from mimir_fast.evaluate.evaluation import run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes
from mimir_fast.trained import Trained, load_classifier

DESCRIPTION = """Accuracy of a classifier, clean and under attack, with 95 % intervals.  An image counts as robust if the
model is right on it unattacked and after the attack.  Every batch is saved: the same command goes on where it was stopped,
other attacks are added to the results.  Exit status: 0 done, 1 failed, 2 wrong input, 130 Ctrl-C."""
COMMAND = Command("mimir-fast evaluate", DESCRIPTION, EvaluateConfig, RECIPES)
USUAL_EPS = 8.0  # 1/255


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print a table, write results.json; returns the exit status."""
    try:
        config, explicit = parse_args(COMMAND, sys.argv[1:] if argv is None else argv)
        return evaluate(config, explicit)
    except ValueError as error:
        print(f"mimir-fast evaluate: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"mimir-fast evaluate: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; finished batches are saved, the same command goes on from there", file=sys.stderr)
        return 130


def evaluate(config: EvaluateConfig, explicit: set[str]) -> int:
    """Load, evaluate, report; raises ValueError for wrong input."""
    torch.set_float32_matmul_precision("highest")
    device = settled_device(config.run.device, explicit)
    overrides = {"model": config.model.model, "use_normalize": config.model.use_normalize}
    if config.model.use_normalize:  # whose constants
        overrides["dataset"] = config.data.dataset
    trained = load_classifier(config.model.checkpoint, overrides=overrides, device=device)
    eps = trained_eps(trained) if config.attack.eps is None else config.attack.eps
    alpha = eps / 4 if config.attack.alpha is None else config.attack.alpha
    print(f"{trained.source}: {trained.args['model']}, eps {eps:g}/255, alpha {alpha:g}/255, on {device}")
    run_evaluation(
        trained.model,
        trained.source,
        chosen_images(config, trained),
        parse_attacks(config.attack.attacks, eps, alpha, config.attack.restarts, config.attack.mi_weight),
        folder(config),
        sizes=Sizes(config.run.batch_size, config.run.aa_batch),
        seed=config.run.seed,
        with_checks=config.attack.checks,
    )
    return 0


def settled_device(device: str, explicit: set[str]) -> str:
    """The device to run on.  Raises ValueError if one was asked for that is not there."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        if "device" in explicit:
            raise ValueError(f"device: got {device}, no CUDA device is available here; pass --device cpu")
        print("device: no CUDA device is available here, running on the CPU (--device cpu)")
        return "cpu"
    return device


def trained_eps(trained: Trained) -> float:
    """Radius of the adversarial training in 1/255, from a checkpoint's args, where it is a share; 8 if they do not say.

    The original's args with --use_normalize hold a tensor [C,1,1], divided by each channel's deviation.
    """
    eps, std = trained.args.get("eps"), trained.args.get("std")
    if isinstance(eps, torch.Tensor) and std is not None and eps.numel() == len(std):
        eps = (eps.flatten().cpu().double() * torch.tensor(std, dtype=torch.float64)).mean().item()
    return round(eps * 255, 4) if isinstance(eps, float) and eps > 0 else USUAL_EPS


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
    source = config.model.checkpoint
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    if source.startswith(("https://", "http://")):
        return Path("eval") / PurePosixPath(source).stem
    return Path(source).parent / "eval" / Path(source).stem


if __name__ == "__main__":
    sys.exit(main())
