"""Losses of adversarial training.  Shapes: B batch, O classes; logits [B,O] of any float type, computed in fp32 at least.

Targets are labels [B] int64, or probabilities [B,O] where labels are mixed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Losses on clean and adversarial images.
TWO_BRANCHES = ("trades", "mart")


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy; smoothing applies to labels [B] only."""
    # Mixed labels were smoothed when they were mixed.
    smoothing = 0.0 if targets.is_floating_point() else smoothing
    return F.cross_entropy(_wide(logits), targets, label_smoothing=smoothing)


def attack_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy [B] of every image without smoothing, which attacks ascend."""
    return F.cross_entropy(_wide(logits), targets, reduction="none")


def trades_loss(clean: Tensor, adv: Tensor, targets: Tensor, beta: float) -> Tensor:
    """TRADES: CE(clean) + beta * KL(p_clean || p_adv), means over the batch; the gradient flows through both.

    Source: Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, 2019.
    """
    log_clean, log_adv = (_wide(logits).log_softmax(dim=1) for logits in (clean, adv))
    # torch's kl_div(a, b) is KL(b || a).
    divergence = F.kl_div(log_adv, log_clean, reduction="batchmean", log_target=True)
    return F.cross_entropy(_wide(clean), targets) + beta * divergence


def mart_loss(clean: Tensor, adv: Tensor, targets: Tensor, beta: float) -> Tensor:
    """MART: boosted CE(adv) + beta * KL(p_clean || p_adv) * (1 - p_clean of the label), means over the batch.

    boosted CE   CE(adv) - log(1 - p_adv of the likeliest wrong class)
    targets      labels; raises ValueError for probabilities
    Source: Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, 2020.
    """
    if targets.is_floating_point():
        raise ValueError("attack_train: mart needs one label per image, got mixed ones")
    clean, adv, label = _wide(clean), _wide(adv), targets[:, None]
    # The clean prediction stays in logarithms: p log p of one that is exactly 0 would have a NaN gradient.
    log_clean, p_adv = clean.log_softmax(dim=1), adv.softmax(dim=1)
    # The small constants here and below are those of the authors' code, which the original uses.
    # -1 is below any probability: the maximum is over the other classes.
    p_wrong = p_adv.scatter(1, label, -1).amax(dim=1)
    boosted = F.cross_entropy(adv, targets) - (1.0001 - p_wrong + 1e-12).log().mean()
    divergence = F.kl_div((p_adv + 1e-12).log(), log_clean, reduction="none", log_target=True).sum(dim=1)
    return boosted + beta * (divergence * (1.0000001 - log_clean.gather(1, label)[:, 0].exp())).mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
