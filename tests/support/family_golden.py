"""Numbers recorded from the original's other families, and the small models that they were recorded with.

The states, images and the most telling recordings of a family stand in tests/golden/, some without their larger tensors.  The
whole set is larger; tests that need the rest of it look beside the checkout, in ../shared/golden-families, and are skipped
without.
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
# Buffers that training changes.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Recorded(dict[str, Tensor]):
    """Tensors of a recording; the test is skipped where it asks for one that is not at hand."""

    def __missing__(self, name: str) -> Tensor:
        pytest.skip(f"{name} of the recording is not in tests/golden, and there is no {WHOLE}")


def recorded(name: str) -> tuple[Recorded, dict]:
    """Tensors and scalars of a recording, either of which may be empty; skips the test where it is not at hand."""
    folders = [path for path in (WHOLE, GOLDEN) if (path / f"{name}.json").exists()]
    if not folders:
        pytest.skip(f"{name} is not among the recordings in tests/golden, and there is no {WHOLE}")
    tensors = Recorded()
    for path in (Path(folder / f"{name}.safetensors") for folder in folders):
        tensors.update(load_file(path) if path.exists() else {})
    return tensors, json.loads((folders[-1] / f"{name}.json").read_text())["scalars"]


def sizes(family: str) -> dict:
    """Keywords of the recorded autoencoder."""
    name = f"{family}_mae_state.json"
    config = json.loads(next(path for path in (GOLDEN / name, WHOLE / name) if path.exists()).read_text())["config"]
    if family != "swin":
        return config["mae"]
    # A Swin's patch is a token's; the patch of its mask is the unit.
    decoder = {key: config["mae"][f"decoder_{key}"] for key in ("embed_dim", "depth", "num_heads")}
    return {**config["encoder"], "unit": config["mae"]["patch_size"]} | {f"decoder_{k}": v for k, v in decoder.items()}


def recorded_autoencoder(
    family: str, compat: str | None, norm_pix_loss: bool = True, dtype: torch.dtype = torch.float64, **options
) -> MaskedAutoencoder:
    """The recorded autoencoder with its parameters."""
    model = create_model(
        family.removesuffix("16"), **sizes(family), norm_pix_loss=norm_pix_loss, compat=compat, **options
    )
    state, record = recorded(f"{family}_mae_state")
    buffers = [key for key in record["buffers"] if not key.endswith(STATISTICS)]
    constants = {key: value for key, value in model.state_dict().items() if key in buffers}
    # What is recorded of them must be what the model computes.
    assert all(torch.equal(state[key], value) for key, value in constants.items() if key in state)
    model.load_state_dict({**constants, **state}, strict=True)
    return model.to(dtype)


def classifier(family: str, compat: str | None = "original", **options) -> Classifier:
    """A fresh classifier of the recorded sizes."""
    own = {key: value for key, value in sizes(family).items() if not key.startswith("decoder_")}
    own.pop("qkv_bias", None)
    return create_classifier(family, **own, num_classes=CLASSES, compat=compat, **options)


def images(family: str) -> tuple[Tensor, Tensor | None, Tensor]:
    """Images and adversarial images [B,3,H,W] in [0,1], these where they are at hand, labels [B]."""
    tensors, _ = recorded(f"{family}_images")
    return tensors["images"], tensors.get("adv_images"), tensors["labels"]
