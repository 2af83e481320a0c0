"""Ways to get images from a cache, as `python -m bench data` compares them.  Each takes batches and returns their bytes."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mimir_fast.data.batch_order import BatchKey
from mimir_fast.data.cache.originals import Originals
from mimir_fast.data.cache.packed import CachedCrops
from mimir_fast.data.cache.reader import Epoch, Reader
from mimir_fast.data.cache.windows import Windows
from mimir_fast.data.prefetch import prefetch
from mimir_fast.data.stream import batch_loader

Way = Callable[[list[BatchKey]], int]


def read(reader: Reader, threads: int, keys: list[BatchKey], checked: bytes = b"\1") -> int:
    """Our reader.  checked: whether it has seen the images before, and compared their checksums."""
    reader.threads, reader.checked = threads, bytearray(checked * len(reader.checked))
    epoch = Epoch(reader, keys)
    try:
        return sum(filling.buffer.used for filling in epoch)
    finally:
        epoch.close()


class WholeReader(Reader):
    """Reads whole images, whatever the boxes."""

    def windows(self, key: BatchKey) -> Windows:
        found = super().windows(key)
        table = found.table._replace(offsets=np.cumsum(found.image_counts) - found.image_counts)
        return found._replace(starts=found.image_starts, counts=found.image_counts, table=table)


def copier(reader: Reader, size: int) -> Way:
    """Copies `size` bytes for each batch, from anywhere in eight times as many to where the reader puts them."""
    source, rng = np.ones(8 * size, np.uint8), np.random.default_rng(0)

    def copy(keys: list[BatchKey]) -> int:
        for buffer, start in zip(reader.buffers, rng.integers(7 * size, size=len(keys))):
            buffer.bytes[:size] = source[start : start + size]
        return size * len(keys)

    return copy


class Rows(Dataset):
    """A batch's rows, packed as the reader packs them."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def __getitem__(self, key: BatchKey) -> tuple[torch.Tensor]:
        found, shards = self.reader.windows(key), self.reader.images.cache.shards
        rows = torch.empty(found.bytes, dtype=torch.uint8)
        places = found.shards, found.starts, found.table.offsets, found.counts
        for shard, start, place, size in zip(*(numbers.tolist() for numbers in places)):
            shards.read(shard, start, rows.numpy().data[place : place + size])
        return (rows,)


class Loader:
    """torch's DataLoader.  What arrives is copied once more, as by its thread for page-locked memory."""

    def __init__(self, dataset: Dataset, workers: int, reader: Reader):
        self.keys: list[BatchKey] = []
        self.loader, self.reader = batch_loader(dataset, self.keys, workers, False), reader

    def __call__(self, keys: list[BatchKey]) -> int:
        self.keys[:], done = keys, 0
        for (images, *_), buffer in zip(self.loader, self.reader.buffers):
            buffer.memory[: images.nbytes] = images.flatten()
            done += images.nbytes
        return done


def ffcv(originals: Originals, path: Path, count: int, args: argparse.Namespace) -> Way:
    """FFCV's loader over `count` images.  By its documentation: it has no wheel, and this was not run yet."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as TheirLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import ToTensor
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="raw", max_resolution=256), "label": IntField()}
    pairs = [(np.asarray(originals.read(n)), int(originals.labels[n])) for n in range(count)]
    DatasetWriter(str(path), fields, num_workers=args.workers).from_indexed_dataset(pairs)
    decoders = RandomResizedCropRGBImageDecoder((args.input_size, args.input_size)), IntDecoder()
    pipelines = {name: [decoder, ToTensor()] for name, decoder in zip(fields, decoders)}
    how = {"num_workers": args.workers, "os_cache": True, "order": OrderOption.RANDOM, "pipelines": pipelines}
    loader = TheirLoader(str(path), args.batch_size, **how)
    return lambda keys: sum(images.nbytes for images, _ in loader)


def crop(crops: CachedCrops, device: torch.device, keys: list[BatchKey]) -> int:
    """All the way to crops on the GPU, which is waited for at the end; the bytes of the crops."""
    crops.reader.threads = 4
    made = sum(images.nbytes for images, _ in prefetch(crops.epoch(keys, lambda: False), device))
    torch.cuda.synchronize()
    return made
