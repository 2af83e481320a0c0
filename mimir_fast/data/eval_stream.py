"""Evaluation data: every image exactly once, in a fixed order, without augmentation.

Shapes: B batch, N images, H W sides, S side of the input, C = 3 channels.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mimir_fast.config.choices import EVAL_RESIZE, SPLITS
from mimir_fast.data.build import check_input_size
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.crops import Channels, evaluated_side
from mimir_fast.data.datasets import DatasetInfo, Source, dataset_info, read_images
from mimir_fast.data.delivery import Batch, delivered
from mimir_fast.data.errors import DataError
from mimir_fast.data.image_list import listed_images
from mimir_fast.data.sources import ArrayImages, FolderImages
from mimir_fast.data.splits import class_names, held_out_indices
from mimir_fast.data.stream import batch_loader
from mimir_fast.data.workers import batch_or_bad, workers_starting


class EvalStream:
    """Batches of uint8 images and labels of one rank; may be iterated any number of times.

    indices      int64, this rank's images by their index in the split (or image list), in the order in which they come
    num_images   images of all ranks together
    classes      names in label order, num_classes of them
    mean, std    per channel, of images in [0,1]
    source       the images of the split or list, which `indices` count
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
        resize: str = "crop",
    ):
        self.num_images, self.indices = len(positions), positions[rank::world_size]
        self.classes, self.num_classes = classes, len(classes)
        self.mean: Channels = info.mean
        self.std: Channels = info.std
        self.source, self._bad = source, source.bad
        self._keys = [self.indices[i : i + batch_size] for i in range(0, len(self.indices), batch_size)]
        of_any_size = info.side is None and not is_resized(source, input_size)
        maker = EvalMaker(source, input_size, of_any_size, resize)
        # Workers end with each pass: between two validations of a training they would only hold memory.
        self._loader = batch_loader(maker, self._keys, num_workers, pin_memory, persistent=False)

    def __len__(self) -> int:
        """Batches of this rank; the last one may be smaller, and a rank may have none."""
        return len(self._keys)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images uint8 [B,3,S,S] and labels int64 [B].  Raises DataError for an unreadable image, naming it."""
        with workers_starting():
            batches = iter(self._loader)
        for images, labels, bad in delivered(batches):
            self._bad.record(bad)
            yield images, labels


class EvalMaker(Dataset[Batch]):
    """Map-style dataset of evaluation batches, by the indices of their images.

    of_any_size   scale the shorter side to evaluated_side(S) pixels and crop the centre; else the centre is cropped, or
                  padded with zeros, where S differs from the images' side
    resize        none: all images have S x S pixels and are taken as they are
    """

    def __init__(self, source: Source, input_size: int, of_any_size: bool, resize: str = "crop"):
        self.source, self.input_size = source, input_size
        convert = as_it_is if resize == "none" else resized_centre if of_any_size else centre
        self.convert = partial(convert, size=input_size)
        if not self._fits():
            # For its imports, which are slow: forked workers then have them already.
            self.convert(Image.new("RGB", (2, 2)))

    def __getitem__(self, indices: np.ndarray) -> Batch:
        return batch_or_bad(lambda: self._make(indices))

    def _make(self, indices: np.ndarray) -> Batch:
        taken = self.source.take(indices, None if self._fits() else self.convert)
        images = np.ascontiguousarray(taken.images.transpose(0, 3, 1, 2))
        return torch.from_numpy(images), torch.from_numpy(taken.labels), {}

    def _fits(self) -> bool:
        """Whether images are used as they are."""
        return isinstance(self.source, ArrayImages) and self.source.images.shape[1] == self.input_size


def as_it_is(image: Image.Image, size: int) -> np.ndarray:
    """An RGB image that has the size already: uint8 [S,S,C]."""
    return np.asarray(image)


def is_resized(source: Source, input_size: int) -> bool:
    """Whether images come from a cache that was resized for evaluation.  Raises DataError if that was for another input."""
    made_for = source.cache.manifest.options.input_size if isinstance(source, CachedImages) else 0
    if made_for not in (0, input_size):
        raise DataError(
            f"input_size: {input_size}, but {source.bad.where} was made for {made_for}; "
            f"make another with mimir-fast cache --split val --input_size {input_size}"
        )
    return bool(made_for)


def centre(image: Image.Image, size: int) -> np.ndarray:
    """Centre crop of an RGB image, padded with zeros where it is smaller: uint8 [S,S,C]."""
    # Slow to import.
    from torchvision.transforms.functional import center_crop

    return np.asarray(center_crop(image, [size, size]))


def resized(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side of an image to evaluated_side(size) pixels, bicubic."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    return resize(image, [evaluated_side(size)], InterpolationMode.BICUBIC, antialias=True)


def resized_centre(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to evaluated_side(size) pixels, bicubic, and crop the centre: uint8 [S,S,C]."""
    return centre(resized(image, size), size)


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
    eval_resize: str = "crop",
) -> EvalStream:
    """Batches of a split for evaluation: each image once, in a fixed order; rank r has images r, r + world_size, ...

    split         "val", "train", or "held_out": the training images that build_train_data(held_out=...) leaves out
    indices       which images of the split or list, all by default
    image_list    a file of paths below the split's folder, one per line; only for images of any size
    num_classes   outputs of the model, to be checked
    use_edm       whether training mixes in generated images
    eval_resize   crop: images of any size are resized and their centre is cropped; none: all must have input_size x input_size
                  pixels, and are taken as they are
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
    if eval_resize not in EVAL_RESIZE:
        raise DataError(f"eval_resize: {eval_resize!r}, expected {' or '.join(EVAL_RESIZE)}")
    source = _evaluated(dataset, data_root, split, held_out, image_list, use_edm)
    if eval_resize == "none":
        _as_they_are(source, info, dataset, input_size)
    classes = class_names(dataset, source, num_classes)
    positions = _positions(indices, len(source))
    sharding = (rank, world_size, num_workers, pin_memory)
    return EvalStream(source, info, classes, input_size, batch_size, positions, *sharding, eval_resize)


def _as_they_are(source: Source, info: DatasetInfo, dataset: str, input_size: int) -> None:
    """From now on an image of another size than input_size is an error."""
    if isinstance(source, FolderImages) and info.side is None:
        source.side = input_size
    elif isinstance(source, CachedImages):
        raise DataError(
            f"eval_resize: none, but {source.bad.where} is a cache; pass the folder of image files as data_root"
        )
    elif info.side != input_size:
        raise DataError(
            f"eval_resize: none, but images of {dataset} have {info.side} x {info.side} pixels and input_size is {input_size}"
        )


def _evaluated(
    dataset: str, data_root: str | Path, split: str, held_out: int, image_list: str | Path | None, use_edm: bool
) -> Source:
    """The images of a split or list; from now on an unreadable one is an error."""
    source: Source
    if image_list is not None:
        source = listed_images(dataset, data_root, split, image_list)
    elif split == "held_out":
        source = read_images(dataset, data_root, "train", in_memory=use_edm)
        _, out = held_out_indices(len(source), held_out)
        if not len(out):
            raise DataError("held_out: no images are held out, give a number above 0")
        source = source.select(out)
        # What could not be decoded into memory is missing from the training images as well.
        if isinstance(source, ArrayImages):
            return source
    else:
        source = read_images(dataset, data_root, split)
    # An accuracy over other images than asked for would be wrong: training tolerates a few unreadable files, this does not.
    source.bad.limit = 0
    # Raises for those met while decoding into memory.
    source.bad.record({})
    return source


def _positions(indices: Sequence[int] | None, num_images: int) -> np.ndarray:
    """indices as an array, all of num_images if None; raises DataError if it is empty or one is outside or there twice."""
    if indices is None:
        return np.arange(num_images)
    positions = np.asarray(indices, np.int64)
    if not len(positions) or positions.min() < 0 or positions.max() >= num_images:
        raise DataError(f"indices: expected some of 0 to {num_images - 1}, got {positions.tolist()[:5]}...")
    if len(np.unique(positions)) < len(positions):
        raise DataError("indices: an image is named twice")
    return positions
