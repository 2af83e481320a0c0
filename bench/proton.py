"""Triton's profiler Proton: kernels' times by stage, at little cost for short kernels."""

import importlib
import json
from collections import defaultdict
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from bench.step.counts import pretend_gpu
from mimir_fast.training.stages import STAGES


class Session:
    """Times of all kernels between start and stop, in the file NAME.hatchet.

    Raises ValueError without a real GPU, or where Triton comes without Proton.
    """

    def __init__(self, name: Path):
        if not torch.cuda.is_available() or pretend_gpu():
            raise ValueError("proton: no CUDA device here; it times kernels on a real GPU only")
        try:
            self.proton = importlib.import_module("triton.profiler")
        except ImportError as error:
            raise ValueError(
                f"proton: this Triton comes without triton.profiler ({error}); leave the flag out"
            ) from error
        self.name = name

    def opened(self, stage: str) -> AbstractContextManager:
        return self.proton.scope(stage)

    def start(self) -> None:
        self.name.parent.mkdir(parents=True, exist_ok=True)
        self.proton.start(str(self.name), context="shadow", data="tree")

    def stop(self) -> None:
        self.proton.finalize()

    def lines(self, top: int) -> list[str]:
        """The most expensive kernels with their stages, and where all of them are."""
        file = self.name.with_suffix(".hatchet")
        times = kernel_times(json.loads(file.read_text()))
        whole = sum(us for _, us in times.values()) or 1.0
        rows = sorted(times.items(), key=lambda item: -item[1][1])[:top]
        text = [f"the {len(rows)} most expensive of {len(times)} kernels and stages (calls, ms, share)"]
        text += [
            f"{count:7d}{us / 1e3:11.3f}{us / whole:8.1%}  {stage}: {name[:110]}" for (stage, name), (count, us) in rows
        ]
        return [*text, f"all: {file} (pip install llnl-hatchet; proton-viewer -m time/ms {file})"]


def kernel_times(tree: list[dict]) -> dict[tuple[str, str], tuple[int, float]]:
    """A hatchet tree -> (stage, kernel) -> (calls, microseconds).  Leaves with a time are kernels; stages are scopes above."""
    found: dict[tuple[str, str], tuple[int, float]] = defaultdict(lambda: (0, 0.0))

    def visit(node: dict, stage: str) -> None:
        name = node.get("frame", {}).get("name", "")
        if name in STAGES and stage == "rest":
            stage = name
        for child in node.get("children", []):
            visit(child, stage)
        metrics = node.get("metrics", {})
        if not node.get("children") and "time (ns)" in metrics:
            count, us = found[stage, name]
            found[stage, name] = count + int(metrics.get("count", 1)), us + metrics["time (ns)"] / 1e3

    for root in tree:
        if "frame" in root:  # the last entry of the file describes devices
            visit(root, "rest")
    return dict(found)
