"""What a checkpoint's features tell about images and perturbations.

x: images; x_adv: adversarial images; delta = x_adv - x; z: the features of x_adv, all tokens of all patches.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from mimir_fast.analyze.bounds import fano
from mimir_fast.analyze.estimates import GROUPS, estimate, variable
from mimir_fast.analyze.plot import draw
from mimir_fast.analyze.progress import Progress
from mimir_fast.analyze.results import FILES, record, table, write_json
from mimir_fast.analyze.seen import Perturbation, Seen, look
from mimir_fast.checkpoints.atomic import write_atomically
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.fetch import beside, is_url
from mimir_fast.checkpoints.folder import EPOCH_FILE
from mimir_fast.checkpoints.folder import progress as run_progress
from mimir_fast.checkpoints.trained_models import Trained, load_encoder, training_eps
from mimir_fast.config.analysis import AnalyzeConfig
from mimir_fast.config.evaluation import USUAL_EPS
from mimir_fast.config.fields import require
from mimir_fast.config.resolve import resolve_device
from mimir_fast.data import eval_batches, subset_indices
from mimir_fast.models import VisionTransformer


def analyze(config: AnalyzeConfig, explicit: set[str]) -> int:
    """Every checkpoint after the other; what is done is written after each.  Raises ValueError for wrong input."""
    torch.set_float32_matmul_precision("highest")
    device = resolve_device(config.run.device, explicit)
    sources = checkpoints(config.model.checkpoint)
    batches = -(-config.data.num_images // config.run.batch_size)
    progress = Progress({"attack": batches, "estimates": GROUPS + 1}, len(sources))
    folder = output_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    results, status = [], 0
    try:
        for series, source in sources:
            results.append({"series": series, **analyzed(config, source, device, progress)})
            write_json(folder / "analysis.json", config, results, len(sources))
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} of {len(sources)} checkpoints", file=sys.stderr)
        status = 130
    if results:
        for line in table(results):
            print(line)
        figure = draw(results)
        for suffix in ("svg", "png"):
            write_atomically(folder / f"analysis.{suffix}", partial(figure.savefig, format=suffix, dpi=150))
        print(f"wrote {folder}/analysis.json, analysis.svg, analysis.png")
    return status


def checkpoints(given: tuple[str, ...]) -> list[tuple[str, str]]:
    """(series, file) of everything to look at: a folder is a series of its own, files make one together.

    Raises CheckpointError for a folder without checkpoints.
    """
    found = []
    for word in given:
        path = Path(word)
        if not path.is_dir():
            found.append((FILES, word))
            continue
        files = sorted((p for p in path.iterdir() if EPOCH_FILE.fullmatch(p.name)), key=run_progress)
        if not files:
            raise CheckpointError(f"checkpoint: no checkpoint-*.pth in the folder {path}")
        found += [(str(path), str(file)) for file in files]
    return found


def output_folder(config: AnalyzeConfig) -> Path:
    """Where the results go: in a run's folder, beside a file under its name, or in the working directory for a URL."""
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    first, *others = config.model.checkpoint
    if Path(first).is_dir():
        return Path(first) / "analysis"
    own = beside(first, "analysis")
    return own.parent if others and not is_url(first) else own


def analyzed(config: AnalyzeConfig, source: str, device: str, progress: Progress) -> dict:
    """One checkpoint's numbers, as they stand in analysis.json."""
    overrides = {"model": config.model.model, "use_normalize": config.model.use_normalize}
    if config.model.use_normalize:  # whose constants
        overrides["dataset"] = config.data.dataset
    trained = load_encoder(source, overrides=overrides, device=device)
    how = perturbation(config, trained)
    progress.begin()
    batches, numbers = images(config, trained)
    seen = look(trained, batches, numbers, how, lambda: progress.step("attack", source))
    rows = {"x": seen.x, "x_adv": seen.x_adv, "delta": seen.x_adv - seen.x, "latent": seen.latent}
    estimates = estimate(
        {name: variable(row) for name, row in rows.items()},
        config.run.bandwidth,
        torch.Generator().manual_seed(config.run.seed),
        lambda: progress.step("estimates", source),
    )
    return record(trained, how, len(numbers), estimates, bounds(trained, seen))


def perturbation(config: AnalyzeConfig, trained: Trained) -> Perturbation:
    """With the defaults that depend on what the checkpoint is."""
    classifier = isinstance(trained.model, VisionTransformer)
    given = config.attack
    eps = training_eps(trained, USUAL_EPS) if given.eps is None else given.eps
    alpha = (eps / 4 if classifier else 1.25 * eps) if given.alpha is None else given.alpha
    steps = (20 if classifier else 1) if given.steps is None else given.steps
    return Perturbation(eps, alpha, steps, config.run.seed)


def images(config: AnalyzeConfig, trained: Trained):
    """Batches of the slice and the numbers of its images.  Raises ValueError if no data set is named or it is too small."""
    data = config.data
    dataset = data.dataset or trained.args["dataset"]
    if not dataset:
        raise ValueError(f"dataset: {trained.source} does not say what it was trained on; pass --dataset")
    options = {"split": data.split, "held_out": data.held_out}
    where = (dataset, data.data_root, trained.args["input_size"], config.run.batch_size)
    total = eval_batches(*where, **options).num_images
    require(total >= 2 * GROUPS, "num_images", f"{total} images in all", f"{2 * GROUPS} or more")
    numbers = subset_indices(total, min(data.num_images, total), config.run.seed)
    classes = trained.args.get("nb_classes")
    return eval_batches(*where, **options, indices=numbers, num_classes=classes), torch.tensor(numbers)


def bounds(trained: Trained, seen: Seen) -> dict:
    """A classifier's lower bounds on I(y; prediction), unattacked and attacked; empty for an autoencoder."""
    if seen.right is None:
        return {}
    counts = seen.labels.bincount().tolist()
    classes = trained.args["nb_classes"]
    outcomes = {"clean": seen.right, "adversarial": seen.right_adv}
    return {name: fano(int(right.sum()), counts, classes) for name, right in outcomes.items()}
