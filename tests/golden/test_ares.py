"""Numbers recorded from ARES's fine-tuning of a Swin: losses of the attack's iterates, and which of them an image gets back."""

import pytest
import torch

from mimir_fast.attacks.pgd_mae import frozen_twin, linf_bounds
from mimir_fast.training.finetune_step import (
    ClassifierAttack,
    ClassifierAttackFunctions,
    attack_images,
    image_losses,
)
from tests.golden.test_families import recorded_classifier
from tests.support.family_golden import images, recorded


def attacked(name: str, start: torch.Tensor, targets: torch.Tensor, shared: bool):
    """The adversarial images, the losses [B] of the start and of all iterates, and the recording's scalars."""
    _, record = recorded(name)
    seen = []

    def losses(*inputs):
        loss_B = image_losses(*inputs)
        seen.append(loss_B.detach())
        return loss_B

    bounds = linf_bounds(record["eps"], record["attack_lr"], 0.0, 1.0, 3, "cpu")
    attack = ClassifierAttack("pgd_best", record["attack_steps"], bounds, shared=shared)
    model = frozen_twin(recorded_classifier("swin")).eval()
    functions = ClassifierAttackFunctions(losses=losses)
    return attack_images(model, images("swin")[0], targets, start, attack, functions), seen, record


def test_labels_choose_an_iterate_for_each_image():
    """With steps that overshoot: the first image keeps the last iterate, the second the one before it."""
    tensors, _ = recorded("swin_ares_large_step")
    labels = images("swin")[2]
    adv, seen, record = attacked("swin_ares_large_step", tensors["start_noise"], labels, shared=True)
    assert torch.allclose(torch.stack(seen), torch.tensor(record["losses_of_iterates"]), atol=1e-5)
    assert torch.stack(seen).argmax(dim=0).tolist() == [which for (which,) in record["returned_iterate_per_image"]]
    assert (adv - tensors["adv"]).abs().gt(1e-6).sum() <= 4


def test_mixed_targets_choose_one_iterate_for_the_batch_in_the_original():
    tensors, _ = recorded("swin_ares_train")
    adv, seen, record = attacked("swin_ares_train", tensors["start_noise"], tensors["soft_labels"], shared=True)
    assert [loss.mean().item() for loss in seen] == pytest.approx(record["losses_of_iterates"], abs=1e-5)
    assert (adv - tensors["adv"]).abs().gt(1e-6).sum() <= 4
    # Our default: each image its own best, which is never worse.
    own, _, _ = attacked("swin_ares_train", tensors["start_noise"], tensors["soft_labels"], shared=False)
    model = frozen_twin(recorded_classifier("swin")).eval()
    best, same = (image_losses(model, each, tensors["soft_labels"]) for each in (own, adv))
    assert (best >= same - 1e-6).all()


def test_the_first_epoch_trains_on_uniform_noise():
    """Its step is 0, so that the start and all iterates are the same: the earliest is kept."""
    clean = images("swin")[0]
    start = (torch.rand(clean.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 4 / 255
    adv, seen, record = attacked("swin_ares_train_epoch0", start, images("swin")[2], shared=False)
    assert len(set(record["losses_of_iterates"])) == 1
    assert all(torch.equal(loss, seen[0]) for loss in seen)
    assert torch.equal(adv, (clean + start).clamp(0, 1))
