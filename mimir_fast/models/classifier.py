"""Base class of classifiers: what a family must provide.

Shapes: B batch, C channels, H W sides, L patches, D width, O classes."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from mimir_fast.models.layers import check_counts


class Classifier(nn.Module, ABC):
    """Features of an image, then logits.

    A family provides `forward_features` and `classify`, and these attributes:

    img_size, in_chans   the images are [B,in_chans,img_size,img_size]
    num_patches          L of an image; the memory prediction asks for it
    num_classes          O of the logits
    head                 the linear layer that gives the logits; by its name a file is recognised as a classifier's
    drop_rates           every block's rate of stochastic depth; branches: of a block, each left out by a draw of its own
    kernels              implementation of the operations in mimir_fast.kernels
    compat               "original" where it computes and is trained as the original does, else None: models/compat.py
    """

    img_size: int
    in_chans: int
    num_patches: int
    num_classes: int
    head: nn.Linear
    drop_rates: Sequence[float]
    # The residual additions of a Transformer block: attention and MLP.
    branches: int = 2
    kernels: str
    compat: str | None = None

    @abstractmethod
    def forward_features(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W] -> features, which `classify` takes: tokens [B,1+L,D], or their mean [B,D].

        drop_noise: uniform draws [depth,branches,B] of stochastic depth, for attention and MLP of every block; None: nothing is
        left out.  Raises ValueError for images of another size.
        """

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """What `forward_features` returns -> logits [B,O]."""

    def forward(self, images: Tensor, drop_noise: Tensor | None = None) -> Tensor:
        """images [B,C,H,W], draws of stochastic depth (see `forward_features`) -> logits [B,O]."""
        return self.classify(self.forward_features(images, drop_noise))


def check_head(num_classes: int, drop_path: float) -> None:
    """Raises ValueError for arguments that no classifier can have."""
    check_counts(nb_classes=num_classes)
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path: expected 0 <= rate < 1, got {drop_path}")


def rising_rates(drop_path: float, depth: int) -> list[float]:
    """Rates of stochastic depth, from 0 in the first block to drop_path in the last."""
    # Later blocks are dropped more often: Huang et al., Deep Networks with Stochastic Depth, 2016.
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]
