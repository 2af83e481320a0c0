"""Protocols of models that give features, of ours and of others."""

from typing import Protocol, runtime_checkable

from torch import Tensor


# isinstance compares names of methods alone, so that timm's models are FeatureModels too.
@runtime_checkable
class FeatureModel(Protocol):
    """A model that gives features of images [B,C,H,W], as ours and timm's do."""

    def forward_features(self, images: Tensor, /) -> Tensor:
        """Features, such as tokens [B,1+L,D]."""
        ...


@runtime_checkable
class FeatureClassifier(FeatureModel, Protocol):
    """A FeatureModel whose head can be applied to the features alone."""

    def classify(self, features: Tensor, /) -> Tensor:
        """Logits [B,O] of what `forward_features` returns."""
        ...
