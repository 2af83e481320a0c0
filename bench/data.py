"""python -m bench data: images from a cache against a memory copy, torch's DataLoader and JPEG files, in processor time."""

import argparse
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path

import torch

from bench import records
from bench.images import repeated_images, write_images
from bench.loaders import Loader, Rows, Way, WholeReader, copier, crop, ffcv, read
from mimir_fast.data.batch_order import BatchKey, ShuffleSchedule
from mimir_fast.data.cache.build import build_cache
from mimir_fast.data.cache.format import Options
from mimir_fast.data.cache.images import CachedImages
from mimir_fast.data.cache.originals import Originals, open_originals
from mimir_fast.data.cache.packed import CachedCrops
from mimir_fast.data.cache.reader import Reader
from mimir_fast.data.cache.shards import open_cache
from mimir_fast.data.datasets import read_folders
from mimir_fast.data.workers import CropMaker

EPILOG = """All ways to get images take steps in turn, in random order.  Processor time is the process's and its workers'.
first time: whole images, whose checksums are compared, as in a run's first epoch; DataLoader: the same rows, read in worker
processes; FFCV, where it is installed: RGB of at most 256 pixels, crops on the CPU.  The cache takes 5 GB where temporary
files lie (TMPDIR) and is removed."""
# Of a way's figures [0] is the 10th percentile, [1] the median, [2] the 90th.
COLUMNS = """way={way}; images per CPU second={images/cpu s[1]:,.0f}
10 to 90 %={images/cpu s[0]:,.0f} to {images/cpu s[2]:,.0f}; GB per CPU second={GB:.2f}; images/s={images/s[1]:,.0f}"""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOGETHER = 2  # batches of a step, one for each of two workers
JPEG, FEWER = "JPEG files", 8  # which take so long that their batches are smaller by this factor
COLD = 4, (1, 4, 16)  # batches; threads
# Images per second of one H100 at 40 % of its peak, by the bounds in docs/performance.md.
NEEDS, GPUS = {"ViT-B/16": 8_700, "ViT-S/16": 31_000}, 8
PASSES = 3  # over the rows in memory: read from the system's cache, written to the buffer, read by the bus


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("data", __doc__, EPILOG, "data.jsonl")
    add = partial(parser.add_argument, type=int)
    add("--data_root", type=str, default="", help="class folders of images, to be repeated (default: synthetic JPEGs)")
    add("--images", default=20_480, help="in the cache (default: %(default)s)")
    add("--batch_size", default=512, help="(default: %(default)s)")
    add("--input_size", default=224, help="side of the crops (default: %(default)s)")
    add("--steps", default=60, help="of each way (default: %(default)s)")
    add("--workers", default=2, help="processes of DataLoader, JPEG files and FFCV (default: %(default)s)")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Build, measure, print, append the record.  Raises ValueError naming a flag that is wrong."""
    if flags:
        raise ValueError(f"{flags[0]}: no flag of python -m bench data")
    for name in ("steps", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {getattr(args, name)}")
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "files"
        write = partial(repeated_images, Path(args.data_root)) if args.data_root else write_images
        originals = open_originals(write(files, args.images), "train")
        options = Options("train", "yuv420", 384, 0, args.images)
        build_cache(originals, Path(folder), options, os.cpu_count() or 1, lambda done, total: None)
        record = measured(args, originals, Path(folder))
    print(*lines(record), sep="\n")
    records.append(record, args.results)
    return 0


def measured(args: argparse.Namespace, originals: Originals, folder: Path) -> dict:
    """The record.  folder: holds the files of the images and their cache."""
    source = CachedImages(open_cache(folder / "train"))
    crops = CachedCrops(source, args.batch_size, args.input_size, seed=0, threads=1, pin_memory=True)
    schedule = ShuffleSchedule(len(source), args.batch_size)
    keys = (BatchKey(epoch, step, rows) for epoch in count() for step, rows in enumerate(schedule.batches(epoch)))
    planned, images = [crops.reader.windows(key) for key in islice(keys, TOGETHER)], TOGETHER * args.batch_size
    rows = sum(int(batch.counts.sum()) for batch in planned) / images
    whole = sum(int(batch.image_counts.sum()) for batch in planned) / images
    ways = ways_of(args, originals, folder, crops, int(rows * args.batch_size))
    return {
        **records.heading(records.device_name(DEVICE)),
        **{"cores": os.cpu_count(), "data": Path(args.data_root).name or "synthetic"},
        **{name: getattr(args, name) for name in ("images", "batch_size", "input_size", "steps", "workers")},
        **{"KB whole": whole / 1e3, "KB rows": rows / 1e3},
        "KB bus": read(crops.reader, 1, list(islice(keys, TOGETHER))) / images / 1e3,
        "ways": {name: summary(steps) for name, steps in alternated(ways, keys, args.steps).items()},
        "cold": [cold(crops.reader, list(islice(keys, COLD[0])), threads) for threads in COLD[1]],
    }


def ways_of(
    args: argparse.Namespace, originals: Originals, folder: Path, crops: CachedCrops, size: int
) -> dict[str, Way]:
    """All ways that there are here by name.  size: bytes of a batch's rows."""
    source, reader = crops.source, crops.reader
    jpegs = CropMaker(read_folders(folder / "files", "train", optional_train=True), args.input_size, 0)
    ways: dict[str, Way] = {
        "memcpy": copier(reader, size),
        "reader, 1 thread": partial(read, reader, 1),
        "reader, 2 threads": partial(read, reader, 2),
        "reader, 1 thread, first time": partial(read, reader, 1, checked=b"\0"),
        "whole images, 1 thread": partial(read, WholeReader(source, args.batch_size, 0, 1, False), 1),
        "DataLoader": Loader(Rows(reader), args.workers, reader),
        JPEG: Loader(jpegs, args.workers, reader),
    }
    if find_spec("ffcv"):
        ways["FFCV, raw"] = ffcv(originals, folder / "images.beton", TOGETHER * args.batch_size, args)
    if DEVICE.type == "cuda":
        ways["reader, 4 threads, copy and crops"] = partial(crop, crops, DEVICE)
    return ways


