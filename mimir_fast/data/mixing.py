"""Mixup and CutMix of a batch with its own reverse, and the soft targets.

Shapes: B batch, C channels, H W sides, O classes.  Sources: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899.
Settings and the order of the draws are those of timm's Mixup, which the original uses.  timm's modes "pair" and "elem" make
the host wait for the device; here all that was drawn is copied at once, without a wait.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mimir_fast.config.choices import MIXUP_MODES
from mimir_fast.data.errors import DataError
from mimir_fast.data.randomness import Purpose, random_stream

# Of epochs 0, 1, ...; the last one stays.
WARMUP_PROBS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0, 0.9, 0.95, 1.0)
# From this epoch on mixup and CutMix alternate; the probability of CutMix, epoch by epoch, again with a last one that stays.
WARMUP_CUTMIX_EPOCH = 6
WARMUP_SWITCH_PROBS = (0.1, 0.2, 0.3, 0.4, 0.5)
WARMUP_MIXUP, WARMUP_CUTMIX = 0.8, 1.0


@dataclass(frozen=True)
class Mixing:
    """Flags of mixup and CutMix; raises DataError for values that are not possible.

    mixup, cutmix     parameter of the Beta distribution from which an image's own share is drawn; 0: not used
    cutmix_minmax     lowest and highest side of the box, as fractions of the image's; takes the place of cutmix
    prob              probability of mixing at all
    switch_prob       probability of CutMix where both are used
    mode              draw once per batch, per pair of images that are mixed with each other, or per image (elem)
    smoothing         label smoothing: spread evenly over num_classes in every target, mixed or not
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    prob: float = 1.0
    switch_prob: float = 0.5
    mode: str = "batch"
    smoothing: float = 0.1
    num_classes: int = 1000

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for field, name in (("prob", "mixup_prob"), ("switch_prob", "mixup_switch_prob")):
            _require(0 <= getattr(self, field) <= 1, name, getattr(self, field), "a probability, 0 to 1")
        _require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "0 or more and less than 1")
        _require(self.mode in MIXUP_MODES, "mixup_mode", self.mode, f"one of {', '.join(MIXUP_MODES)}")
        if self.cutmix_minmax is not None:
            low, high = self.cutmix_minmax if len(self.cutmix_minmax) == 2 else (0, 0)
            _require(0 < low < high <= 1, "cutmix_minmax", self.cutmix_minmax, "two rising numbers between 0 and 1")

    @property
    def cutmix_parameter(self) -> float:
        """Parameter of CutMix's Beta distribution."""
        # timm draws the share with 1.0 even where cutmix_minmax replaces it; the draw must be kept.
        return self.cutmix if self.cutmix_minmax is None else 1.0

    @property
    def active(self) -> bool:
        """Whether anything is ever mixed; if not, labels stay as they are and `mix` is not called."""
        return self.mixup > 0 or self.cutmix_parameter > 0


def warmup_mixing(epoch: int, mixing: Mixing) -> Mixing:
    """The mixing of an epoch under --warmup_aa; the last change, at epoch 10, stays, in a resumed run as well.

    Up to epoch 5 only the probability differs from the flags; from epoch 6 on mixup 0.8 and CutMix 1.0 alternate.
    """
    mixing = replace(mixing, prob=WARMUP_PROBS[min(epoch, len(WARMUP_PROBS) - 1)])
    if epoch < WARMUP_CUTMIX_EPOCH:
        return mixing
    switch_prob = WARMUP_SWITCH_PROBS[min(epoch - WARMUP_CUTMIX_EPOCH, len(WARMUP_SWITCH_PROBS) - 1)]
    return replace(mixing, mixup=WARMUP_MIXUP, cutmix=WARMUP_CUTMIX, switch_prob=switch_prob)


def mixing_seed(seed: int, rank: int, epoch: int, step: int) -> int:
    """Seed for the mixing of one micro-step, a function of its position."""
    return int(random_stream(seed, Purpose.MIXUP, epoch, rank, step).integers(2**32))


