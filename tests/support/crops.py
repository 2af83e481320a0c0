"""Windows of random pixels for the crop operations, packed as a reader packs them, and the same for the oracle."""

import numpy as np
import torch

from tests.oracles.crops import crop_rgb, crop_yuv420

# Windows (rows, columns) and boxes in them: a pixel, odd sides, fractions, a piece of a pixel, 8 times larger and smaller.
HARD = {
    (1, 1): (0, 0, 1, 1),
    (7, 9): (0, 0, 7, 9),
    (40, 31): (3.3, 2.7, 30.2, 20.9),
    (33, 50): (0, 0, 33, 50),
    (90, 101): (5.5, 10.25, 80, 80),
    (64, 65): (16, 17, 20, 40),
    (12, 30): (7.25, 11.6, 2.5, 5),
    (160, 161): (0, 1, 160, 160),
    (9, 8): (4.4, 5.2, 0.3, 0.6),
}


def pack(windows: list[tuple[int, int]], yuv: bool, gap: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """packed, offsets, sizes of random windows with gaps of 255 between them."""
    random, parts, offsets, end = np.random.default_rng(1), [], [], 0
    for height, width in windows:
        count = (height + 1) // 2 * 3 * (width + width % 2) if yuv else height * width * 3
        parts += [np.full(gap, 255, np.uint8), random.integers(0, 256, count, dtype=np.uint8)]
        offsets.append(end + gap)
        end += gap + count
    packed = torch.from_numpy(np.concatenate([*parts, np.full(gap, 255, np.uint8)]))
    return packed, torch.tensor(offsets), torch.tensor(windows)


def of_the_pixels(mark_hw: torch.Tensor, yuv: bool) -> torch.Tensor:
    """A mark of the pixels of an even window, [h,w], as one of the numbers that they are stored in."""
    if not yuv:
        return mark_hw.repeat_interleave(3)
    pairs, chroma = mark_hw.unflatten(0, (-1, 2)), mark_hw[::2, ::2]
    return torch.cat([pairs.flatten(1), chroma, chroma], dim=1).flatten()


def expected(packed, offsets, sizes, boxes, flips, size: int, yuv: bool, nudge: float = 0.0) -> torch.Tensor:
    """What the oracle makes of it: uint8 [B,3,S,S]."""
    crops = []
    for offset, (h, w), box, flip in zip(offsets.tolist(), sizes.tolist(), boxes.numpy(), flips.tolist()):
        if yuv:
            pairs, even = (h + 1) // 2, w + w % 2
            rows = packed[offset:][: pairs * 3 * even].numpy().reshape(pairs, 3 * even)
            luma = rows[:, : 2 * even].reshape(2 * pairs, even)[:h, :w]
            chroma = np.stack([rows[:, 2 * even : 5 * even // 2], rows[:, 5 * even // 2 :]], axis=-1)
            crop = crop_yuv420(luma, chroma, box, size, nudge)
        else:
            crop = crop_rgb(packed[offset:][: h * w * 3].numpy().reshape(h, w, 3), box, size, nudge)
        crops.append(crop[:, ::-1] if flip else crop)
    return torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).copy())


def distance(crops: torch.Tensor, *inputs) -> torch.Tensor:
    """Levels from float64's, [B,3,S,S]: of sums that are halves to a ten-thousandth, from the nearer way to round them."""
    return torch.stack([(crops.int() - expected(*inputs, nudge).int()).abs() for nudge in (-1e-4, 0, 1e-4)]).amin(0)


def hard_cases(yuv: bool) -> tuple[torch.Tensor, ...]:
    """packed, offsets, sizes, boxes, flips of HARD."""
    boxes = torch.tensor([list(box) for box in HARD.values()], dtype=torch.float32)
    return *pack(list(HARD), yuv), boxes, torch.arange(len(HARD)) % 2 == 1
