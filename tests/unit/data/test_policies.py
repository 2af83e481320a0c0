"""Augmentation is a function of the position, and does what the library or the paper says."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms as tv

from mimir_fast.config.choices import EDM_AUGMENTATIONS
from mimir_fast.data import Augment, DataError, build_pretrain_data, build_train_data, idbh, warmup_augment
from mimir_fast.data.erasing import cutout
from mimir_fast.data.idbh import color_or_shape, crop_shift
from mimir_fast.data.policies import Augmentation
from mimir_fast.data.randomness import Purpose, borrowed_generators, random_stream
from tests.unit.data.test_layouts import random_image, write_cifar10, write_classes

RAND = "rand-m9-mstd0.5-inc1"
AUGMENTS = {
    "noaug": Augment(),
    "rand": Augment(RAND, reprob=0.5, recount=2),
    "augmix": Augment("augmix-m5"),
    "jitter": Augment("3a", color_jitter=0.4, reprob=0.5, remode="rand"),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """CIFAR-10 with generated images, and class folders of larger ones: 20 images each."""
    root = tmp_path_factory.mktemp("data")
    write_cifar10(root)
    generated = np.stack([random_image(100 + number, 32) for number in range(30)])
    np.savez(root / "aux.npz", image=generated, label=np.arange(30) % 10)
    write_classes(root / "folder" / "train", 10, 48)
    return root


@pytest.fixture(scope="module", params=[*AUGMENTS, "folder", *EDM_AUGMENTATIONS])
def build(request, roots):
    """A function of keyword arguments that builds a stream of 20 images, batches of 4."""
    if request.param in EDM_AUGMENTATIONS:
        options = {"augment": Augment(), "use_edm": True, "aux_data_filename": roots / "aux.npz"}
        return lambda **flags: build_train_data("cifar10", roots, 32, 4, edm_aug=request.param, **{**options, **flags})
    if request.param == "folder":
        return lambda **flags: build_train_data(
            "imagefolder", roots / "folder", 24, 4, **{"augment": AUGMENTS["rand"], **flags}
        )
    return lambda **flags: build_train_data("cifar10", roots, 32, 4, **{"augment": AUGMENTS[request.param], **flags})


def images_of(stream, epoch=0, start_step=0):
    """[steps,B,3,S,S]"""
    return torch.stack([images for images, _ in stream.epoch(epoch, start_step)])


def test_workers_resuming_and_global_state_do_not_matter(build):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    whole = images_of(build(), 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    helped = build(num_workers=2)
    try:
        for start in (2, 0):
            assert torch.equal(images_of(helped, 1, start), whole[start:])
    finally:
        helped.close()
    assert torch.equal(images_of(build(), 1, 3), whole[3:])
    others = (build(seed=1), 1), (build(), 0)
    assert not any(torch.equal(images_of(*other), whole) for other in others)


def test_without_augmentation_small_images_are_those_of_pretraining(roots):
    ours = build_train_data("cifar10", roots, 24, 4, augment=Augment(), seed=2)
    pretraining = build_pretrain_data("cifar10", roots, 24, 4, seed=2)
    for (images, labels), (expected, targets) in zip(ours.epoch(1), pretraining.epoch(1)):
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)


def each(batch, function):
    """Apply function(image, number) to every image [B,3,H,W]."""
    results = [function(Image.fromarray(i.permute(1, 2, 0).numpy()), n) for n, i in enumerate(batch)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in results])).permute(0, 3, 1, 2)


def test_randaugment_is_timms_after_crop_and_flip(roots):
    """The same library call on the same images with the same seeds, at every position."""
    settings = {"translate_const": 14, "img_mean": (0, 0, 0), "interpolation": Image.Resampling.BICUBIC}
    timm = rand_augment_transform("rand-m6-mstd0.5-inc1", settings)  # below 9: no posterising to nothing
    stream = build_train_data(
        "cifar10", roots, 32, 4, augment=Augment("rand-m6-mstd0.5-inc1"), seed=2, rank=1, world_size=2
    )
    plain = build_train_data("cifar10", roots, 32, 4, augment=Augment(), seed=2, rank=1, world_size=2)
    changed = 0
    for step, ((images, _), (before, _)) in enumerate(zip(stream.epoch(3), plain.epoch(3))):

        def augmented(image, number, step=step):
            with borrowed_generators() as seed_globals:
                seed_globals(random_stream(2, Purpose.AUGMENT_IMAGE, 3, 1, step, number, 1))
                return timm(image)

        assert torch.equal(images, each(before, augmented))
        changed += sum(not torch.equal(a, b) for a, b in zip(images, before))
    assert 1 <= changed <= 8


def test_equal_images_get_different_augmentations(tmp_path):
    for number in range(16):
        path = tmp_path / "train" / "ant" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(0, 8)).resize((40, 40)).save(path)
    ((images, _),) = build_train_data("imagefolder", tmp_path, 40, 16, augment=Augment("augmix-m9")).epoch(0)
    assert len({image.numpy().tobytes() for image in images}) == 16


def test_borrowed_generators_are_put_back_after_an_error():
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draws = []

    def fail():
        with borrowed_generators() as seed_globals:
            for _ in range(2):
                seed_globals(np.random.default_rng(0))
                draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draws[0] == draws[1]
    assert random.getstate() == state[0]
    assert np.random.get_state()[1].tolist() == state[1]
    assert torch.equal(torch.get_rng_state(), state[2])


def test_crops_at_random_scale_are_smaller_with_aa(tmp_path):
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None], (128, 128, 3))  # a colour per column
    for number in range(150):
        path = tmp_path / "ant" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(ramp if number % 2 else ramp.transpose(1, 0, 2)).save(path)

    def smallest(aa):
        """Part of the images' width or height that the narrowest crop covers."""
        ((images, _),) = build_train_data("imagefolder", tmp_path, 32, 150, augment=Augment(aa)).epoch(0)
        return int((images.amax((1, 2, 3)).int() - images.amin((1, 2, 3)).int()).min()) / 128

    without, with_aa = smallest("noaug"), smallest("rand-m1-n0")  # n0: no operations
    assert np.sqrt(0.2 * 3 / 4) - 0.02 < without < 0.5
    assert np.sqrt(0.08 * 3 / 4) - 0.02 < with_aa < 0.35


