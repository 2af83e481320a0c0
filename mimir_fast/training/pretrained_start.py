"""Start of a fine-tuning: the parameters of a pre-trained checkpoint, and what is said about them."""

from collections.abc import Callable

from mimir_fast.checkpoints.normalisation import own_normalisation
from mimir_fast.checkpoints.reader import Contents, read
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.models import Classifier

# Standard deviation of a re-initialised head, by data set; OTHER_HEAD_STD for all others.
HEAD_STD = {"imagenet": 2e-5}
OTHER_HEAD_STD = 2e-2


def start_from_pretrained(
    model: Classifier, config: FinetuneConfig, say: Callable[[str], None], contents: Contents | None = None
) -> None:
    """Load what --finetune names, if anything; contents: of that file, if it was read.  Raises CheckpointError if it does not
    fit."""
    source = config.model.finetune
    if not source:
        say("finetune: no pre-trained checkpoint given, training from scratch")
        return
    contents = contents or read(source, "finetune")
    head_std = HEAD_STD.get(config.data.dataset, OTHER_HEAD_STD)
    load_pretrained(model, contents.tensors, contents.source, say, head_std)
    for line in contents.notes:
        say(f"finetune: {line}")
    before, now = contents.args.get("use_normalize"), config.data.use_normalize
    before = True if own_normalisation(contents) else before
    if before is None:
        does = "does" if now else "does not (--use_normalize)"
        say(f"finetune: {source} does not say whether its training normalised images; this run {does}")
    elif bool(before) != now:
        seen = "with" if before else "without"
        say(
            f"use_normalize: {source} was trained {seen} it, this run is {'with' if now else 'without'}; is that meant?"
        )
