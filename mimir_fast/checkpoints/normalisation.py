"""Normalisation of images by a checkpoint's model: what the file itself holds, what its args say, and what is assumed."""

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.reader import Contents
from mimir_fast.data.datasets import INFO


def normalisation(contents: Contents, args: dict, overrides: dict) -> dict:
    """dataset under its own name, use_normalize, and the channels' mean and std, None: pixels as they are.

    args       the checkpoint's with the overrides; overrides: flags that a caller insists on
    Raises CheckpointError where they contradict each other, or for normalised images of an unknown data set.
    """
    own = own_normalisation(contents)
    if own is None:
        return {"use_normalize": args["use_normalize"], **of_data_set(args, contents.source)}
    if overrides.get("use_normalize") is False:
        raise CheckpointError(
            f"use_normalize: {contents.source} normalises images, the command line says that it does not"
        )
    return {**of_data_set(args | {"use_normalize": False}, contents.source), **own, "use_normalize": True}


def own_normalisation(contents: Contents) -> dict | None:
    """mean and std that a file itself holds, as a layer of the model or among its args; None: it holds none."""
    mean, std = contents.normalisation or (contents.args.get("mean"), contents.args.get("std"))
    if not isinstance(mean, (list, tuple)) or not isinstance(std, (list, tuple)):
        return None
    return {"mean": tuple(mean), "std": tuple(std)}


def assumed(contents: Contents, overrides: dict) -> list[str]:
    """Lines to print: what the file does not say and decides the result."""
    said = contents.args.get("use_normalize") is not None or overrides.get("use_normalize") is not None
    if said or own_normalisation(contents):
        return contents.notes
    return [
        *contents.notes,
        f"{contents.source} does not say whether its training normalised images: pixels in [0,1] are assumed; if it did, pass "
        "--use_normalize and --dataset, whose constants are taken",
    ]


def of_data_set(args: dict, source: str) -> dict:
    """dataset under its own name, and the channels' mean and std, None where the training took pixels as they are."""
    dataset = args["dataset"]
    if dataset not in INFO and isinstance(dataset, str):
        # cifar10s is cifar10 with generated images, in the original's words.
        dataset = dataset.removesuffix("s")
    if not args["use_normalize"]:
        return {"dataset": dataset, "mean": None, "std": None}
    if dataset not in INFO:
        raise CheckpointError(
            f"dataset: {source} was trained on normalised images of {args['dataset']}, whose constants are not known; "
            f"expected one of {', '.join(INFO)}"
        )
    return {"dataset": dataset, "mean": INFO[dataset].mean, "std": INFO[dataset].std}
