"""The record of a family of models: everything particular to an architecture that other modules use.

A new family is one file or folder in mimir_fast/models/families/ and one entry of FAMILIES in
mimir_fast/models/families/__init__.py; nothing else names it.  It provides

    a masked autoencoder   subclass of models.autoencoder.MaskedAutoencoder, whose docstring lists methods and attributes
    a classifier           the same of models.classifier.Classifier
    a record               one `Family`, below

Both constructors take keywords alone: those of the record's `sizes`, and these, with defaults, whatever the family does with
them (ValueError where the architecture cannot do what was asked):

    both          img_size, patch_size, kernels, attention, mlp, residual_dtype, activation_checkpointing
                  (`model_options` in mimir_fast/training/options.py passes them)
    autoencoder   norm_pix_loss
    classifier    num_classes, global_pool, drop_path; mean, std: constants of normalisation inside of the model, or None

and `compat` where the record says has_original: None or "original", see mimir_fast/models/compat.py.

models.encoder.Encoder serves both where the family cuts patches and has a list of blocks; models.layers holds what blocks are
made of.
"""

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from mimir_fast.models.autoencoder import MaskedAutoencoder
from mimir_fast.models.classifier import Classifier

# Before a classifier's name: the masked autoencoder whose encoder it takes.
PREFIX = "mae_"
# By these names of parameters a model or file of any family is an autoencoder's or a classifier's.
MASK_TOKEN = "mask_token"
HEAD = "head"

# Patterns of heads and decoders as other trainers call them.
BESIDE = (
    MASK_TOKEN,
    "decoder*",
    f"{HEAD}*",
    "fc.*",
    "classifier*",
    "pre_logits.*",
    "projector*",
    "projection*",
    "predictor*",
)

Tensors = Mapping[str, Tensor]


class TimmModel(NamedTuple):
    """timm's counterpart: its name, further arguments of timm.create_model, the names of its first layer and its head, and
    arguments that are classes of timm's, by where they are in it ("layers.LayerNorm")."""

    name: str
    options: dict[str, Any]
    first_conv: str
    head: str
    classes: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)


class Network(NamedTuple):
    """A classifier without mimir_fast: the lines of Python that bring a class, its name, the keywords of its constructor, and
    what is written out if no package has the class."""

    source: str
    name: str
    keywords: dict[str, Any]
    written: str = ""


class Resized(NamedTuple):
    """A positional table for another grid, and in words from where to where."""

    table: Tensor
    change: str