def test_colour_jitter_beside_aa_follows_timm():
    counts = {aa: len(Augmentation(Augment(aa, color_jitter=0.4)).plan(0, 32).after) for aa in ("noaug", RAND, "3a")}
    assert counts == {"noaug": 1, RAND: 1, "3a": 2}


@pytest.mark.parametrize("aa", ["rand-m10", "rand-m10-inc1", "rand-m9-mstd101-n5", "augmix-m10", "v0r", "originalr"])
def test_every_strength_runs(aa):
    (operation,) = Augmentation(Augment(aa)).plan(0, 32).after
    image = Image.fromarray(random_image(0, 32))
    with borrowed_generators() as seed_globals:
        for number in range(60):
            seed_globals(np.random.default_rng(number))
            assert operation(image, None).size == (32, 32)


def test_warmup_strengthens_by_the_epoch(roots):
    names = [warmup_augment(epoch, Augment(reprob=0.1)).aa for epoch in range(12)]
    assert names == [f"rand-m{m}-mstd0.5-inc1" for m in (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9)]
    assert warmup_augment(3, Augment(reprob=0.1)).reprob == 0.1
    stream = build_train_data("cifar10", roots, 32, 4, augment=Augment(), warmup_aa=True)
    for epoch, aa in ((0, "rand-m1-mstd0.5-inc1"), (7, "rand-m7-mstd0.5-inc1"), (20, RAND)):
        expected = build_train_data("cifar10", roots, 32, 4, augment=Augment(aa))
        assert torch.equal(images_of(stream, epoch), images_of(expected, epoch))


