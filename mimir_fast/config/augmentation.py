"""Flags of the augmentation of fine-tuning."""

from dataclasses import dataclass

from mimir_fast.config.choices import MIXUP_MODES, REMODES
from mimir_fast.config.fields import flag


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation, of every data set."""

    aa: str = flag(
        "rand-m9-mstd0.5-inc1",
        "RandAugment in timm's spelling; noaug: crop and flip alone; None or '': that, with the stronger crops of RandAugment",
    )
    color_jitter: float | None = flag(None, "strength of colour jitter; default: none", type=float)
    reprob: float = flag(0.25, "images with random rectangles erased, whatever --aa says", "share, 0 to 1")
    remode: str = flag("pixel", "what fills the rectangle", choices=REMODES)
    recount: int = flag(1, "most rectangles per image")
    resplit: bool = flag(False, "accepted for compatibility; the original never reads it")
    warmup_aa: bool = flag(
        False,
        "in the first 11 epochs of adversarial training augmentation grows step by step (magnitude, mixup, cutmix)",
    )
    smoothing: float = flag(0.1, "label smoothing (not with trades and mart)", "share, 0 to 1")
    mixup: float = flag(0.0, "mixup's alpha; 0: off")
    cutmix: float = flag(0.0, "cutmix's alpha; 0: off")
    cutmix_minmax: tuple[float, ...] | None = flag(
        None, "least and largest share of a side that cutmix cuts; overrides --cutmix", type=float, several=True
    )
    mixup_prob: float = flag(1.0, "batches that are mixed", "share, 0 to 1")
    mixup_switch_prob: float = flag(0.5, "mixed batches that get cutmix where both are on", "share, 0 to 1")
    mixup_mode: str = flag("batch", "what shares one mixture", choices=MIXUP_MODES)
