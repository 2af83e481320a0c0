"""Trained models from files: checkpoints of ours and of the original, bare state dicts, exported .safetensors.

The tensors say what the model is; a checkpoint's `args` add what tensors cannot say (data set, normalisation, loss).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.matching import load_all
from mimir_fast.checkpoints.normalisation import assumed, normalisation
from mimir_fast.checkpoints.reader import Contents, read
from mimir_fast.config.choices import ORIGINAL
from mimir_fast.models import Classifier, MaskedAutoencoder, create_classifier, create_model
from mimir_fast.models.families import family_of, recognise
from mimir_fast.models.family import MASK_TOKEN, PREFIX, Family, kind_of

__all__ = [
    "OVERRIDES",
    "Trained",
    "constructor_keywords",
    "latent_tokens",
    "load_classifier",
    "load_encoder",
    "load_mae",
    "normalised",
    "training_eps",
]

# Flags that a caller may insist on.
OVERRIDES = (
    "model",
    "input_size",
    "patch_size",
    "nb_classes",
    "global_pool",
    "dataset",
    "use_normalize",
    "norm_pix_loss",
    "compat",
)
# Keywords of a model's constructor -> their flags: of every model, and of a classifier alone.
SIZE = {"img_size": "input_size", "patch_size": "patch_size"}
HEAD = {"num_classes": "nb_classes", "global_pool": "global_pool"}
# Facts that follow from the tensors, and whether a checkpoint's args must agree: the original's args hold the command line's
# input_size and nb_classes even where the data set's own were used.
BINDING = {"model": True, "patch_size": True, "global_pool": True, "input_size": False, "nb_classes": False}


class Trained(NamedTuple):
    """A model to look at: fp32, eval mode, nothing to train.

    args    the checkpoint's args with what was found out filled in: model, input_size, patch_size, dataset (None: not
            known), use_normalize, mean, std (None: images come in [0,1]); nb_classes and global_pool of a classifier,
            norm_pix_loss of a masked autoencoder
    epoch   the last finished one, where the file says it
    source  the file's name and which entry was taken
    classes names of the classes in the head's order, where the file says them
    notes   lines to print: what was assumed
    """

    model: Classifier | MaskedAutoencoder
    args: dict
    epoch: int | None
    source: str
    classes: list[str] | None = None
    notes: tuple[str, ...] = ()


def load_classifier(source: str, *, overrides: dict = {}, device: str | torch.device = "cpu") -> Trained:  # noqa: B006
    """A classifier that takes pixels in [0,1]: where the training normalised, so does the model, inside.

    source: a path or URL; averaged parameters (model_ema) are preferred.  overrides: flags of OVERRIDES that decide where
    a file does not say, and must agree with its tensors where it does; None: not given.
    Raises CheckpointError for a file that cannot be read, belongs to pre-training or to another architecture, or
    contradicts itself or an override.
    """
    contents = read(source, "checkpoint")
    if _kind(contents) == "autoencoder":
        raise CheckpointError(f"checkpoint: {contents.source} is a pre-training checkpoint; fine-tune it first")
    return _classifier(contents, overrides, device)


def load_mae(source: str, *, overrides: dict = {}, device: str | torch.device = "cpu") -> Trained:  # noqa: B006
    """A masked autoencoder.  It takes images as its training saw them: normalised with args["mean"] and args["std"], if any.

    As load_classifier otherwise.
    """
    contents = read(source, "checkpoint")
    if _kind(contents) == "classifier":
        raise CheckpointError(
            f"checkpoint: {contents.source} is a classifier; expected a masked autoencoder of `mimir-fast pretrain`"
        )
    return _mae(contents, overrides, device)


def load_encoder(source: str, *, overrides: dict = {}, device: str | torch.device = "cpu") -> Trained:  # noqa: B006
    """Whichever of the two the file holds."""
    contents = read(source, "checkpoint")
    return (_mae if _kind(contents) == "autoencoder" else _classifier)(contents, overrides, device)


def latent_tokens(trained: Trained, images: Tensor) -> Tensor:
    """Pixels [B,C,H,W] in [0,1] -> features of all patches from the encoder, [B,S+L,D]: prefix tokens first (class token).

    The masked autoencoder's tokens are normalised (its last LayerNorm), the classifier's are those of its last block.
    """
    model = trained.model
    if isinstance(model, Classifier):
        return model.forward_features(images)
    images = normalised(trained, images)
    # No mask: all patches are kept, in raster order.
    everything = torch.arange(model.num_patches, device=images.device).expand(len(images), -1).contiguous()
    return model.encode(model.visible(images, everything), everything)


def normalised(trained: Trained, images: Tensor) -> Tensor:
    """Pixels [B,C,H,W] in [0,1] -> images as a masked autoencoder's training saw them."""
    if trained.args["mean"] is None:
        return images
    mean, std = (images.new_tensor(trained.args[name])[:, None, None] for name in ("mean", "std"))
    return (images - mean) / std


def constructor_keywords(trained: Trained) -> dict:
    """What made the model, without normalisation: its sizes, those of its name and those that follow from its tensors."""
    family, args = family_of(trained.model), trained.args
    # From the model's tensors: args say nothing of what only some files have.
    found = family.read(family.of_classifier(trained.model.state_dict()))
    size = {keyword: args[flag] for keyword, flag in SIZE.items()}
    return size | _free(family, found) | family.keywords(args["model"].removeprefix(PREFIX))


