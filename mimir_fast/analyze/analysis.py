"""Analysis of checkpoints: mutual information of their features with images and perturbations.

x: images; x_adv: adversarial images; delta = x_adv - x; z: the features of x_adv, all tokens of all patches.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from mimir_fast.analyze.bounds import fano
from mimir_fast.analyze.entries import FILES, entry, table, write_json
from mimir_fast.analyze.estimates import GROUPS, estimate, variable
from mimir_fast.analyze.plot import draw
from mimir_fast.analyze.seen import Perturbation, Seen, look
from mimir_fast.analyze.time_left import TimeLeft
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
from mimir_fast.data import EvalStream, eval_batches, subset_indices
from mimir_fast.data.splits import check_same_classes
from mimir_fast.evaluate.configured import dataset_of, overrides_of
from mimir_fast.evaluate.progress import Bar
from mimir_fast.models import Classifier


def analyze(config: AnalyzeConfig, explicit: set[str]) -> int:
    """Analyse checkpoints one after the other; results are written after each.  Raises ValueError for wrong input."""
    # Distances are differences of large numbers: tf32 would lose them.
    torch.set_float32_matmul_precision("highest")
    device = resolve_device(config.run.device, explicit)
    for line in config.notes(explicit):
        print(line)
    sources = checkpoints(config.model.checkpoint)
    batches = -(-config.data.num_images // config.run.batch_size)
    left = TimeLeft({"attack": batches, "estimates": GROUPS + 1}, len(sources), Bar(_say))
    folder = output_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    results, status = [], 0
    try:
        for series, source in sources:
            results.append({"series": series, **analyzed(config, source, device, left)})
            write_json(folder / "analysis.json", config, results, len(sources))
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} of {len(sources)} checkpoints", file=sys.stderr)
        status = 130
    finally:
        left.bar.close()
    # After Ctrl-C too: the checkpoints that are done.
    if results:
        for line in table(results):
            print(line)
        figure = draw(results)
        for suffix in ("svg", "png"):
            write_atomically(folder / f"analysis.{suffix}", partial(figure.savefig, format=suffix, dpi=150))
        print(f"wrote {folder}/analysis.json, analysis.svg, analysis.png")
    return status


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def checkpoints(given: tuple[str, ...]) -> list[tuple[str, str]]:
    """(series, file) of every checkpoint to analyse: each folder is a series, single files together are another.

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
    """Folder of the results: in a run's folder, beside a file under its name, or in the working directory for a URL."""
    if config.run.output_dir is not None:
        return Path(config.run.output_dir)
    first, *others = config.model.checkpoint
    if Path(first).is_dir():
        return Path(first) / "analysis"
    own = beside(first, "analysis")
    return own.parent if others and not is_url(first) else own


def analyzed(config: AnalyzeConfig, source: str, device: str, left: TimeLeft) -> dict:
    """Analyse one checkpoint; returns its entry in analysis.json."""
    overrides = overrides_of(config.model.model, config.model.use_normalize, config.data.dataset)
    trained = load_encoder(source, overrides=overrides, device=device)
    for line in trained.notes:
        print(line)
    how = perturbation(config, trained)
    left.begin()
    batches, indices = images(config, trained)
    seen = look(trained, batches, indices, how, lambda: left.step("attack", source))
    rows = {"x": seen.x, "x_adv": seen.x_adv, "delta": seen.x_adv - seen.x, "latent": seen.latent}
    estimates = estimate(
        {name: variable(row) for name, row in rows.items()},
        config.run.bandwidth,
        torch.Generator().manual_seed(config.run.seed),
        lambda: left.step("estimates", source),
    )
    return entry(trained, how, len(indices), estimates, bounds(trained, seen))


def perturbation(config: AnalyzeConfig, trained: Trained) -> Perturbation:
    """The attack, with defaults that depend on the checkpoint: its training's eps, and steps by its task."""
    classifier = isinstance(trained.model, Classifier)
    given = config.attack
    eps = (training_eps(trained) or USUAL_EPS) if given.eps is None else given.eps
    # An autoencoder is attacked as in its pre-training: one step, 10/255 at a radius of 8/255.
    alpha = (eps / 4 if classifier else 1.25 * eps) if given.alpha is None else given.alpha
    steps = (20 if classifier else 1) if given.steps is None else given.steps
    return Perturbation(eps, alpha, steps, config.run.seed)


def images(config: AnalyzeConfig, trained: Trained) -> tuple[EvalStream, torch.Tensor]:
    """Batches of the chosen images, and their indices int64 [N].

    Raises ValueError if no data set is named or it is too small.
    """
    data = config.data
    where = (dataset_of(trained, data.dataset), data.data_root, trained.args["input_size"], config.run.batch_size)
    stream = partial(eval_batches, *where, split=data.split, held_out=data.held_out, eval_resize=data.eval_resize)
    every = stream()
    check_same_classes(trained.classes, every.classes, trained.source)
    total = every.num_images
    # Here and not first by the jackknife, which comes after the attack.
    require(total >= 2 * GROUPS, "num_images", f"{total} images in all", f"{2 * GROUPS} or more")
    indices = subset_indices(total, min(data.num_images, total), config.run.seed)
    return stream(indices=indices, num_classes=trained.args.get("nb_classes")), torch.tensor(indices)


def bounds(trained: Trained, seen: Seen) -> dict:
    """A classifier's lower bounds on I(y; prediction), clean and under attack; empty for an autoencoder."""
    if seen.right is None or seen.right_adv is None:
        return {}
    counts = seen.labels.bincount().tolist()
    classes = trained.args["nb_classes"]
    outcomes = {"clean": seen.right, "adversarial": seen.right_adv}
    return {name: fano(int(right.sum()), counts, classes) for name, right in outcomes.items()}
