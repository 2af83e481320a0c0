"""Numbers recorded from the original's other families, and the small models that they were recorded with.

The states, images and the most telling recordings of a family stand in tests/golden/.  The whole set is larger; tests that
need the rest of it look beside the checkout, in ../shared/golden-families, and are skipped without.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mimir_fast.models import Classifier, MaskedAutoencoder, create_classifier, create_model
from tests.support.golden import GOLDEN

WHOLE = GOLDEN.parents[2] / "shared" / "golden-families"
CLASSES = 7


def recorded(name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and scalars of a recording, either of which may be empty; skips the test where it is not at hand."""
    folder = next((path for path in (GOLDEN, WHOLE) if (path / f"{name}.json").exists()), None)
    if folder is None:
        pytest.skip(f"{name} is not among the recordings in tests/golden, and there is no {WHOLE}")
    tensors = Path(folder / f"{name}.safetensors")
    scalars = json.loads((folder / f"{name}.json").read_text())["scalars"]
    return load_file(tensors) if tensors.exists() else {}, scalars


def sizes(family: str) -> dict:
    """Keywords of the recorded autoencoder."""
    return json.loads((GOLDEN / f"{family}_mae_state.json").read_text())["config"]["mae"]


def recorded_autoencoder(
    family: str, compat: str | None, norm_pix_loss: bool = True, dtype: torch.dtype = torch.float64, **options
) -> MaskedAutoencoder:
    """The recorded autoencoder with its parameters."""
    model = create_model(family, **sizes(family), norm_pix_loss=norm_pix_loss, compat=compat, **options)
    model.load_state_dict(recorded(f"{family}_mae_state")[0], strict=True)
    return model.to(dtype)


def classifier(family: str, compat: str | None = "original", **options) -> Classifier:
    """A fresh classifier of the recorded sizes."""
    own = {key: value for key, value in sizes(family).items() if not key.startswith("decoder_")}
    own.pop("qkv_bias", None)
    return create_classifier(family, **own, num_classes=CLASSES, compat=compat, **options)


def images(family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images and adversarial images [B,3,H,W] in [0,1], labels [B]."""
    tensors, _ = recorded(f"{family}_images")
    return tensors["images"], tensors["adv_images"], tensors["labels"]
