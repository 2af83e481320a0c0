"""Training data: builds the batch stream of a run from its flags."""

import math
from dataclasses import dataclass
from pathlib import Path

from mimir_fast.data.archives import read_npz
from mimir_fast.data.batch_order import EdmSampler, Schedule, ShuffleSchedule, check_unsup_fraction
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.packed import CachedCrops
from mimir_fast.data.cache.staging import staged
from mimir_fast.data.crops import PAD
from mimir_fast.data.datasets import INFO, DatasetInfo, Source, dataset_info, read_images
from mimir_fast.data.errors import DataError
from mimir_fast.data.policies import Augment, Augmentation
from mimir_fast.data.sources import ArrayImages, MixedImages
from mimir_fast.data.splits import check_labels, class_names, held_out_indices
from mimir_fast.data.stream import BatchStream
from mimir_fast.data.workers import BatchMaker, CropMaker

EDM_SOURCE = "https://github.com/wzekai99/DM-Improves-AT"


@dataclass(frozen=True)
class Loading:
    """Flags of data loading; raises DataError for values that are not possible.

    accum_iter          micro-batches per update; shortens the epoch if use_edm, as in the original
    data_threads        that read the crops of pre-training from a cache, in place of workers
    kernels             implementation of those crops: auto, triton or reference
    stage               folder to copy the training images' cache to first; empty: read it where it is
    use_edm             fill unsup_fraction of each batch with generated images from aux_data_filename (.npz)
    """

    accum_iter: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pin_memory: bool = False
    data_threads: int = 4
    kernels: str = "auto"
    stage: str | Path = ""
    use_edm: bool = False
    unsup_fraction: float = 0.7
    aux_data_filename: str | Path = ""

    def __post_init__(self):
        counts = {"accum_iter": (self.accum_iter, 1), "world_size": (self.world_size, 1)}
        counts["data_threads"] = (self.data_threads, 1)
        for field, (value, least) in (counts | {"num_workers": (self.num_workers, 0)}).items():
            _at_least(field, value, least)
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank: expected 0 to {self.world_size - 1}, got {self.rank}")


def build_pretrain_data(
    dataset: str, data_root: str | Path, input_size: int, batch_size: int, **loading
) -> BatchStream:
    """Training images of a data set as batches of `batch_size` per rank, cropped to input_size pixels and flipped.

    loading   the fields of Loading
    Raises DataError: one line that names the flag, file or folder and what to do.
    """
    # All flags are checked before images are read, which can take minutes.
    load = Loading(**loading)
    info = _checked_info(dataset, input_size, batch_size, load)
    real = _read(dataset, data_root, load)
    source, schedule = _scheduled(real, batch_size, load)
    batches: BatchMaker | CropMaker | CachedCrops
    if isinstance(source, CachedImages):
        how = (load.seed, load.data_threads, load.pin_memory, load.kernels)
        batches = CachedCrops(source, batch_size, input_size, *how)
    elif info.side is None and not isinstance(source, MixedImages):
        batches = CropMaker(source, input_size, load.seed)
    else:
        batches = BatchMaker(source, input_size, False, info.flip, load.seed, load.rank)
    return _stream(dataset, len(real), real.classes or (), schedule, batches, load)


def build_train_data(
    dataset: str,
    data_root: str | Path,
    input_size: int,
    batch_size: int,
    *,
    augment: Augment,
    num_classes: int | None = None,
    held_out: int = 0,
    warmup_aa: bool = False,
    edm_aug: str = "base",
    **loading,
) -> BatchStream:
    """Labelled training images as batches of `batch_size` per rank, augmented to input_size x input_size pixels.

    num_classes   outputs of the model, to be checked; None: as many as the data set has
    held_out      images kept back, always the same ones: see held_out_indices
    augment       applied after a crop and a flip.  Images of any size are cropped at a random scale: 0.2 to 1 of the area, as
                  in pre-training, or 0.08 to 1 with aa.  Small images are padded by 4 pixels and cropped.
    warmup_aa     see warmup_augment
    edm_aug       with use_edm, applied to real and generated images alike before aa and erasing: none (not even a crop), base
                  (crop and flip), cutout, autoaugment (and cutout), randaugment, idbh
    loading       the fields of Loading
    Raises DataError: one line that names the flag, file or folder and what to do.
    """
    load = Loading(**loading)
    info = _checked_info(dataset, input_size, batch_size, load)
    augmentation = Augmentation(augment, edm_aug if load.use_edm else None, warmup_aa)
    real = _read(dataset, data_root, load)
    classes = class_names(dataset, real, num_classes)
    kept, _ = held_out_indices(len(real), held_out)
    real = real.select(kept) if held_out else real
    source, schedule = _scheduled(real, batch_size, load)
    if isinstance(source, MixedImages):
        check_labels(source.generated.labels, len(classes), str(load.aux_data_filename))
    how = (info.side is None, info.flip, load.seed, load.rank)
    batches = BatchMaker(source, input_size, *how, augmentation)
    return _stream(dataset, len(real), classes, schedule, batches, load)