def training_eps(trained: Trained) -> float | None:
    """Radius of the adversarial training in 1/255, from a checkpoint's args, where it is a share; None if they do not
    say.

    The original's args with --use_normalize hold a tensor [C,1,1], divided by each channel's deviation.
    """
    eps, std = trained.args.get("eps"), trained.args.get("std")
    if isinstance(eps, Tensor) and std is not None and eps.numel() == len(std):
        eps = (eps.flatten().cpu().double() * torch.tensor(std, dtype=torch.float64)).mean().item()
    # The division by 255 and back leaves rounding errors, which would stand in messages and in keys of results.
    return round(eps * 255, 4) if isinstance(eps, float) and eps > 0 else None


def _family(contents: Contents) -> Family:
    """Raises CheckpointError for what is no model of ours."""
    try:
        return recognise(contents.tensors)
    except ValueError as error:
        said = f", and its args say {contents.args['model']}" if "model" in contents.args else ""
        raise CheckpointError(f"checkpoint: {contents.source} holds {error}{said}") from error


def _kind(contents: Contents) -> str:
    """autoencoder or classifier, from the tensors.  Raises CheckpointError for what is neither of ours."""
    _family(contents)
    if kind := kind_of(contents.tensors):
        return kind
    raise CheckpointError(f"checkpoint: {contents.source} is an encoder alone: neither decoder ({MASK_TOKEN}) nor head")


def _classifier(contents: Contents, overrides: dict, device: str | torch.device) -> Trained:
    args = _resolved(contents, overrides, _facts(contents))
    normalisation = {name: args[name] for name in ("mean", "std")}
    model = create_classifier(args["model"], **_keywords(contents, args), **normalisation)
    return _filled(model, contents, args, overrides, device)


def _mae(contents: Contents, overrides: dict, device: str | torch.device) -> Trained:
    args = _resolved(contents, overrides, _facts(contents, PREFIX))
    args["norm_pix_loss"] = bool(args.get("norm_pix_loss", False))
    model = create_model(args["model"], **_keywords(contents, args), norm_pix_loss=args["norm_pix_loss"])
    return _filled(model, contents, args, overrides, device)


def _keywords(contents: Contents, args: dict) -> dict:
    """Keywords of the constructor beside those of the name, as far as args and tensors say them."""
    family = _family(contents)
    found = family.read(family.of_classifier(contents.tensors))
    compat = ORIGINAL if args.get("compat") == ORIGINAL else None
    return (
        {keyword: args[flag] for keyword, flag in SIZE.items() if flag in args}
        | _free(family, found)
        | {"compat": compat}
    )


def _free(family: Family, found: dict) -> dict:
    """Keywords that follow from the tensors and in which models of one name differ."""
    return {keyword: found[keyword] for keyword in family.free if keyword in found}


def _facts(contents: Contents, prefix: str = "") -> dict:
    """Flags that can be read off the tensors.  Raises CheckpointError for sizes without a name."""
    family = _family(contents)
    found = family.read(family.of_classifier(contents.tensors))
    name = family.named(found)
    if name is None:
        names = ", ".join(prefix + name for name in family.sizes)
        raise CheckpointError(f"checkpoint: {contents.source} holds {family.in_words(found)}: none of {names}")
    return {"model": prefix + name} | {flag: found[key] for key, flag in (SIZE | HEAD).items() if key in found}


def _resolved(contents: Contents, overrides: dict, facts: dict) -> dict:
    """args, overrides and what the tensors say in one dictionary.  Raises CheckpointError where they contradict each other."""
    unknown = overrides.keys() - set(OVERRIDES)
    if unknown:
        raise ValueError(f"{min(unknown)}: expected one of {', '.join(OVERRIDES)}")
    overrides = {name: value for name, value in overrides.items() if value is not None}
    family = _family(contents)
    unfollowed = {flag for keyword, flag in SIZE.items() if keyword not in family.free}
    for name, fact in facts.items():
        for whose, given in (("the command line says", overrides), ("its own args say", contents.args)):
            # The command line always has to agree with the tensors; the original's args are wrong about some of them, and say
            # nothing where the family does not follow the flag.
            binding = given is overrides or (BINDING[name] and name not in unfollowed)
            if name in given and binding and not _agree(name, given[name], fact, family, given is overrides):
                raise CheckpointError(f"{name}: {contents.source} was trained with {fact}, {whose} {given[name]}")
    args = {"dataset": None, "use_normalize": False, **contents.args, **overrides, **facts}
    return args | normalisation(contents, args, overrides)


def _agree(name: str, value, fact, family: Family, exactly: bool) -> bool:
    """Whether a flag is what the tensors say; models by their own names, whatever suffix or alias they were asked for by."""
    if name != "model" or not isinstance(value, str):
        return value == fact
    # The original's Swin-L has windows of 14 whatever its args call it.
    return family.bare(value) == fact or (not exactly and family.alike(value, fact))


def _filled(
    model: Classifier | MaskedAutoencoder, contents: Contents, args: dict, overrides: dict, device: str | torch.device
) -> Trained:
    load_all(model, contents.tensors, f"checkpoint: {contents.source} is no {args['model']}")
    # Where neither args nor tensors say it, as of positions that are computed.
    args.setdefault("input_size", model.img_size)
    # Frozen: attacks differentiate it in its input alone.
    model = model.float().to(device).eval().requires_grad_(False)
    notes = tuple(assumed(contents, overrides))
    return Trained(model, args, contents.epoch, contents.source, contents.classes, notes)
