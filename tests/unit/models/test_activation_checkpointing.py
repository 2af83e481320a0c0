"""--activation_checkpointing: the same numbers, bit for bit, with less kept between the passes."""

import copy

import pytest
import torch

from mimir_fast.attacks.pgd_mae import ascend_reconstruction, frozen_twin, linf_bounds
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve
from mimir_fast.models import create_model
from mimir_fast.training.pretraining import build_model

B, SIDE, PATCH = 3, 16, 4


def _pair(**options):
    """The same model twice: keeping everything, and computing its encoder blocks again."""
    plain = create_model("mae_vit_ti", img_size=SIDE, patch_size=PATCH, norm_pix_loss=True, depth=3, **options)
    again = copy.deepcopy(plain)
    again.activation_checkpointing = True
    return plain, again


def _step(model, images, noise, encode):
    """Loss and every gradient of one training pass, and the bytes it kept for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    ids_shuffle, _, keep = model.random_masking(noise, 0.75)
    ids_keep = ids_shuffle[:, :keep]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        latent = encode(model.patchify(images, ids_keep), ids_keep)
        loss, _ = model.reconstruct(latent, ids_shuffle, images)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_same_loss_and_gradients(compiled):
    plain, again = _pair()
    images, noise = torch.rand(B, 3, SIDE, SIDE), torch.rand(B, (SIDE // PATCH) ** 2)
    results = []
    for model in (plain, again):
        torch.compiler.reset()
        encode = torch.compile(model.encode, backend="aot_eager", fullgraph=True) if compiled else model.encode
        results.append(_step(model, images, noise, encode))
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = results
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        assert gradient is None if gradients_again[name] is None else torch.equal(gradient, gradients_again[name]), name
    if not compiled:  # a compiled function hides what it saves from the hooks
        assert kept_again < 0.7 * kept


def test_blocks_run_twice_and_the_attack_benefits():
    plain, again = _pair()
    images, noise = torch.rand(B, 3, SIDE, SIDE), torch.rand(B, (SIDE // PATCH) ** 2)
    bounds = linf_bounds(8 / 255, 10 / 255, 0.0, 1.0, 3, "cpu")
    adversarial, calls = [], []
    for model in (plain, again):
        twin, runs = frozen_twin(model), []
        for block in twin.blocks:
            block.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        start = torch.zeros(B, 3, SIDE, SIDE)
        adversarial.append(ascend_reconstruction(twin, images, bounds, start=start, mask_noise=[noise]))
        calls.append(len(runs))
    assert torch.equal(*adversarial)
    assert calls == [3, 6]


def test_flag_reaches_the_model():
    for flag in (True, False):
        config = PretrainConfig().updated({"input_size": 32, "patch_size": 8, "activation_checkpointing": flag})
        assert build_model(resolve(config, set()), torch.device("cpu")).activation_checkpointing == flag