def _read(dataset: str, data_root: str | Path, load: Loading) -> Source:
    """The training images, copied to load.stage first where that is asked for."""
    if load.stage:
        data_root = staged(data_root, Path(load.stage).expanduser(), "train")
    return read_images(dataset, data_root, in_memory=load.use_edm)


def _stream(
    dataset: str,
    num_images: int,
    classes,
    schedule: Schedule,
    batches: BatchMaker | CropMaker | CachedCrops,
    load: Loading,
):
    # The original's name for real and generated images together, "cifar10s"; logs and checkpoints hold it.
    name = f"{dataset}s" if load.use_edm else dataset
    info = dataset_info(dataset)
    return BatchStream(name, num_images, info, schedule, batches, load.num_workers, load.pin_memory, classes)


def _scheduled(real: Source, batch_size: int, load: Loading) -> tuple[Source | MixedImages, Schedule]:
    """The images and their order; with generated ones an epoch has ceil(real / (batch_size * accum_iter * world)) batches."""
    if not load.use_edm:
        return real, ShuffleSchedule(len(real), batch_size, load.rank, load.world_size, load.seed)
    # Data sets that can be mixed were read with in_memory.
    assert isinstance(real, ArrayImages)
    generated = read_npz(Path(load.aux_data_filename).expanduser(), "aux_data_filename")
    # The original counts optimizer updates here, and takes that many micro-batches.
    num_batches = math.ceil(len(real) / (batch_size * load.accum_iter * load.world_size))
    source = MixedImages(real, generated, str(load.aux_data_filename))
    position = {"seed": load.seed, "rank": load.rank}
    return source, EdmSampler(len(real), len(generated), batch_size, load.unsup_fraction, num_batches, **position)


def _checked_info(dataset: str, input_size: int, batch_size: int, load: Loading) -> DatasetInfo:
    """Constants of the data set, after the checks that need no images."""
    info = dataset_info(dataset)
    check_input_size(dataset, info, input_size)
    _at_least("batch_size", batch_size, 1)
    if load.use_edm:
        _check_edm(dataset, info, load.unsup_fraction, load.aux_data_filename)
    return info


def check_input_size(dataset: str, info: DatasetInfo, input_size: int) -> None:
    """Raise DataError unless images can be cropped to input_size, padded by PAD where they are small."""
    largest = math.inf if info.side is None else info.side + 2 * PAD
    if not 1 <= input_size <= largest:
        allowed = (
            "a positive number" if info.side is None else f"1 to {largest} (images of {info.side} padded by {PAD})"
        )
        raise DataError(f"input_size: {input_size} is not possible for {dataset}, expected {allowed}")


def _check_edm(dataset: str, info: DatasetInfo, unsup_fraction: float, aux_data_filename: str | Path) -> None:
    if not info.edm:
        raise DataError(f"use_edm: not possible with {dataset}, only with {', '.join(n for n in INFO if INFO[n].edm)}")
    if not str(aux_data_filename):
        raise DataError(
            "aux_data_filename: got none, --use_edm needs an .npz file of generated images (image [N,H,W,3] uint8, label [N]), "
            f"such as 1m.npz or 5m.npz of {EDM_SOURCE}"
        )
    check_unsup_fraction(unsup_fraction)


def _at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{field}: expected {least} or more, got {value}")
