"""How far crops from a cache are from crops of the photographs themselves, which Pillow makes.

    PHOTOGRAPHS=/data/imagenet/val python -m tests.kernels.test_crop_quality     # the table of docs/data.md

PHOTOGRAPHS is a folder of JPEG files, searched through; the test takes 20 of them.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mimir_fast.data.boxes import boxes, draw
from mimir_fast.data.cache.pixels import reduced, to_pixels
from mimir_fast.data.crops import resized_crop
from mimir_fast.data.folders import read_image
from mimir_fast.kernels import crop_resize, crop_resize_yuv420

SIDE = 224
IMAGENET = 1_281_167
FORMATS = [("rgb", 0), ("rgb", 512), ("rgb", 384), ("rgb", 256), ("yuv420", 512), ("yuv420", 384), ("yuv420", 256)]


class Quality(NamedTuple):
    """Of one crop: levels off in the mean and at worst, PSNR in dB, energy of fine detail relative to the original's."""

    mean: float
    worst: float
    psnr: float
    energy: float
    enlarged: bool
    stored: int


def photographs() -> list[Path]:
    folder = os.environ.get("PHOTOGRAPHS", "")
    return (
        sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")) if folder else []
    )


def compared(path: Path, number: int, pixels: str, size: int) -> list[Quality]:
    """Two random crops of a photograph stored in this format, against Pillow's of the original."""
    original = Image.open(path).convert("RGB")
    stored = reduced(read_image(str(path), ycc=pixels == "yuv420"), size)
    rows = torch.from_numpy(to_pixels(stored, pixels).flatten())
    scale = np.array([stored.height / original.height, stored.width / original.width] * 2)
    crop = crop_resize_yuv420 if pixels == "yuv420" else crop_resize
    found = []
    for epoch in range(2):
        box = boxes(draw(0, epoch, np.array([number])).numbers, [original.height], [original.width])[0]
        there = torch.tensor(box * scale, dtype=torch.float32)[None]
        extent, where = torch.tensor([[stored.height, stored.width]]), torch.tensor([0])
        ours = crop(rows, where, extent, there, torch.tensor([False]), SIDE, torch.uint8)[0].permute(1, 2, 0).numpy()
        theirs = resized_crop(original, *map(int, box), SIDE)
        off = abs(ours.astype(float) - theirs)
        psnr = 10 * math.log10(255**2 / max((off**2).mean(), 1e-4))
        energy = fine_detail(ours) / fine_detail(theirs)
        found.append(Quality(off.mean(), off.max(), psnr, energy, bool(there[0, 2:].min() < SIDE), len(rows)))
    return found


def fine_detail(crop: np.ndarray) -> float:
    """Energy of luma above half of the Nyquist frequency."""
    luma = crop @ np.array([0.299, 0.587, 0.114])
    window = np.hanning(SIDE)
    spectrum = abs(np.fft.fft2((luma - luma.mean()) * window[:, None] * window)) ** 2
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    return spectrum[frequency > 0.25].sum() + 1e-9


def quality(paths: list[Path], pixels: str, size: int) -> Quality:
    """Means over the crops; worst: the largest; psnr, energy: medians."""
    table = np.array([crop for number, path in enumerate(paths) for crop in compared(path, number, pixels, size)])
    mean, _, _, _, enlarged, stored = table.mean(0)
    return Quality(mean, table[:, 1].max(), *np.median(table[:, 2:4], axis=0), enlarged, stored)


@pytest.mark.slow
@pytest.mark.skipif(not photographs(), reason="PHOTOGRAPHS names no folder of JPEG files")
def test_crops_are_those_of_the_photographs():
    paths = photographs()[:: max(1, len(photographs()) // 20)]
    assert quality(paths, "rgb", 0).mean <= 0.1
    luma_and_chroma = quality(paths, "yuv420", 384)
    assert luma_and_chroma.mean <= 1.5
    assert luma_and_chroma.psnr >= 44
    assert 0.97 <= luma_and_chroma.energy <= 1.03


def main() -> None:
    print(
        "| format | size | mean | worst | PSNR, dB | fine detail | enlarged | ImageNet-1K, GB |\n| --- "
        + "| --- " * 7
        + "|"
    )
    for pixels, size in FORMATS:
        q = quality(photographs(), pixels, size)
        gigabytes = q.stored * IMAGENET / 1e9
        print(
            f"| `{pixels}` | {size or 'original'} | {q.mean:.2f} | {q.worst:.0f} | {q.psnr:.1f} | {q.energy:.3f} "
            f"| {q.enlarged:.0%} | {gigabytes:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
