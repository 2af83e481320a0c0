"""Options that both tasks pass to the data package and to models."""

import argparse
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from mimir_fast.config.choices import NONE, ORIGINAL
from mimir_fast.config.resolve import Run
from mimir_fast.data import BatchStream
from mimir_fast.models import Classifier, MaskedAutoencoder
from mimir_fast.models.families import family_of, find
from mimir_fast.training.distributed import World

Model = TypeVar("Model", bound=nn.Module)


def stream_options(run: Run, world: World) -> dict:
    """Arguments of build_pretrain_data and build_train_data for this rank's share of the training images."""
    d, o = run.config.data, run.config.optim
    return {
        "accum_iter": o.accum_iter,
        "seed": run.config.run.seed,
        "rank": world.rank,
        "world_size": world.size,
        "num_workers": d.num_workers,
        "pin_memory": d.pin_mem and world.device.type == "cuda",
        "stage": d.stage,
        "use_edm": d.use_edm,
        "unsup_fraction": d.unsup_fraction,
        "aux_data_filename": d.aux_data_filename,
    }


def check_cache(own: dict, stream: BatchStream, say: Callable[[str], None]) -> None:
    """Say so if a run goes on with files in place of a cache or the other way round; own: a checkpoint's own entry.

    Raises ValueError if it was trained on another cache.
    """
    before = own.get("cache", stream.cache)
    if before == stream.cache:
        return
    if before and stream.cache:
        raise ValueError(
            f"data_root: the resumed run was trained on another cache than this {stream.origin}; pass that one"
        )
    say(f"data_root: the resumed run read {'a cache' if before else 'image files'}: the pixels of now differ a little")


def model_options(run: Run) -> dict:
    """Arguments of create_model and create_classifier: the size of the input, compat, and how the model computes."""
    m, c = run.config.model, run.compute
    # A Swin's patches follow from its name, so that the flag does not reach it; elsewhere the flag decides.
    free = find(m.model, None)[0].free
    return {
        "img_size": m.input_size,
        **({"patch_size": m.patch_size} if "patch_size" in free else {}),
        "compat": ORIGINAL if run.config.run.compat == ORIGINAL else None,
        "kernels": c.kernels,
        "attention": c.attention,
        "mlp": c.mlp,
        "residual_dtype": c.residual_dtype,
        "activation_checkpointing": c.activation_checkpointing,
    }


def patch_size(run: Run) -> int:
    """Side of a token's patch: the flag's, or that of the model's name where the family leaves nothing to choose."""
    name = run.config.model.model
    return model_options(run).get("patch_size") or find(name, None)[1]["patch_size"]


def same_compat(state: dict, model: MaskedAutoencoder | Classifier, say: Callable[[str], None]) -> None:
    """Hold a resumed checkpoint's --compat against the model's.  Raises ValueError where it makes another model of it."""
    if not state or not family_of(model).has_original:
        return
    args = state.get("args", {})
    was = (vars(args) if isinstance(args, argparse.Namespace) else args).get("compat")
    now = model.compat or NONE
    if was is None and now == NONE:
        say(f"compat: the checkpoint does not say; if it is the original's, --compat {ORIGINAL} goes on as it began")
    if was is not None and was != now:
        raise ValueError(f"compat: the resumed run had --compat {was}, this one has {now}, which is another model")


def on_device(model: Model, device: torch.device) -> Model:
    """The model on a device."""
    # Not moved if it is there: the parameters of the memory prediction are fake and cannot be moved.
    return model if next(model.parameters()).device == device else model.to(device)


def check_resumed(
    state: dict,
    own: dict,
    model: MaskedAutoencoder | Classifier,
    stream: BatchStream | None,
    say: Callable[[str], None],
) -> None:
    """`same_compat` and, for a task with images, `check_cache`."""
    same_compat(state, model, say)
    if stream is not None:
        check_cache(own, stream, say)
