"""mimir_fast: MIMIR pre-training, adversarial fine-tuning and robust evaluation of Vision Transformers.

The names below are kept from one version to the next.  They are imported when they are first used, so that
`import mimir_fast` and the command line's help stay quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimir_fast import evaluate as evaluate
    from mimir_fast.attacks.pgd_mae import pgd_mae as pgd_mae
    from mimir_fast.models import MaskedAutoencoderViT as MaskedAutoencoderViT
    from mimir_fast.models import VisionTransformer as VisionTransformer
    from mimir_fast.models import create_classifier as create_classifier
    from mimir_fast.models import create_model as create_model
    from mimir_fast.objectives.information import nhsic as nhsic
    from mimir_fast.objectives.information import renyi_mi as renyi_mi
    from mimir_fast.training.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "MaskedAutoencoderViT": "mimir_fast.models",
    "VisionTransformer": "mimir_fast.models",
    "create_classifier": "mimir_fast.models",
    "create_model": "mimir_fast.models",
    "nhsic": "mimir_fast.objectives.information",
    "pgd_mae": "mimir_fast.attacks.pgd_mae",
    "renyi_mi": "mimir_fast.objectives.information",
    "train": "mimir_fast.training.train",
}
__all__ = [
    "MaskedAutoencoderViT",
    "VisionTransformer",
    "__version__",
    "create_classifier",
    "create_model",
    "evaluate",
    "nhsic",
    "pgd_mae",
    "renyi_mi",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        # A package that can be called: the package and the public function have one name.
        return importlib.import_module("mimir_fast.evaluate")
    if name not in _HOMES:
        raise AttributeError(f"module 'mimir_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