# ---- the augmentations of images mixed with generated ones


def whole_images(roots, edm_aug, size=32, seed=0):
    flags = {"use_edm": True, "aux_data_filename": roots / "aux.npz", "edm_aug": edm_aug, "seed": seed}
    return next(build_train_data("cifar10", roots, size, 20, augment=Augment(), **flags).epoch(0))[0]


def known_views(roots):
    """Bytes of every real and generated image, as it is and mirrored."""
    images = [random_image(number, 32) for number in (*range(20), *range(100, 130))]
    return {i.tobytes() for i in images}, {np.ascontiguousarray(i[:, ::-1]).tobytes() for i in images}


def as_bytes(images):
    return [i.tobytes() for i in np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())]


def test_none_leaves_real_and_generated_images_alone(roots):
    as_is, _ = known_views(roots)
    assert all(image in as_is for image in as_bytes(whole_images(roots, "none")))
    larger = whole_images(roots, "none", 40)
    assert all(image in as_is for image in as_bytes(larger[..., 4:-4, 4:-4]))


def test_base_is_what_pretraining_does(roots):
    flags = {"use_edm": True, "aux_data_filename": roots / "aux.npz"}
    expected = next(build_pretrain_data("cifar10", roots, 32, 20, **flags).epoch(0))[0]
    assert torch.equal(whole_images(roots, "base"), expected)


def test_cutout_blackens_a_square_of_every_image(roots):
    different = (whole_images(roots, "cutout") != whole_images(roots, "base")).any(1)
    assert different.flatten(1).any(1).all()
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    rng = np.random.default_rng(0)
    masks = np.stack([np.asarray(cutout(white, rng))[..., 0] == 0 for _ in range(2000)])
    rows, columns = masks.any(2).sum(1), masks.any(1).sum(1)
    assert rows.max() == columns.max() == 18
    assert rows.min() == columns.min() == 9  # around a pixel at the border half lies outside
    assert np.array_equal(masks.sum((1, 2)), rows * columns)
    assert abs(masks[:, 0, 0].mean() - (10 / 32) ** 2) < 0.03  # centres 0 to 9
    assert abs(masks[:, 31, 31].mean() - (9 / 32) ** 2) < 0.03  # centres 23 to 31


def test_autoaugment_and_randaugment_are_torchvisions(roots):
    """Before crop and flip, or after; on the same images with the same seeds."""
    policy = tv.AutoAugment(tv.AutoAugmentPolicy.CIFAR10)

    def augmented(image, number):
        rng = random_stream(0, Purpose.AUGMENT_IMAGE, 0, 0, 0, number, 1)
        with borrowed_generators() as seed_globals:
            seed_globals(rng)
            return cutout(policy(image), rng)

    assert torch.equal(whole_images(roots, "autoaugment"), each(whole_images(roots, "base"), augmented))
    ours = whole_images(roots, "randaugment", 40)  # crops of 40 hold whole images, padded after the augmentation
    assert int(ours[..., :4, :].max()) == 0
    transform = tv.RandAugment(2, 14)

    def before(image, number):
        with borrowed_generators() as seed_globals:
            seed_globals(random_stream(0, Purpose.AUGMENT_IMAGE, 0, 0, 0, number, 0))
            return transform(image)

    inner = ours[..., 4:-4, 4:-4]
    expected = each(whole_images(roots, "none"), before)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(inner, expected))


