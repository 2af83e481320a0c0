"""python -m bench data: every way is measured, what is counted, what is printed; a stand-in for FFCV."""

import json
import multiprocessing
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import data
from bench.__main__ import main
from mimir_fast.data.cache.originals import open_originals
from tests.support.pictures import write_pictures

SMALL = "data --images 24 --batch_size 6 --input_size 16 --steps 3"


@pytest.mark.slow
def test_every_way_is_measured(tmp_path, capsys):
    source = write_pictures(tmp_path / "source", 12)
    assert main([*SMALL.split(), "--data_root", str(source), "--results", str(tmp_path / "r.jsonl")]) == 0
    (record,) = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    ways = record["ways"]
    assert {name.partition(",")[0] for name in ways} == {"memcpy", "reader", "whole images", "DataLoader", "JPEG files"}
    assert all(0 < low <= median <= high for way in ways.values() for low, median, high in way.values())
    assert 0 < record["KB rows"] < record["KB whole"]
    assert [found["threads"] for found in record["cold"]] == [1, 4, 16]
    told = capsys.readouterr().out
    for line in (
        "24 images (source), batch 6, 3 steps; cpu",
        "reader / memcpy, bytes per CPU second: ",
        "cold, 16 threads: ",
    ):
        assert f"\n{line}" in f"\n{told}"
    cores = 69_600 / ways["reader, 1 thread"]["images/cpu s"][1]
    memory = 3 * 69_600 * record["KB rows"] / 1e6
    assert f"8 GPUs, ViT-B/16, 69,600 images/s: {cores:.1f} cores, GB/s: DRAM {memory:.0f}, bus " in told


def test_ways_take_turns_and_steps_are_counted(monkeypatch):
    clock, taken = [0.0], []

    def way(name: str, seconds: float):
        def take(keys):
            taken.append(name)
            clock[0] += seconds
            return 100

        return take

    monkeypatch.setattr(data, "cpu_seconds", lambda: clock[0])
    keys = (data.BatchKey(0, step, np.arange(16)) for step in range(1000))
    ways = {"quick": way("quick", 2.0), data.JPEG: way(data.JPEG, 8.0)}
    found = data.alternated(ways, keys, 20)
    assert sorted(taken[:2]) == sorted(taken[2:4]) == sorted(ways)
    assert len({tuple(taken[n : n + 2]) for n in range(0, 44, 2)}) == 2
    rates = {name: data.summary(steps) for name, steps in found.items()}
    # two batches of sixteen images; an eighth of that of JPEG files
    assert [rates[name]["images/cpu s"] for name in ways] == [[16.0] * 3, [0.5] * 3]
    assert [rates[name]["bytes/cpu s"] for name in ways] == [[50.0] * 3, [12.5] * 3]


def busy(done, end):
    started = time.process_time()
    while time.process_time() < started + 0.1:
        pass
    done.set()
    end.wait()


def test_workers_processor_time_counts():
    fork = multiprocessing.get_context("fork")
    done, end = fork.Event(), fork.Event()
    before, own = data.cpu_seconds(), time.process_time()
    worker = fork.Process(target=busy, args=(done, end), daemon=True)
    worker.start()
    done.wait()
    counted, own = data.cpu_seconds() - before, time.process_time() - own
    end.set()
    worker.join()
    assert counted > own + 0.09


def test_ffcv_by_its_documented_signatures(tmp_path, monkeypatch):
    """A stand-in: there is no wheel."""
    from bench.loaders import ffcv

    written = {}

    class DatasetWriter:
        def __init__(self, fname, fields, num_workers=-1):
            written[fname] = fields

        def from_indexed_dataset(self, dataset):
            written["images"] = [dataset[n] for n in range(len(dataset))]

    class Loader:
        def __init__(self, fname, batch_size, num_workers=-1, os_cache=True, order=None, pipelines=None):
            assert (order, set(pipelines)) == ("RANDOM", set(written[fname]))
            self.batch_size, self.side = batch_size, pipelines["image"][0]

        def __iter__(self):
            shape = (self.batch_size, 3, *self.side)
            return iter([(torch.zeros(shape, dtype=torch.uint8), torch.zeros(self.batch_size))] * 2)

    named = {
        "fields": {
            "IntField": lambda: "int",
            "RGBImageField": lambda write_mode, max_resolution: (write_mode, max_resolution),
        },
        "fields.decoders": {
            "IntDecoder": lambda: "int",
            "RandomResizedCropRGBImageDecoder": lambda output_size: output_size,
        },
        "loader": {"Loader": Loader, "OrderOption": SimpleNamespace(RANDOM="RANDOM")},
        "transforms": {"ToTensor": lambda: "tensor"},
        "writer": {"DatasetWriter": DatasetWriter},
    }
    monkeypatch.setitem(sys.modules, "ffcv", SimpleNamespace())
    for name, members in named.items():
        monkeypatch.setitem(sys.modules, f"ffcv.{name}", SimpleNamespace(**members))
    originals = open_originals(write_pictures(tmp_path, 8), "train")
    args = SimpleNamespace(workers=2, input_size=16, batch_size=4)
    assert ffcv(originals, tmp_path / "b", 8, args)([]) == 2 * 4 * 3 * 16**2
    assert written[str(tmp_path / "b")]["image"] == ("raw", 256)
    assert [label for _, label in written["images"]] == originals.labels.tolist()
