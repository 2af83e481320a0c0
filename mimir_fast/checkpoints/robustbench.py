"""RobustBench export: the Python file beside the parameters, with a model class that needs only torch and timm."""

from pathlib import Path

from mimir_fast.checkpoints.trained_models import Trained, constructor_keywords
from mimir_fast.models.families import family_of

# Data sets of RobustBench's model zoo.
ZOO_DATASETS = ("cifar10", "cifar100", "imagenet")

TEXT = '''"""{title}, exported by mimir-fast.

Takes images in [0,1] and normalises inside.  Needs torch and timm.

    model = load()  # in evaluation mode, with the parameters of {file}

RobustBench: copy this file to robustbench/model_zoo/architectures/, {file} to models/{dataset}/Linf/, and enter
    ("{stem}", {{"model": zoo_model, "gdrive_id": "<id of {file}>"{preprocessing}}})
in the table linf of robustbench/model_zoo/{dataset}.py.
"""

{imports}from pathlib import Path

import torch
{source}from torch import Tensor, nn

SIZES = {sizes}
MEAN, STD = {mean}, {std}  # of the images that the network itself sees
{written}

class {pixel}({base}):
    """{name} for images [B,3,{size},{size}] in [0,1]: logits [B,{classes}]."""

    def __init__(self):
        super().__init__(**SIZES)
        self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward((images - self.mean) / self.std)


def zoo_model() -> nn.Module:
    """Without parameters, as RobustBench's loader wants it: on ImageNet it puts `model.` before every name."""
    return {zoo}


def load(path: str | Path = Path(__file__).with_suffix(".pt")) -> nn.Module:
    """The trained model."""
    model = {pixel}()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return model.eval()
'''


def model_file(trained: Trained, path: Path) -> str:
    """The text of the Python file for the parameters in `path`."""
    args, family = trained.args, family_of(trained.model)
    theirs = family.network(args["model"], constructor_keywords(trained))
    pixel = f"Pixel{family.title}"
    dataset = args["dataset"] if args["dataset"] in ZOO_DATASETS else "DATASET"
    on_imagenet = f"nn.Sequential(OrderedDict(model={pixel}()))"
    return TEXT.format(
        title=f"{args['model']} with patches of {args['patch_size']} pixels",
        name=args["model"],
        file=path.name,
        stem=path.stem,
        dataset=dataset,
        source=theirs.source,
        written=theirs.written,
        # As evaluations here cut images: resized to 256 pixels with a bicubic filter, their middle taken.
        preprocessing=', "preprocessing": "BicubicRes256Crop224"'
        if (dataset, args["input_size"]) == ("imagenet", 224)
        else "",
        base=theirs.name,
        pixel=pixel,
        # Double quotes, as formatters of Python want them: the file is for people to read and to commit.
        sizes=repr(theirs.keywords).replace("'", '"'),
        mean=tuple(args["mean"] or (0.0, 0.0, 0.0)),
        std=tuple(args["std"] or (1.0, 1.0, 1.0)),
        size=args["input_size"],
        classes=args["nb_classes"],
        imports="from collections import OrderedDict\n" if dataset == "imagenet" else "",
        zoo=on_imagenet if dataset == "imagenet" else f"{pixel}()",
    )