# eq=False: records are compared by identity, and so can be hashed in spite of the dicts that they hold.
@dataclass(frozen=True, eq=False)
class Family:
    """One family of masked autoencoders and classifiers.

    Names of parameters are a classifier's; patterns are those of a shell ("blocks.*") over whole names.

    name, title     "vit", which every model's name begins with, and "ViT", for messages
    autoencoder     the masked autoencoder: module of create_model; classifier: module of create_classifier
    sizes           classifier's name -> keywords of both constructors; those that begin with `decoder_` are the
                    autoencoder's alone, whose name is "mae_" and the classifier's; a name that differs from an earlier one in
                    these alone is an autoencoder's only
    decoder         keywords of the autoencoder where `sizes` has none
    aliases         other names, of autoencoders and classifiers; suffixes: what may stand behind any name
    masking         "patches": the encoder is given the kept patches alone, cut along a grid, and the pixels of removed ones
                    reach it nowhere; "images": it is given whole images and the ids of the patches to keep
    encoder_prefix  what stands before the names of the encoder's parameters in an autoencoder's state dict
    encoder         patterns of the encoder's parameters, the last normalisation included
    fresh           patterns of what a classifier may start without
    beside          patterns of what files have beside the encoder, decoders and heads of others, which a classifier's start
                    leaves out; whatever else a file has and the classifier lacks is another architecture
    adapt           (classifier, tensors that it will start from) -> None: adds parameters to it that only some files have and
                    that are not there yet
    has_original    whether what the original computes differs from the default, so that both constructors take `compat`
    undecayed       patterns of what weight decay leaves alone in fine-tuning, beside vectors; original_decays: those of them
                    that the original decays, and so a model with compat="original"
    blocks          classes of the blocks, which are compiled, sharded and gathered one by one
    trunk           name of a model's list of encoder blocks, if all are alike, so that memory grows linearly with their number
    depth           model -> number of layers that layer decay counts, L
    layer_of        (name, model) -> 0 before the first of them, 1 to L in them, L + 1 after the last
    marks           names of tensors that every model of the family has: a file with all of them is one's
    read            tensors of a classifier or autoencoder -> keywords of the constructors that follow from names and shapes:
                    those of `sizes` and of `free`
    free            keywords in which models of one name differ: the flags of commands that the family follows
    adjusted        further sizes that a classifier may have otherwise than the file it starts from
    describe        what `read` found, in words
    tables          patterns of the positional tables, which may come from another grid
    resize          (table, shape that the model has) -> the table in that shape; raises ValueError, saying what was
                    expected, for a table that is no grid
    timm            (name, keywords of the constructor) -> the same model in timm; timm_key: a name of ours -> timm's, None
                    for what timm does not store
    network         (name, keywords of the constructor) -> the classifier for a file that stands alone
    """

    name: str
    title: str
    autoencoder: type[MaskedAutoencoder]
    classifier: type[Classifier]
    sizes: dict[str, dict[str, Any]]
    decoder: dict[str, Any]
    masking: str
    encoder: tuple[str, ...]
    fresh: tuple[str, ...]
    undecayed: tuple[str, ...]
    blocks: tuple[type[nn.Module], ...]
    depth: Callable[[Any], int]
    layer_of: Callable[[str, Any], int]
    marks: tuple[str, ...]
    read: Callable[[Tensors], dict[str, Any]]
    describe: Callable[[dict[str, Any]], str]
    tables: tuple[str, ...]
    resize: Callable[[Tensor, tuple[int, ...]], Resized]
    timm: Callable[[str, dict[str, Any]], TimmModel]
    network: Callable[[str, dict[str, Any]], Network]
    beside: tuple[str, ...] = BESIDE
    timm_key: Callable[[str], str | None] = str
    adapt: Callable[[Any, Tensors], None] = lambda classifier, tensors: None
    free: tuple[str, ...] = ("img_size", "patch_size", "num_classes", "global_pool")
    adjusted: tuple[str, ...] = ()
    has_original: bool = False
    original_decays: tuple[str, ...] = ()
    trunk: str | None = None
    encoder_prefix: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    suffixes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.masking not in ("patches", "images"):
            raise ValueError(f"masking: expected patches or images, got {self.masking!r}")

    def names(self, pretraining: bool) -> list[str]:
        """The autoencoders' names, or the classifiers'."""
        if pretraining:
            return [PREFIX + name for name in self.sizes]
        sizes = [self.keywords(name) for name in self.sizes]
        return [name for i, name in enumerate(self.sizes) if sizes[i] not in sizes[:i]]

    def bare(self, name: str) -> str:
        """A model's own name: aliases resolved, suffixes removed."""
        # A loop, since a name may carry several.
        while suffix := next((s for s in self.suffixes if name.endswith(s)), None):
            name = name.removesuffix(suffix)
        return self.aliases.get(name, name)

    def alike(self, name: str, other: str) -> bool:
        """Whether two names' models have the same sizes but for `adjusted`; False for names of other families."""
        names = [self.bare(n) for n in (name, other)]
        if len({n.startswith(PREFIX) for n in names}) > 1 or any(
            n.removeprefix(PREFIX) not in self.sizes for n in names
        ):
            return False
        first, second = ({k: v for k, v in self.keywords(n).items() if k not in self.adjusted} for n in names)
        return first == second

    def keywords(self, name: str) -> dict[str, Any]:
        """Keywords of the constructor of the model with this bare name.  Raises KeyError for another family's."""
        if name.startswith(PREFIX):
            return {**self.decoder, **self.sizes[name.removeprefix(PREFIX)]}
        return {key: value for key, value in self.sizes[name].items() if not key.startswith("decoder_")}

    def named(self, read: dict[str, Any]) -> str | None:
        """The classifier's name for what `read` found; None if its sizes have no name."""
        sizes = {key: value for key, value in read.items() if key not in self.free}
        for name in self.sizes:
            # A file also holds sizes that the name leaves to the constructor's default, such as mlp_ratio.
            own = {**self._defaults, **self.decoder, **self.sizes[name]}
            if all(own[key] == value for key, value in sizes.items()):
                return name
        return None

    def in_words(self, read: dict[str, Any]) -> str:
        """What `read` found, as messages say it: by name, or as a model of such sizes."""
        name, words = self.named(read), self.describe(read)
        return f"{name} ({words})" if name else f"a {self.title} of {words}"

    def lacks(self, tensors: Tensors) -> str | None:
        """The first of `marks` that is not among a classifier's tensors; None: they are of this family."""
        return next((name for name in self.marks if name not in tensors), None)

    def of_classifier(self, tensors: Tensors) -> dict[str, Tensor]:
        """A state dict with the encoder's parameters under their names in a classifier."""
        return {key.removeprefix(self.encoder_prefix): tensor for key, tensor in tensors.items()}

    def of_encoder(self, tensors: Tensors) -> dict[str, Tensor]:
        """The same of a file's encoder alone, where a prefix tells it from the decoder; of any other file all tensors."""
        inside = {key: tensor for key, tensor in tensors.items() if key.startswith(self.encoder_prefix)}
        return self.of_classifier(inside or tensors)

    @property
    def _defaults(self) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(self.classifier).parameters.items()}


def kind_of(names: Container[str]) -> str | None:
    """What a model with parameters of these names is: "autoencoder", "classifier", or None for an encoder alone."""
    if MASK_TOKEN in names:
        return "autoencoder"
    return "classifier" if f"{HEAD}.weight" in names else None


def of_head(name: str) -> bool:
    """Whether a parameter is one of a classifier's last layer."""
    return name.startswith(f"{HEAD}.")


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns is for this name."""
    # Not fnmatch, which does not tell capital letters on Windows.
    return any(fnmatchcase(name, pattern) for pattern in patterns)