def test_crop_shift_moves_a_part_and_blackens_the_rest():
    white, rng = Image.new("RGB", (32, 32), (255, 255, 255)), np.random.default_rng(0)
    masks = np.stack([np.asarray(crop_shift(white, rng))[..., 0] == 255 for _ in range(3000)])
    lost = 32 - masks.any(2).sum(1), 32 - masks.any(1).sum(1)
    counts = np.bincount(lost[0] + lost[1], minlength=12)
    assert len(counts) == 12  # 0 to 11 lines in all, equally often
    assert np.all(np.abs(counts - 250) < 5 * np.sqrt(250))
    assert np.array_equal(masks.sum((1, 2)), (32 - lost[0]) * (32 - lost[1]))
    assert abs(lost[0].mean() - lost[1].mean()) < 0.4
    image = Image.fromarray(random_image(3, 32))
    moved = np.asarray(crop_shift(image, np.random.default_rng(1)))
    mask = (moved != 0).any(-1)
    top, left = mask.any(1).argmax(), mask.any(0).argmax()
    height, width = mask.any(1).sum(), mask.any(0).sum()
    part = moved[top : top + height, left : left + width]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (height, width), axis=(0, 1))
    assert (windows.transpose(0, 1, 3, 4, 2) == part).all((2, 3, 4)).any()


def test_one_of_eight_operations_on_colour_or_shape():
    image = Image.fromarray(random_image(5, 32) // 2)
    rng = np.random.default_rng(0)
    results = [np.asarray(color_or_shape(image, rng)).tobytes() for _ in range(1000)]
    error = 5 * np.sqrt(1000 / 8 * 7 / 8)
    for known in (ImageOps.equalize(image), ImageOps.autocontrast(image)):
        assert abs(results.count(np.asarray(known).tobytes()) - 1000 / 8) < error
    assert len(set(results)) > 1000 * 6 / 8 - error  # the other six have a strength
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    uncovered = [(np.asarray(color_or_shape(white, rng)) == 0).all(-1) for _ in range(1000)]
    shares = np.array([mask.mean() for mask in uncovered if mask.any()])
    assert abs(len(shares) - 1000 / 4) < 5 * np.sqrt(1000 / 4 * 3 / 4)  # by shear and rotation
    assert 0.02 < shares.mean() < shares.max() < 0.12
    assert all(not mask[8:24, 8:24].any() for mask in uncovered)


def test_idbh_in_its_order():
    plan = Augmentation(Augment(reprob=0.1), "idbh").plan(0, 32)
    assert (plan.before, plan.move, plan.flip) == ((), False, True)
    assert plan.after[:3] == (idbh.crop_shift, idbh.color_or_shape, idbh.erase)
    white, rng = Image.new("RGB", (32, 32), (255, 255, 255)), np.random.default_rng(0)
    black = np.array([(np.asarray(idbh.erase(white, rng)) == 0).any() for _ in range(1000)])
    assert abs(black.mean() - 0.5) < 5 * np.sqrt(0.25 / 1000)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"aa": "rand-q3"}, "aa: 'rand-q3' is not understood"),
        ({"aa": "autoaugment"}, "aa: 'autoaugment'"),
        ({"aa": "Nothing"}, "aa: 'Nothing'"),
        ({"aa": "rand-mx"}, "aa: 'rand-mx'"),
        ({"color_jitter": -1.0}, "color_jitter: -1.0"),
        ({"reprob": 1.5}, "reprob: 1.5"),
        ({"reprob": float("nan")}, "reprob: nan"),
        ({"remode": "noise"}, "remode: 'noise', expected one of const, rand, pixel"),
        ({"recount": 0}, "recount: 0"),
    ],
)
def test_impossible_flags(flags, named):
    with pytest.raises(DataError) as caught:
        Augment(**flags)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("aa", ["", "None", "none"])
def test_no_policy_is_what_it_is_in_scripts_for_timm(aa):
    """No operations, the crops that come with a policy, and colour jitter, which a policy would replace."""
    plan = Augmentation(Augment(aa, color_jitter=0.4)).plan(0, 32)
    assert plan.area == (0.08, 1.0)
    assert len(plan.after) == 1
    assert Augmentation(Augment("noaug")).plan(0, 32).area == (0.2, 1.0)
    assert not Augmentation(Augment(aa)).plan(0, 32).after


def test_unknown_edm_aug(roots):
    with pytest.raises(DataError, match="edm_aug: 'all', expected one of none, base"):
        whole_images(roots, "all")
