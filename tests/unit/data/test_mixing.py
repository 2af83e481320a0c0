"""Mixup and CutMix equal timm's, bit by bit, for the same draws; what no mixing leaves; the warm-up."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from mimir_fast.data import DataError, Mixing, mix, mixing_seed, warmup_mixing

SETTINGS = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.8, "cutmix": 0.5, "switch_prob": 0.4},
    "minmax": {"cutmix_minmax": (0.2, 0.8)},
    "both, minmax": {"mixup": 0.4, "cutmix_minmax": (0.2, 0.8)},
    "seldom": {"mixup": 0.8, "cutmix": 1.0, "prob": 0.3},
}


def batch(count: int = 6, height: int = 12, width: int = 16):
    """Images that say where they come from, and labels; label 2 twice."""
    return torch.rand(count, 3, height, width), torch.arange(count).clamp(max=4)


def timm_mix(mixing: Mixing, images, labels, seed: int):
    m = mixing
    options = {"prob": m.prob, "switch_prob": m.switch_prob, "mode": m.mode, "num_classes": m.num_classes}
    mixup = Mixup(m.mixup, m.cutmix, m.cutmix_minmax, label_smoothing=m.smoothing, **options)
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        return mixup(images.clone(), labels)
    finally:
        np.random.set_state(before)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_timm_for_the_same_draws(name, mode):
    mixing = Mixing(**SETTINGS[name], mode=mode, smoothing=0.1, num_classes=7)
    images, labels = batch()
    before = images.clone()
    for seed in range(12):
        ours, theirs = mix(mixing, images, labels, seed), timm_mix(mixing, images, labels, seed)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert torch.equal(images, before)


def test_targets_are_the_images_shares():
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for settings in SETTINGS.values():
        mixing = Mixing(**settings, mode="elem", smoothing=0.0, num_classes=2)
        for seed in range(20):
            mixed, targets = mix(mixing, images, torch.tensor([0, 1]), seed)
            torch.testing.assert_close(mixed.mean((1, 2, 3)), targets[:, 1], atol=1e-6, rtol=0)
            torch.testing.assert_close(targets.sum(1), torch.ones(2))


def test_nothing_mixed_still_gives_soft_targets():
    images, labels = batch()
    mixed, targets = mix(Mixing(mixup=1.0, prob=0.0, smoothing=0.2, num_classes=5), images, labels, 0)
    assert torch.equal(mixed, images)
    assert targets[0].tolist() == pytest.approx([0.84, 0.04, 0.04, 0.04, 0.04])
    assert targets.argmax(1).equal(labels)


def test_seeds_decide_and_global_generators_stay():
    images, labels = batch()
    mixing = Mixing(mixup=0.8, cutmix=1.0, num_classes=5)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = mix(mixing, images, labels, 3)
    np.random.seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, mix(mixing, images, labels, 3)))
    assert not torch.equal(first[0], mix(mixing, images, labels, 4)[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert len({mixing_seed(*position) for position in np.eye(5, 4, dtype=int).tolist()}) == 5


def test_half_precision_stays():
    images, labels = batch()
    mixed, targets = mix(Mixing(mixup=0.8, num_classes=5), images.bfloat16(), labels, 0)
    assert (mixed.dtype, targets.dtype) == (torch.bfloat16, torch.float32)


def test_an_odd_batch_mixes_its_middle_with_itself():
    images, labels = batch(5)
    for mode in ("batch", "elem"):
        mixed, targets = mix(Mixing(mixup=0.8, mode=mode, smoothing=0.0, num_classes=5), images, labels, 0)
        torch.testing.assert_close(mixed[2], images[2])
        assert targets[2].tolist() == pytest.approx([0, 0, 1, 0, 0])
    with pytest.raises(DataError, match="batch_size: 5"):
        mix(Mixing(mixup=0.8, mode="pair", num_classes=5), images, labels, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait():
    images, labels = (part.cuda() for part in batch())
    expected = mix(Mixing(mixup=0.8, cutmix=1.0, num_classes=5), images.cpu(), labels.cpu(), 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for mode in ("batch", "pair", "elem"):
            mixed = mix(Mixing(mixup=0.8, cutmix=1.0, num_classes=5, mode=mode), images, labels, 1)
            if mode == "batch":
                first = mixed
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, truth in zip(first, expected):
        torch.testing.assert_close(ours.cpu(), truth)


def test_warmup_follows_the_schedule_and_stays():
    flags = Mixing(mixup=0.3, switch_prob=0.7, smoothing=0.2, num_classes=5)
    epochs = [warmup_mixing(epoch, flags) for epoch in range(30)]
    assert [m.prob for m in epochs[:11]] == [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 0.9, 0.95, 1.0]
    assert [(m.mixup, m.cutmix, m.switch_prob) for m in epochs[:6]] == [(0.3, 0.0, 0.7)] * 6
    assert [m.switch_prob for m in epochs[6:11]] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert all((m.mixup, m.cutmix, m.smoothing) == (0.8, 1.0, 0.2) for m in epochs[6:])
    assert all(m == epochs[10] for m in epochs[10:])
    off = Mixing(num_classes=5)
    assert [warmup_mixing(epoch, off).active for epoch in (5, 6)] == [False, True]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"mixup": -0.1}, "mixup: -0.1"),
        ({"cutmix": float("nan")}, "cutmix: nan"),
        ({"prob": 1.1}, "mixup_prob: 1.1"),
        ({"switch_prob": -1}, "mixup_switch_prob: -1"),
        ({"mode": "half"}, "mixup_mode: half, expected one of batch, pair, elem"),
        ({"smoothing": 1.0}, "smoothing: 1.0"),
        ({"cutmix_minmax": (0.8, 0.2)}, "cutmix_minmax"),
        ({"cutmix_minmax": (0.2,)}, "cutmix_minmax"),
    ],
)
def test_impossible_settings(flags, named):
    with pytest.raises(DataError) as caught:
        Mixing(**flags)
    assert named in str(caught.value)
