"""Augmentation policies of fine-tuning: flags, and the operations on images that they stand for.

Most operations are timm's and torchvision's, which draw from global random generators (see randomness.borrowed_generators)
and are slow to import: they are imported where a plan needs them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from mimir_fast.config.choices import EDM_AUGMENTATIONS, REMODES
from mimir_fast.data import idbh
from mimir_fast.data.crops import CROP_AREA
from mimir_fast.data.erasing import cutout, random_erasing
from mimir_fast.data.errors import DataError

Operation = Callable[[Image.Image, np.random.Generator], Image.Image]
# Fraction of an image that a crop at random scale covers, where aa is in use.
AUGMENTED_AREA = (0.08, 1.0)
# Words for "no policy" in MAE's and DeiT's scripts.
NO_POLICY = ("", "None", "none")
# Of epochs 0, 1, ...; the last one stays.
WARMUP_MAGNITUDES = (1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9)


@dataclass(frozen=True)
class Augment:
    """Flags of augmentation, for every data set; raises DataError for values that are not possible.

    aa             noaug; '' or None: no policy, but the crops that come with one; or timm's RandAugment, AugMix or
                   AutoAugment in its notation: rand-m9-mstd0.5-inc1, augmix-m5, v0
    color_jitter   largest relative change of brightness, contrast and saturation; as in timm without effect beside aa,
                   "3a" excepted
    reprob         probability of random erasing
    remode         what random erasing writes: pixel, rand or const
    recount        boxes of random erasing, at most
    """

    aa: str = "noaug"
    color_jitter: float | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1

    def __post_init__(self):
        if self.color_jitter is not None and not self.color_jitter >= 0:
            raise DataError(f"color_jitter: {self.color_jitter}, expected 0 or more")
        if not 0 <= self.reprob <= 1:
            raise DataError(f"reprob: {self.reprob}, expected a probability, 0 to 1")
        if self.remode not in REMODES:
            raise DataError(f"remode: {self.remode!r}, expected one of {', '.join(REMODES)}")
        if self.recount < 1:
            raise DataError(f"recount: {self.recount}, expected 1 or more")
        # Raises for an aa that timm does not understand; the size does not matter here.
        _policy(self.aa, 32)


class AugmentPlan(NamedTuple):
    """What is done to every image of an epoch: operations before the crop, crop, flip, operations after.

    move     pad small images and crop them at a random place; else at the centre
    area     range of the area of crops at random scale, which images of any size get instead
    """

    before: tuple[Operation, ...] = ()
    move: bool = True
    area: tuple[float, float] = CROP_AREA
    flip: bool = True
    after: tuple[Operation, ...] = ()


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a run, which may change with the epoch.

    edm_aug   what is done to real and generated images first, where generated ones are mixed in, else None
    warmup    let the strength of RandAugment grow, see warmup_augment
    """

    augment: Augment
    edm_aug: str | None = None
    warmup: bool = False

    def __post_init__(self):
        if self.edm_aug is not None and self.edm_aug not in EDM_AUGMENTATIONS:
            raise DataError(f"edm_aug: {self.edm_aug!r}, expected one of {', '.join(EDM_AUGMENTATIONS)}")

    def plan(self, epoch: int, size: int) -> AugmentPlan:
        """The plan of an epoch, for images that become size x size pixels."""
        augment = warmup_augment(epoch, self.augment) if self.warmup else self.augment
        return _plan(augment, self.edm_aug, size)


def warmup_augment(epoch: int, augment: Augment) -> Augment:
    """The augmentation of an epoch under --warmup_aa: RandAugment whose magnitude grows from 1 to 9 over eleven epochs.

    It stays at 9 from then on, in a resumed run as well.
    """
    magnitude = WARMUP_MAGNITUDES[min(epoch, len(WARMUP_MAGNITUDES) - 1)]
    return replace(augment, aa=f"rand-m{magnitude}-mstd0.5-inc1")


# Cached: every batch asks for its epoch's plan.
@lru_cache(maxsize=4)
def _plan(augment: Augment, edm_aug: str | None, size: int) -> AugmentPlan:
    policy = _policy(augment.aa, size)
    plan = _edm_plan(edm_aug)._replace(area=CROP_AREA if augment.aa == "noaug" else AUGMENTED_AREA)
    after = [*plan.after] if policy is None else [*plan.after, _library(policy)]
    if augment.color_jitter and (policy is None or "3a" in augment.aa):
        from torchvision.transforms import ColorJitter

        after.append(_library(ColorJitter(*[augment.color_jitter] * 3)))
    if augment.reprob:
        after.append(partial(random_erasing, prob=augment.reprob, mode=augment.remode, max_count=augment.recount))
    return plan._replace(after=tuple(after))


def _edm_plan(edm_aug: str | None) -> AugmentPlan:
    """The augmentations that robust training on CIFAR-10 with generated images has used."""
    if edm_aug == "none":
        return AugmentPlan(move=False, flip=False)
    if edm_aug == "cutout":
        return AugmentPlan(after=(cutout,))
    if edm_aug == "autoaugment":
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy

        return AugmentPlan(after=(_library(AutoAugment(AutoAugmentPolicy.CIFAR10)), cutout))
    if edm_aug == "randaugment":
        from torchvision.transforms import RandAugment

        return AugmentPlan(before=(_library(RandAugment(2, 14)),))
    if edm_aug == "idbh":
        # CropShift takes the place of the padded crop.
        return AugmentPlan(move=False, after=(idbh.crop_shift, idbh.color_or_shape, idbh.erase))
    return AugmentPlan()


def _library(transform: Callable[[Image.Image], Image.Image]) -> Operation:
    """A library's transform, which draws from the global generators and not from the one it is given."""
    return lambda image, _: transform(image)


def _policy(aa: str, size: int) -> Callable[[Image.Image], Image.Image] | None:
    """timm's transform of an aa string with the original's settings: bicubic, shifts up to 0.45 of the side, black borders.

    None for noaug and for words that mean no policy.  Raises DataError for what timm does not understand.
    """
    if aa == "noaug" or aa in NO_POLICY:
        return None
    settings = {"translate_const": int(size * 0.45), "img_mean": (0, 0, 0), "interpolation": Image.Resampling.BICUBIC}
    try:
        policy, operations = _timm_policy(aa, settings)
    except (AssertionError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"aa: {aa!r} is not understood ({reason}), expected noaug, None, or for example rand-m9-mstd0.5-inc1, augmix-m5, v0"
        ) from error
    # timm asks for 0 bits at magnitude 10, which newer versions of Pillow refuse.
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


def _timm_policy(aa: str, settings: dict) -> tuple[Callable[[Image.Image], Image.Image], list]:
    """A transform, and the operations (timm's AugmentOp) that it chooses from."""
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    for section in aa.split("-")[1:]:
        if not section.startswith("t") and not any(character.isdigit() for character in section):
            # timm would ignore such a section.
            raise ValueError(f"no number in {section!r}")
    if aa.startswith("rand"):
        policy = rand_augment_transform(aa, settings)
        return policy, policy.ops
    if aa.startswith("augmix"):
        policy = augment_and_mix_transform(aa, settings | {"translate_pct": 0.3})
        return policy, policy.ops
    policy = auto_augment_transform(aa, settings)
    return policy, [operation for operations in policy.policy for operation in operations]


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Posterize to the highest bits of every channel; black for 0 bits."""
    from timm.data.auto_augment import posterize

    return posterize(image, bits) if bits > 0 else Image.new("RGB", image.size)
