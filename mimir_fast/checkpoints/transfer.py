"""From a pre-trained encoder to the start of a classifier."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.matching import Match, compare
from mimir_fast.models import Classifier
from mimir_fast.models.families import family_of
from mimir_fast.models.family import Family, Resized, matches, of_head


def load_pretrained(
    model: Classifier, given: dict[str, Tensor], source: str, say: Callable[[str], None], head_std: float
) -> None:
    """Start a classifier from a checkpoint of ours or of the original, of pre-training or of a classifier.

    given        the checkpoint's parameters; source: its name in messages
    say          gets a table of what was loaded, what is missing and what is not used
    head_std     the head always starts afresh: truncated normal with this deviation, bias zero
    Positional tables of another grid are resized as the model's family does it (ViT: bicubic, the class row is kept).
    Raises CheckpointError if the encoder is not all there, has other sizes or parameters that the model lacks, or its
    positions are no square grid.
    """
    family = family_of(model)
    # Before the comparison: what only some files have would be unexpected.
    family.adapt(model, family.of_classifier(given))
    match = match_encoder(model, given, source)
    resized = {key: _resized(family, match.tensors[key], own, source) for key, (_, own) in match.misshapen.items()}
    tables = {key: table for key, (table, _) in resized.items()}
    # Not strict: the head is missing, and what else may start afresh; `match_encoder` has refused all other gaps.
    model.load_state_dict(match.tensors | tables, strict=False)
    # In any case, as in the original: also from a classifier whose head would fit.
    nn.init.trunc_normal_(model.head.weight, std=head_std)
    nn.init.zeros_(model.head.bias)
    say(f"finetune: {source}: {len(match.tensors)} of {len(model.state_dict())} tensors loaded")
    say(f"  {'loaded':<11}{len(match.tensors):>4}  {_summary(match.tensors)}")
    say(f"  {'missing':<11}{len(match.missing):>4}  {_summary(match.missing)} (start afresh)")
    say(f"  {'unexpected':<11}{len(match.unexpected):>4}  {_summary(match.unexpected)} (not used)")
    # Each change once: several tables of one grid change alike.
    for change in dict.fromkeys(change for _, change in resized.values()):
        say(f"  positional table resized {change}")


def match_encoder(model: Classifier, given: dict, source: str) -> Match:
    """Compare a checkpoint's parameters with the model's; see `load_pretrained` for the errors.

    The head is never taken over: it is missing, and unexpected where the checkpoint has one.  Positions of another grid are
    among the tensors as they are, and the only ones of another shape.
    """
    family = family_of(model)
    given = family.of_encoder(given)
    # Constants follow from the model's own sizes.
    constants = {name: buffer.shape for name, buffer in model.named_buffers()}
    loadable = {key: tensor for key, tensor in given.items() if constants.get(key, tensor.shape) == tensor.shape}
    match = compare(model, {key: tensor for key, tensor in loadable.items() if not of_head(key)})
    if not match.tensors and not match.misshapen:
        raise CheckpointError(
            f"finetune: {source} shares no parameter with the model (it holds {_summary(given)}); "
            f"it must come from a {family.title}, pre-trained or fine-tuned"
        )
    _check_sizes(family, family.read(given), family.read(model.state_dict()), source)
    lacking = [key for key in match.missing if not matches(key, family.fresh)]
    misshapen = {key: shapes for key, shapes in match.misshapen.items() if not matches(key, family.tables)}
    needed = Match({}, lacking, [], misshapen)
    if needed.differs:
        raise CheckpointError(f"finetune: {source} is no whole {family.title} encoder: {needed.report()}")
    tensors = match.tensors | {key: given[key] for key in match.misshapen}
    unused = sorted((key for key in given if key not in tensors), key=_owner_in(model))
    # LayerScale, normalised queries and keys, registers, ...: without them the blocks compute something else.
    foreign = [key for key in unused if not matches(key, (*family.fresh, *family.beside))]
    if foreign:
        report = Match({}, [], foreign, {}).report()
        raise CheckpointError(f"finetune: {source} is of another architecture than this {family.title}: {report}")
    return match._replace(tensors=tensors, unexpected=unused)


def _owner_in(model: Classifier) -> Callable[[str], int]:
    """Parameter's name -> the place of the module that would own it: the order in which torch lists unexpected keys."""
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}

    def owner(key: str) -> int:
        while (key := key.rpartition(".")[0]) not in places:
            pass
        return places[key]

    return owner


def _check_sizes(family: Family, theirs: dict, ours: dict, source: str) -> None:
    """Compare what `read` found in the checkpoint and in the model; raises CheckpointError where the encoders' sizes differ."""
    sizes = ours.keys() - {*family.free, *family.adjusted}
    # A file that lacks even these is reported by its missing tensors, which says more.
    if not sizes | {"patch_size"} <= theirs.keys():
        return
    if any(theirs[key] != ours[key] for key in sizes):
        held, wanted = family.in_words(theirs), family.in_words(ours)
        raise CheckpointError(f"finetune: {source} holds {held}, --model is {wanted}")
    if theirs["patch_size"] != ours["patch_size"]:
        raise CheckpointError(
            f"finetune: {source} has patches of side {theirs['patch_size']}, --patch_size is {ours['patch_size']}"
        )


def _resized(family: Family, table: Tensor, shape: tuple[int, ...], source: str) -> Resized:
    """A positional table for the model's grid.  Raises CheckpointError where the checkpoint's is none."""
    try:
        return family.resize(table, shape)
    except ValueError as error:
        raise CheckpointError(
            f"finetune: the positional table of {source} has shape {tuple(table.shape)}: expected {error}"
        ) from error


def _summary(keys: Iterable[str]) -> str:
    """Keys by their first word, with counts: 'cls_token, blocks.* (24)'; the first few of them."""
    groups: dict[str, int] = {}
    for key in keys:
        word = "decoder_*" if key.startswith("decoder_") else key.split(".")[0] + (".*" if "." in key else "")
        groups[word] = groups.get(word, 0) + 1
    words = [f"{word} ({count})" if word.endswith("*") else word for word, count in groups.items()]
    return ", ".join(words[:8] + (["..."] if len(words) > 8 else [])) or "none"
