"""A further family of models, as its one file would hold it: unlike the Vision Transformer in all that a record can say.

Its stem looks across the patches' borders, so that it is given whole images; kept patches stay on the full grid among mask
tokens; it has no class token, and an autoencoder's encoder is a module of its own.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models import Classifier, MaskedAutoencoder
from mimir_fast.models.family import Family, Network, Resized, Tensors, TimmModel
from mimir_fast.models.layers import check_images


class ToyBlock(nn.Module):
    """x [B,L,D] -> x + a layer of its neighbours' mean."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.layer(x.roll(1, dims=1) + x.roll(-1, dims=1)).tanh()


class ToyEncoder(nn.Module):
    """Images [B,3,H,W] -> tokens [B,L,D]."""

    def __init__(self, img_size: int, patch_size: int, width: int, depth: int, shift: bool = False):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None
        self.table = nn.Parameter(torch.randn(1, (img_size // patch_size) ** 2, width) * 0.02)
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.project = nn.Conv2d(3, width, patch_size, patch_size)
        self.layers = nn.ModuleList([ToyBlock(width) for _ in range(depth)])
        self.last = nn.LayerNorm(width)

    def embed(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.project(self.stem(images)).flatten(2).transpose(1, 2) + self.table
        return tokens if self.shift is None else tokens + self.shift

    def run(self, tokens: Tensor) -> Tensor:
        for block in self.layers:
            tokens = block(tokens)
        return self.last(tokens)


class ToyAutoencoder(MaskedAutoencoder):
    """Mask tokens stand for removed patches in encoder and decoder."""

    prefix_tokens = 0

    def __init__(
        self, img_size=16, patch_size=4, width=8, depth=2, norm_pix_loss=False, shift=False, kernels="auto", **_
    ):
        super().__init__()
        self.img_size, self.in_chans, self.patch_size = img_size, 3, patch_size
        self.num_patches, self.norm_pix_loss, self.kernels = (img_size // patch_size) ** 2, norm_pix_loss, kernels
        self.encoder = ToyEncoder(img_size, patch_size, width, depth, shift)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_pred = nn.Linear(width, 3 * patch_size**2)

    def visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        return images

    def encode(self, visible: Tensor, ids_keep: Tensor) -> Tensor:
        tokens = self.encoder.embed(visible)
        kept = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device).scatter(1, ids_keep, True)
        tokens = self.encoder.run(torch.where(kept[:, :, None], tokens, self.mask_token))
        return tokens.gather(1, ids_keep[:, :, None].expand(-1, -1, tokens.shape[2]))

    def decode(self, latent: Tensor, ids_shuffle: Tensor, query_start: int) -> Tensor:
        positions = self.encoder.table[0][ids_shuffle[:, latent.shape[1] :]]
        removed = self.mask_token + positions + latent.mean(1, keepdim=True)
        return self.decoder_pred(torch.cat([latent, removed], dim=1)[:, query_start:])


class ToyClassifier(ToyEncoder, Classifier):
    """The mean over the tokens decides."""

    def __init__(
        self,
        img_size=16,
        patch_size=4,
        num_classes=2,
        width=8,
        depth=2,
        mean=None,
        std=None,
        shift=False,
        kernels="auto",
        **_,
    ):
        super().__init__(img_size, patch_size, width, depth, shift)
        for name, values in (("mean", mean), ("std", std)):
            constants = torch.tensor(values or float(name == "std")).view(-1, 1, 1)
            self.register_buffer(name, constants, persistent=False)
        self.img_size, self.in_chans, self.num_classes, self.kernels = img_size, 3, num_classes, kernels
        self.num_patches, self.drop_rates = (img_size // patch_size) ** 2, [0.0] * depth
        self.head = nn.Linear(width, num_classes)

    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        check_images("images", images, 3, self.img_size)
        return self.run(self.embed((images - self.mean) / self.std))

    def classify(self, features: Tensor) -> Tensor:
        return self.head(features.mean(1))


def layer_of(name: str, model: nn.Module) -> int:
    if name.startswith("layers."):
        return int(name.split(".")[1]) + 1
    return 3 if name.startswith(("last.", "head.")) else 0


def read(tensors: Tensors) -> dict[str, Any]:
    found = {"width": tensors["table"].shape[2], "patch_size": tensors["project.weight"].shape[-1]}
    found["depth"] = len({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    found["img_size"] = found["patch_size"] * math.isqrt(tensors["table"].shape[1])
    found["shift"] = "shift" in tensors
    return found | ({"num_classes": len(tensors["head.weight"])} if "head.weight" in tensors else {})


def adapt(classifier: ToyClassifier, tensors: Tensors) -> None:
    if "shift" in tensors and classifier.shift is None:
        classifier.shift = nn.Parameter(torch.zeros_like(tensors["shift"]))


def resize(table: Tensor, shape: tuple[int, ...]) -> Resized:
    before, after = (math.isqrt(n) for n in (table.shape[1], shape[1]))
    rows = table.unflatten(1, (before, before)).permute(0, 3, 1, 2)
    rows = F.interpolate(rows, (after, after), mode="nearest")
    return Resized(rows.flatten(2).transpose(1, 2), f"from {before} to {after}")


TOY = Family(
    name="toy",
    title="toy model",
    autoencoder=ToyAutoencoder,
    classifier=ToyClassifier,
    sizes={"toy_small": {"width": 8, "depth": 2}, "toy_wide": {"width": 16, "depth": 2}},
    decoder={},
    aliases={"mae_toy_tiny": "mae_toy_small"},
    masking="images",
    encoder_prefix="encoder.",
    encoder=("table", "shift", "stem.*", "project.*", "layers.*", "last.*"),
    fresh=("head.*",),
    undecayed=("table", "layers.*.layer.weight"),
    blocks=(ToyBlock,),
    depth=lambda model: len(model.layers),
    layer_of=layer_of,
    marks=("table", "stem.weight"),
    read=read,
    free=("img_size", "patch_size", "num_classes", "shift"),
    adapt=adapt,
    describe=lambda found: f"width {found['width']}",
    tables=("table",),
    resize=resize,
    timm=lambda name, keywords: TimmModel(
        f"timm_{name}", keywords | {"num_classes": keywords.get("num_classes", 0)}, "stem", "head.fc"
    ),
    timm_key=lambda name: None if name.startswith("stem.") else f"body.{name}",
    network=lambda name, keywords: Network("from toys import Toy\n", "Toy", keywords),
)
