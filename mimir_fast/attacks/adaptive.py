"""Adaptive attacks on MIMIR: on the mutual information and on the features.

Shapes: B batch, C channels, H W sides, L patches, D width.  Source: MIMIR, arXiv 2312.04960, section 5, adaptive attacks.
"""

import torch.nn.functional as F
from torch import Tensor

from mimir_fast.attacks.named import Loss
from mimir_fast.kernels import nhsic
from mimir_fast.models.features import FeatureClassifier, FeatureModel

# Bandwidth of nHSIC, that of the training's penalty.
SIGMA = 5.0


def mutual_information_loss(model: FeatureClassifier, labels: Tensor, weight: float, kernels: str = "auto") -> Loss:
    """Mean cross-entropy + weight * nHSIC(features, adversarial images), with the gradient through both of its arguments.

    nHSIC is a property of the batch, so that an image's attack depends on the other images of its batch.
    """

    def loss(adv: Tensor) -> Tensor:
        # One forward pass for both terms.
        tokens = model.forward_features(adv)
        dependence = nhsic(tokens.flatten(1), adv.flatten(1), SIGMA, impl=kernels)
        return F.cross_entropy(model.classify(tokens), labels) + weight * dependence

    return loss


def feature_loss(model: FeatureModel, images: Tensor) -> Loss:
    """Squared distance of the features [B,1+L,D] from the clean images', summed over the images."""
    # The original ascends the Frobenius norm n over the whole batch.  An image's gradient of the sum of squares is 2n times its
    # gradient of n: the same signs, hence the same attack, but without the other images.
    clean = model.forward_features(images).detach()
    return lambda adv: (model.forward_features(adv) - clean).square().sum()