def mix(mixing: Mixing, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images [B,C,H,W] float and labels int64 [B] -> mixed images and targets [B,O] float32, on the same device.

    Image i is mixed with image B - 1 - i.  The host draws and does not wait for the device.
    Raises DataError for an odd batch with mode "pair".
    """
    draws = mixing_draws(mixing, images, seed)
    if images.device.type == "cuda":
        draws = draws.pin_memory()
    return mix_as_drawn(mixing, images, labels, draws.to(images.device, non_blocking=True))


def mixing_draws(mixing: Mixing, images: Tensor, seed: int) -> Tensor:
    """All that is drawn for images [B,C,H,W], of which only the sizes matter: float32 [7,B] on the host.

    Raises DataError for an odd batch with mode "pair".
    """
    batch, _, height, width = images.shape
    if mixing.mode == "pair" and batch % 2:
        raise DataError(f"batch_size: {batch} is odd, but mixup_mode pair needs pairs")
    # The legacy generator: timm draws from numpy's global one, whose numbers no newer generator gives.
    return torch.from_numpy(_draw(mixing, batch, height, width, np.random.RandomState(seed)).astype(np.float32))


def mix_as_drawn(mixing: Mixing, images: Tensor, labels: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """`mix` with its draws [7,B] on the images' device: work on the device alone."""
    _, _, height, width = images.shape
    share, rest, cut, top, bottom, left, right = draws
    # Boxes as comparisons and not as slices: their corners are on the device, and the host does not know them.
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    inside_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
    inside_columns = (columns >= left[:, None]) & (columns < right[:, None])
    box = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    other, share_B111, rest_B111 = (
        images.flip(0),
        *(part.to(images.dtype)[:, None, None, None] for part in (share, rest)),
    )
    blend = images * share_B111 + other * rest_B111
    mixed = torch.where(cut.bool()[:, None, None, None], torch.where(box, other, images), blend)
    return mixed, _targets(mixing, labels, share, rest)


def _targets(mixing: Mixing, labels: Tensor, share: Tensor, rest: Tensor) -> Tensor:
    """Soft targets [B,O]: smoothed one-hot labels, weighted by the shares of both images."""
    off = mixing.smoothing / mixing.num_classes
    smooth = torch.full((len(labels), mixing.num_classes), off, device=labels.device)
    smooth.scatter_(1, labels[:, None], 1.0 - mixing.smoothing + off)
    return smooth * share[:, None] + smooth.flip(0) * rest[:, None]


def _draw(mixing: Mixing, batch: int, height: int, width: int, rng: np.random.RandomState) -> np.ndarray:
    """Draws of a batch [7,B]: own share, the other's share, whether it is CutMix, and the box: top, bottom, left, right."""
    count = {"batch": 1, "pair": batch // 2, "elem": batch}[mixing.mode]
    shares, cuts = _batch_share(mixing, rng) if mixing.mode == "batch" else _shares(mixing, count, rng)
    boxes = np.zeros((4, count), np.int64)
    # An image with share 1 is not mixed: timm draws no box for it.
    for i in np.flatnonzero(cuts & (shares != 1)):
        boxes[:, i], shares[i] = _box(mixing, height, width, float(shares[i]), rng)
    table = np.concatenate([np.stack([shares, 1 - shares, cuts]), boxes])
    # Image B-1-i has the draw of its partner, image i.
    if mixing.mode == "pair":
        return np.concatenate([table, table[:, ::-1]], axis=1)
    return np.broadcast_to(table, (7, batch))


def _batch_share(mixing: Mixing, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Share [1] of the whole batch, and whether it is CutMix's [1]."""
    share, cut = 1.0, False
    if rng.rand() < mixing.prob:
        a, b = mixing.mixup, mixing.cutmix_parameter
        cut = rng.rand() < mixing.switch_prob if a > 0 and b > 0 else b > 0
        share = rng.beta(b, b) if cut else rng.beta(a, a)
    return np.array([share]), np.array([cut])


def _shares(mixing: Mixing, count: int, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Shares float32 [count], and which of them are CutMix's [count]."""
    a, b = mixing.mixup, mixing.cutmix_parameter
    if a > 0 and b > 0:
        cuts = rng.rand(count) < mixing.switch_prob
        # Both are drawn for every image, and in this order, as timm does.
        boxes = rng.beta(b, b, size=count)
        shares = np.where(cuts, boxes, rng.beta(a, a, size=count))
    else:
        cuts = np.full(count, b > 0)
        shares = rng.beta(max(a, b), max(a, b), size=count)
    return np.where(rng.rand(count) < mixing.prob, shares, 1).astype(np.float32), cuts


def _box(mixing: Mixing, height: int, width: int, share: float, rng: np.random.RandomState) -> tuple[list[int], float]:
    """(top, bottom, left, right) of a box that covers 1 - share of the image, and the share that is really left.

    The box is around a random centre and cut off at the edges; with cutmix_minmax it lies inside.
    """
    sides = (height, width)
    if mixing.cutmix_minmax is not None:
        low, high = mixing.cutmix_minmax
        cut = [rng.randint(int(side * low), max(int(side * high), int(side * low) + 1)) for side in sides]
        first = [rng.randint(0, side - length + 1) for side, length in zip(sides, cut)]
        last = [start + length for start, length in zip(first, cut)]
    else:
        cut = [int(side * np.sqrt(1 - share)) for side in sides]
        centre = [rng.randint(0, side) for side in sides]
        first = [max(middle - length // 2, 0) for middle, length in zip(centre, cut)]
        last = [min(middle + (length + 1) // 2, side) for middle, length, side in zip(centre, cut, sides)]
    covered = (last[0] - first[0]) * (last[1] - first[1])
    return [first[0], last[0], first[1], last[1]], 1 - covered / (height * width)


def _require(ok: bool, name: str, value, allowed: str) -> None:
    if not ok:
        raise DataError(f"{name}: {value}, expected {allowed}")
