"""Windows: the rows of each image that a batch of crops needs, and their places in one packed buffer.

Shapes: B images.  A batch in a buffer of bytes: the arrays of `Table`, one after the other, then the windows' rows.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from mimir_fast.data.boxes import boxes, draw
from mimir_fast.data.cache.index import Index
from mimir_fast.data.cache.pixels import row_bytes, rows_in, stored_bytes

# Of a batch's table and of its first row in the buffer: what any dtype and a GPU's reads are aligned to.
ALIGNMENT = 256


class Table(NamedTuple):
    """What the device needs to know of a batch beside its rows.

    offsets   int64 [B], of each window's first byte in the rows
    labels    int64 [B]
    sizes     int64 [B,2], (rows, columns) of the window, pixels
    boxes     fp32 [B,4], (top, left, height, width) in pixels of the window
    flips     bool [B]
    """

    offsets: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray


# The arrays' bytes per number, dtypes on the device, and numbers per image.
# The widest numbers first: each array then begins at a multiple of its numbers' size, as `Tensor.view` demands.
COLUMNS = ((8, torch.int64, 1), (8, torch.int64, 1), (8, torch.int64, 2), (4, torch.float32, 4), (1, torch.bool, 1))


def table_bytes(batch_size: int) -> int:
    """Bytes of a table, up to the first row."""
    used = sum(size * count for size, _, count in COLUMNS) * batch_size
    return -(-used // ALIGNMENT) * ALIGNMENT


def table_slices(batch_size: int) -> list[slice]:
    """Where the arrays of a table lie in the buffer."""
    ends = np.cumsum([0, *(size * count * batch_size for size, _, count in COLUMNS)]).tolist()
    return [slice(start, end) for start, end in pairwise(ends)]


class Windows(NamedTuple):
    """What is to be read for a batch: of each image the shard, the first byte there, how many, and all of the image's.

    rows      int64 [B], of the index; shards int32, starts, counts, image_starts, image_counts int64 [B]
    """

    rows: np.ndarray
    shards: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    image_starts: np.ndarray
    image_counts: np.ndarray
    table: Table

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return int(self.counts.sum())


def windows(
    index: Index, pixels: str, rows: np.ndarray, labels: np.ndarray, indices: np.ndarray, seed: int, epoch: int
):
    """The windows of the crops of images `indices` [B] in an epoch, which lie in the rows [B] of the index: Windows.

    A box is drawn in pixels of the original, as for image files, and scaled to the stored image, fractions kept.
    """
    drawn = draw(seed, epoch, indices)
    original, stored = index.original[rows].astype(np.int64), index.stored[rows].astype(np.int64)
    box = boxes(drawn.numbers, original[:, 0], original[:, 1]) * np.tile(stored / original, 2)
    height, width = stored.T
    step = rows_in(pixels)
    # Chroma is stored once per pair of rows, so that a window cannot begin or end within one.
    first = np.floor(box[:, 0]).astype(np.int64) // step * step
    last = np.clip(np.ceil(box[:, 0] + box[:, 2]).astype(np.int64), first + 1, height)
    # All rows of the last pair, if the image has them.
    last = np.minimum(-(-last // step) * step, height)
    counts = stored_bytes(pixels, last - first, width)
    image_starts = index.offset[rows]
    # While it is fp64: relative to the window a top keeps more digits of its fraction in fp32.
    box[:, 0] -= first
    table = Table(
        np.cumsum(counts) - counts,
        labels,
        np.stack([last - first, width], axis=1),
        box.astype(np.float32),
        drawn.flips,
    )
    starts = image_starts + first // step * row_bytes(pixels, width)
    shards, whole = index.shard[rows], stored_bytes(pixels, height, width)
    return Windows(rows, shards, starts, counts, image_starts, whole, table)
