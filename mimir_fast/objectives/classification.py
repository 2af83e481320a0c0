"""Fine-tuning objective: all training passes of one micro-batch.  Shapes: B batch, C channels, H W sides, O classes."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimir_fast.config.choices import TRAINING_ATTACKS
from mimir_fast.models import Classifier
from mimir_fast.objectives.adversarial_losses import TWO_BRANCHES, cross_entropy, mart_loss, trades_loss
from mimir_fast.objectives.information import renyi_mi
from mimir_fast.training.stages import stage


class FinetuneOutput(NamedTuple):
    """Tensors on the device: loss (scalar); logits [B,O] of the images trained on, detached; these images, adv [B,C,H,W]."""

    loss: Tensor
    logits: Tensor
    adv: Tensor

    @property
    def checked(self) -> Tensor:
        """What the backward pass asks whether it is finite."""
        return self.loss


class ClassificationObjective(nn.Module):
    """The loss of a classifier on attacked images: the module that is trained, and that DDP wraps.

    kind         plain, pgd, pgd_best, apgd: the criterion on the images given; trades, mart: their loss on clean and
                 adversarial images, which pass through the model as one batch
    criterion    (logits, targets) -> scalar; trades and mart have their own, without smoothing, as in the original
    beta         weight of the robust term of trades and mart
    information  None, or weights (xz, yz) of an added xz I(images; features) - yz I(logits; features) in bits, with the
                 tokens of the images trained on as features
    features     the model's forward_features, or its compiled version
    Clean images pass through the model once, so that TRADES' two terms share a draw of stochastic depth; the original draws
    twice.
    """

    def __init__(
        self,
        model: Classifier,
        kind: str = "plain",
        criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        beta: float = 6.0,
        information: tuple[float, float] | None = None,
        features: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        if kind not in TRAINING_ATTACKS:
            raise ValueError(f"attack_train: got {kind!r}, expected one of {', '.join(TRAINING_ATTACKS)}")
        self.model, self.kind, self.criterion, self.beta = model, kind, criterion, beta
        self.information, self.features = information, features or model.forward_features

    def forward(self, images: Tensor, adv: Tensor, targets: Tensor, drop_noise: Tensor | None = None) -> FinetuneOutput:
        """images [B,C,H,W], their adversarial version, targets [B] or [B,O], drop_noise of all images that pass."""
        both = self.kind in TWO_BRANCHES
        with stage("encoder"):
            tokens = self.features(torch.cat([images, adv]) if both else adv, drop_noise)
            logits = self.model.classify(tokens)
        with stage("loss"):
            # Adversarial images come last.
            seen = logits[-len(adv) :]
            loss = self._two_branches(logits, targets) if both else self.criterion(logits, targets)
            if self.information:
                loss = loss + information_term(self.information, images, tokens[-len(adv) :], seen)
        return FinetuneOutput(loss, seen.detach(), adv)

    def _two_branches(self, logits: Tensor, targets: Tensor) -> Tensor:
        clean, adv = logits.chunk(2)
        loss = trades_loss if self.kind == "trades" else mart_loss
        return loss(clean, adv, targets, self.beta)


def information_term(weights: tuple[float, float], images: Tensor, tokens: Tensor, logits: Tensor) -> Tensor:
    """Deep information bottleneck: xz I(images; tokens) - yz I(logits; tokens) of [B,C,H,W], [B,1+L,D] and [B,O]."""
    with stage("penalty"):
        of_images, of_logits = (renyi_mi(seen.flatten(1), tokens.flatten(1)) for seen in (images, logits))
        return weights[0] * of_images - weights[1] * of_logits
