"""Matching the parameters of a file with those of a model, with one report of what does not match."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.models.family import kind_of, of_head

# Shown of each kind of difference.
EXAMPLES = 2


class Match(NamedTuple):
    """Result of comparing the parameters of a file with those of a model.

    tensors     those of the file that fit, in the model's order
    missing     names that only the model has
    unexpected  names that only the file has
    misshapen   name -> (shape in the file, shape in the model)
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    unexpected: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def differs(self) -> bool:
        """Whether anything is missing, unexpected or misshapen."""
        return bool(self.missing or self.unexpected or self.misshapen)

    def report(self) -> str:
        """The differences in one line: '1 missing parameter (e.g. ...), 2 other shapes (e.g. ...)'."""
        shapes = [f"{name} of shape {given}, expected {own}" for name, (given, own) in self.misshapen.items()]
        kinds = {"missing parameter": self.missing, "unexpected parameter": self.unexpected, "other shape": shapes}
        return ", ".join(_told(kind, found) for kind, found in kinds.items() if found)


def compare(model: nn.Module, given: dict[str, Tensor]) -> Match:
    """Compare the parameters of a file with those of a model; nothing is loaded."""
    own = model.state_dict()
    shared = [name for name in own if name in given]
    return Match(
        tensors={name: given[name] for name in shared if given[name].shape == own[name].shape},
        missing=[name for name in own if name not in given],
        unexpected=[name for name in given if name not in own],
        misshapen={
            name: (tuple(given[name].shape), tuple(own[name].shape))
            for name in shared
            if given[name].shape != own[name].shape
        },
    )


def load_all(
    model: nn.Module, given: dict[str, Tensor], refusal: str, advice: Callable[[Match], str] = lambda match: ""
) -> None:
    """Load all parameters of a model; the file must hold exactly these.

    refusal   how the message begins, such as 'resume: x.pth belongs to another model'
    advice    how it ends
    Raises CheckpointError with the differences; the model is then unchanged.
    """
    match = compare(model, given)
    if match.differs:
        raise CheckpointError(f"{refusal}: {match.report()}{advice(match)}")
    model.load_state_dict(given, strict=True)


def load_model_state(model: nn.Module, state: dict, source: str) -> None:
    """Load the parameters of a resumed run; raises CheckpointError if they, or their average, are those of another model."""
    # The average is loaded later, but checked here: an error must leave the model unchanged.
    if "model_ema" in state:
        average = compare(model, state["model_ema"])
        if average.differs:
            raise CheckpointError(f"resume: the average in {source} is of another model: {average.report()}")
    load_all(model, state["model"], f"resume: {source} belongs to another model", _resume_advice)


def _resume_advice(match: Match) -> str:
    # The usual mistake: --resume where --finetune was meant.
    if kind_of(match.unexpected) == "autoencoder":
        return "; it is a pre-training's, which a fine-tuning starts from with --finetune"
    other_classes = any(of_head(name) for name in match.misshapen)
    head = ", and whether the data has the classes of its head" if other_classes else ""
    return f"; check --model, --input_size and --patch_size{head}"


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict, source: str) -> None:
    """Restore AdamW's moments, but not how updates are computed (fused, foreach, capturable), which is this run's choice.

    Raises CheckpointError if they are of other parameters.
    """
    own = ("fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad", "decoupled_weight_decay")
    # Replaced before loading: by these entries torch decides on which device the step counters are.
    try:
        groups = [
            {**theirs, **{key: mine[key] for key in own if key in mine}}
            for theirs, mine in zip(state["param_groups"], optimizer.param_groups)
        ]
        groups += state["param_groups"][len(groups) :]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"resume: the optimizer state of {source} does not fit this model: {error}") from error


def _told(kind: str, found: Iterable[str]) -> str:
    found = list(found)
    examples = "; ".join(found[:EXAMPLES])
    return f"{len(found)} {kind}{'s' if len(found) > 1 else ''} (e.g. {examples})"