def alternated(ways: dict[str, Way], keys: Iterator[BatchKey], steps: int) -> dict[str, list[dict]]:
    """Steps of every way: images, bytes, seconds of processor time (cpu) and of the clock (wall)."""
    found: dict[str, list[dict]] = {name: [] for name in ways}
    order = random.Random(0)
    # In the first two, workers start and memory is touched.
    for step in range(-2, steps):
        for name in order.sample(list(ways), len(ways)):
            batches = list(islice(keys, TOGETHER))
            if name == JPEG:
                batches = [key._replace(indices=key.indices[: -(-len(key.indices) // FEWER)]) for key in batches]
            cpu, wall = cpu_seconds(), time.perf_counter()
            size = ways[name](batches)
            took = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall}
            if step >= 0:
                found[name].append({"images": sum(len(key.indices) for key in batches), "bytes": size, **took})
    return found


def cpu_seconds() -> float:
    """Processor time of this process and of its workers, alive as they are."""
    # Clocks of other processes, which Linux keeps in nanoseconds; /proc shows hundredths of a second.
    clocks = [~worker.pid << 3 | 2 for worker in multiprocessing.active_children() if worker.pid]
    return time.process_time() + sum(map(time.clock_gettime, clocks))


def summary(steps: list[dict]) -> dict[str, list[float]]:
    """10th percentile, median and 90th: images and bytes per second of processor time, images per second."""

    def cuts(what: str, seconds: str) -> list[float]:
        rates = [step[what] / step[seconds] for step in steps]
        tenths = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else rates
        return [tenths[0], statistics.median(rates), tenths[-1]]

    return {
        "images/cpu s": cuts("images", "cpu"),
        "bytes/cpu s": cuts("bytes", "cpu"),
        "images/s": cuts("images", "wall"),
    }


def cold(reader: Reader, keys: list[BatchKey], threads: int) -> dict:
    """Batches that the system was asked to forget: rates, and how many bytes came from the disk for each that was read."""
    for descriptor in reader.images.cache.shards.descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    before, started = disk_bytes(), time.perf_counter()
    size = read(reader, threads, keys)
    seconds, images = time.perf_counter() - started, sum(len(key.indices) for key in keys)
    rates = {"images/s": images / seconds, "GB/s": size / seconds / 1e9}
    return {"threads": threads, **rates, "from disk": (disk_bytes() - before) / size}


def disk_bytes() -> int:
    """What this process has read from disks so far."""
    return int(Path("/proc/self/io").read_text().split("\nread_bytes: ")[1].split()[0])


def lines(record: dict) -> Iterator[str]:
    """The record for people."""
    ways, ours = record["ways"], "reader, 1 thread"
    rate, size = ({name: way[what][1] for name, way in ways.items()} for what in ("images/cpu s", "bytes/cpu s"))
    yield "{images} images ({data}), batch {batch_size}, {steps} steps; {device}, {cores} cores".format(**record)
    if record["device"].startswith(records.SIMULATED):
        yield "a simulated GPU, which takes no time: all rates are the host's"
    yield records.table(COLUMNS, [{"way": name, "GB": size[name] / 1e9, **way} for name, way in ways.items()])
    yield f"reader / memcpy, bytes per CPU second: {size[ours] / size['memcpy']:.2f}"
    for name in [name for name in ways if name in ("DataLoader", JPEG, "FFCV, raw")]:
        yield f"reader / {name}, images per CPU second: {rate[ours] / rate[name]:.1f}"
    whole, rows, bus = (record[f"KB {what}"] for what in ("whole", "rows", "bus"))
    yield f"an image: {whole:.0f} KB, {rows:.0f} KB of it are read ({rows / whole:.2f}), {bus:.0f} KB go over the bus"
    for model, need in NEEDS.items():
        each = GPUS * need
        dram, over, disk = (each * kilobytes / 1e6 for kilobytes in (PASSES * rows, bus, rows))
        cores = f"{each / rate[ours]:.1f} cores, GB/s: DRAM {dram:.0f}, bus {over:.0f}, disk {disk:.0f}"
        yield f"{GPUS} GPUs, {model}, {each:,} images/s: {cores}"
    for found in record["cold"]:
        rates = "{threads} threads: {images/s:,.0f} images/s, {GB/s:.2f} GB/s, {from disk:.0%} from the disk"
        yield f"cold, {rates.format(**found)}"
