"""What fine-tuning does to training images beyond a crop and a flip."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Augment:
    """Flags of the augmentation, honoured for every data set."""

    aa: str = "noaug"
    color_jitter: float | None = None
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
