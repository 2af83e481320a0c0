"""Samples of an analysis: images, adversarial images, features and predictions of a model.

Shapes: B batch, N images, C channels, H W sides, L patches.  fp32, pixels in [0,1].
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.attacks.linf import attack_bounds
from mimir_fast.attacks.named import Attack, cross_entropy, gradient_attack, start_noise
from mimir_fast.attacks.pgd_mae import ascend_reconstruction
from mimir_fast.checkpoints.trained_models import Trained, latent_tokens, normalised
from mimir_fast.data import to_float
from mimir_fast.models import Classifier, MaskedAutoencoder


@dataclass(frozen=True)
class Perturbation:
    """PGD against the model's own task: reconstruction for an autoencoder, cross-entropy for a classifier.

    eps and alpha in 1/255.  Every image's random draws are a function of the seed and of its index in the data set.
    """

    eps: float
    alpha: float
    steps: int
    seed: int = 0


class Seen(NamedTuple):
    """N samples, on the CPU.

    x, x_adv           images and adversarial images [N,C*H*W]
    latent             features of the adversarial images [N,L*D]
    labels             int64 [N]
    right, right_adv   whether a classifier predicts the label of x and x_adv, bool [N]; None for an autoencoder
    """

    x: Tensor
    x_adv: Tensor
    latent: Tensor
    labels: Tensor
    right: Tensor | None
    right_adv: Tensor | None


def look(
    trained: Trained,
    batches: Iterable[tuple[Tensor, Tensor]],
    indices: Tensor,
    perturbation: Perturbation,
    tick: Callable[[], None] = lambda: None,
) -> Seen:
    """Attack batches of uint8 images [B,C,H,W] with labels [B].

    indices   int64 [N], the images' indices in the data set
    tick      called after each batch
    """
    device = next(trained.model.parameters()).device
    parts, first = [], 0
    for images_u8, labels in batches:
        own = indices[first : first + len(labels)].to(device)
        parts.append(_look_at_batch(trained, to_float(images_u8.to(device)), labels.to(device), own, perturbation))
        first += len(labels)
        tick()
    columns = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
    return Seen._make(columns)


def _look_at_batch(trained: Trained, x: Tensor, labels: Tensor, indices: Tensor, how: Perturbation) -> Seen:
    model = trained.model
    right = right_adv = None
    if isinstance(model, Classifier):
        attack = Attack("pgd", how.steps, how.eps, how.alpha)
        x_adv = gradient_attack(cross_entropy(model, labels), x, indices, attack, how.seed, 0)
    else:
        x_adv = attack_reconstruction(trained, x, indices, how)
    with torch.no_grad():
        latent = latent_tokens(trained, x_adv)
        if isinstance(model, Classifier):
            right, right_adv = (model(images).argmax(1).eq(labels).cpu() for images in (x, x_adv))
    # To the CPU batch by batch: features of all images need not fit on the device.
    rows = (tensor.flatten(1).float().cpu() for tensor in (x, x_adv, latent))
    return Seen._make((*rows, labels.cpu(), right, right_adv))


def attack_reconstruction(trained: Trained, x: Tensor, indices: Tensor, how: Perturbation) -> Tensor:
    """PGD-MAE as in pre-training, on the images as the training saw them; returns pixels [B,C,H,W] in [0,1]."""
    model, device, args = trained.model, x.device, trained.args
    assert isinstance(model, MaskedAutoencoder)
    mean, std = args["mean"] or (0.0,) * 3, args["std"] or (1.0,) * 3
    bounds = attack_bounds(how.eps, how.alpha, device, x.shape[1], args["mean"], args["std"])
    start = start_noise(indices, x.shape[1:], how.seed) * bounds[0, :, None, None]
    # Masks come from the same generator as the start, as if they were further restarts.
    rows, patches = model.noise_shape(len(x))
    masks = [start_noise(indices[:rows], torch.Size([patches]), how.seed, 1 + step) for step in range(how.steps)]
    ratio = args.get("attack_mask_ratio", 0.75)
    adv = ascend_reconstruction(model, normalised(trained, x), bounds, how.steps, ratio, start, masks)
    means, stds = (x.new_tensor(values)[:, None, None] for values in (mean, std))
    # Back in pixels, where rounding may leave the range by one unit in the last place.
    return (adv * stds + means).clamp(0, 1)
