"""A folder of class folders with synthetic photographs, for where no data set is at hand."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

DISTINCT = 64  # different pictures; decoding costs the same however often one is repeated
CLASSES = 4
WIDTH, HEIGHT = 500, 375  # of ImageNet's photographs, typically


def write_images(folder: Path, count: int, width: int = WIDTH, height: int = HEIGHT) -> Path:
    """Make `count` JPEG files below folder/train/CLASS, smooth colours with fine noise, and return the folder.

    Past DISTINCT they are hard links: they take no room.
    """
    random = np.random.default_rng(0)
    paths = [folder / "train" / f"class{number % CLASSES}" / f"{number}.jpg" for number in range(count)]
    for path in paths[:CLASSES]:
        path.parent.mkdir(parents=True)
    for path in paths[:DISTINCT]:
        path.write_bytes(_picture(random, width, height))
    for number, path in enumerate(paths[DISTINCT:]):
        os.link(paths[number % DISTINCT], path)
    return folder


def _picture(random: np.random.Generator, width: int, height: int) -> bytes:
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + random.integers(-16, 17, smooth.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
