"""Images to evaluate on: every one exactly once, in a fixed order, without anything random.

Shapes: B batch, N images, H W sides, S side of the input, C = 3 channels.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimir_fast.data.build import check_input_size
from mimir_fast.data.crops import Channels
from mimir_fast.data.datasets import DatasetInfo, Source, dataset_info, read_images
from mimir_fast.data.errors import DataError
from mimir_fast.data.image_list import listed_images
from mimir_fast.data.sources import ArrayImages, FolderImages, TooManyBadError
from mimir_fast.data.splits import class_names, held_out_indices
from mimir_fast.data.stream import batch_loader
from mimir_fast.data.workers import Batch, sigterm_held

CROPPED = 224 / 256  # part of a resized image's shorter side that a central crop keeps
SPLITS = ("val", "train", "held_out")


class EvalStream:
    """Batches of uint8 images and labels of one rank; may be iterated again and again.

    indices      int64, the positions in the split (or image list) of this rank's images, in the order in which they come
    num_images   images of all ranks together; classes: names in label order, num_classes of them
    mean, std    per channel, of images in [0,1]
    """

    def __init__(
        self,
        source: Source,
        info: DatasetInfo,
        classes: list[str],
        input_size: int,
        batch_size: int,
        positions: np.ndarray,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.num_images, self.indices = len(positions), positions[rank::world_size]
        self.classes, self.num_classes = classes, len(classes)
        self.mean: Channels = info.mean
        self.std: Channels = info.std
        self._bad = source.bad
        self._keys = [self.indices[i : i + batch_size] for i in range(0, len(self.indices), batch_size)]
        maker = EvalMaker(source, input_size, info.side is None)
        self._loader = batch_loader(maker, self._keys, num_workers, pin_memory, persistent=False)

    def __len__(self) -> int:
        """Batches of this rank; the last one may be smaller, and a rank may have none."""
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [B,3,S,S] and labels int64 [B].  Raises DataError for an unreadable image, naming it."""
        with sigterm_held():
            batches = iter(self._loader)
        for images, labels, bad in batches:
            self._bad.record(bad)
            yield images, labels


class EvalMaker:
    """The map-style dataset of the loader: indices in, a batch out.

    resize   images of any size: the shorter side becomes S * 256 / 224 pixels, then the centre is cut out; small images are
             used as they are, or where S differs from their side cut or padded with zeros around the centre
    """

    def __init__(self, source: Source, input_size: int, resize: bool):
        self.source, self.input_size = source, input_size
        self.convert = partial(resized_centre if resize else centre, size=input_size)
        if not self._fits():
            self.convert(Image.new("RGB", (2, 2)))  # what it imports, workers need not

    def __getitem__(self, indices: np.ndarray) -> Batch:
        try:
            taken = self._take(indices)
        except TooManyBadError as error:
            return torch.empty(0), torch.empty(0), error.bad  # as a value, like BatchMaker
        images = np.ascontiguousarray(taken.images.transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.from_numpy(taken.labels), {}

    def _fits(self) -> bool:
        """Whether images are used as they are."""
        return isinstance(self.source, ArrayImages) and self.source.images.shape[1] == self.input_size

    def _take(self, indices: np.ndarray):
        if isinstance(self.source, FolderImages):
            return self.source.take(indices, self.convert)
        taken = self.source.take(indices)
        if self._fits():
            return taken
        return taken._replace(images=np.stack([self.convert(Image.fromarray(image)) for image in taken.images]))


def centre(image: Image.Image, size: int) -> np.ndarray:
    """The middle size x size pixels of an RGB image, padded with zeros where it is smaller: uint8 [S,S,C]."""
    from torchvision.transforms.functional import center_crop  # slow to import

    return np.asarray(center_crop(image, [size, size]))


def resized_centre(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to size / CROPPED pixels, bicubic, and cut out the middle: uint8 [S,S,C]."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    resized = resize(image, [int(size / CROPPED)], InterpolationMode.BICUBIC, antialias=True)
    return centre(resized, size)


def eval_batches(
    dataset: str,
    data_root: str | Path,
    input_size: int,
    batch_size: int,
    *,
    split: str = "val",
    indices: Sequence[int] | None = None,
    image_list: str | Path | None = None,
    held_out: int = 0,
    num_classes: int | None = None,
    use_edm: bool = False,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalStream:
    """Images of a split, without augmentation, in a fixed order: each once, those of rank r being number r, r + world, ...

    split         "val", "train", or "held_out": the training images that build_train_data(held_out=...) leaves out
    indices       which images of the split or list, all by default
    image_list    a file of paths below the split's folder, one per line; only for class folders of images of any size
    num_classes   outputs of the model, to be checked; use_edm: whether training mixes in generated images
    Raises DataError: one line that names the flag, file or folder and what to do; also for an unreadable image.
    """
    info = dataset_info(dataset)
    check_input_size(dataset, info, input_size)
    if batch_size < 1:
        raise DataError(f"batch_size: expected 1 or more, got {batch_size}")
    if split not in SPLITS:
        raise DataError(f"split: {split!r}, expected one of {', '.join(SPLITS)}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank: expected 0 to {world_size - 1}, got {rank}")
    source = _evaluated(dataset, data_root, split, held_out, image_list, use_edm)
    classes = class_names(dataset, source, num_classes)
    positions = _positions(indices, len(source))
    sharding = (rank, world_size, num_workers, pin_memory)
    return EvalStream(source, info, classes, input_size, batch_size, positions, *sharding)


def _evaluated(
    dataset: str, data_root: str | Path, split: str, held_out: int, image_list: str | Path | None, use_edm: bool
) -> Source:
    """The images of a split or list, any unreadable one being an error from now on."""
    if image_list is not None:
        source = listed_images(dataset, data_root, split, image_list)
    elif split == "held_out":
        source = read_images(dataset, data_root, "train", in_memory=use_edm)
        _, out = held_out_indices(len(source), held_out)
        if not len(out):
            raise DataError("held_out: no images are held out, give a number above 0")
        source = source.select(out)
        if isinstance(source, ArrayImages):
            return source  # what could not be decoded was left out of training as well
    else:
        source = read_images(dataset, data_root, split)
    source.bad.limit = 0
    source.bad.record({})
    return source


def _positions(indices: Sequence[int] | None, num_images: int) -> np.ndarray:
    """indices as an array, all of num_images if None; DataError if one is outside, twice there, or none."""
    if indices is None:
        return np.arange(num_images)
    positions = np.asarray(indices, np.int64)
    if not len(positions) or positions.min() < 0 or positions.max() >= num_images:
        raise DataError(f"indices: expected some of 0 to {num_images - 1}, got {positions.tolist()[:5]}...")
    if len(np.unique(positions)) < len(positions):
        raise DataError("indices: an image is named twice")
    return positions
