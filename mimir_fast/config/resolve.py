"""What every run settles before it starts: device, precision, compilation, implementations, seeds."""

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mimir_fast.config.pretraining import ComputeConfig, RunConfig
from mimir_fast.training.compilation import missing_compiler


def settle_machine(
    run: RunConfig, compute: ComputeConfig, explicit: set[str], pretend: bool = False
) -> tuple[RunConfig, ComputeConfig, list[str]]:
    """Fill in what depends on the machine; returns both stages and lines to print.  pretend: the device need not be there.

    Raises ValueError if the machine or another flag does not go with a flag that was set.
    """
    notes = []
    if not pretend:
        run = replace(run, device=settled_device(run.device, explicit, notes.append))
    on_cuda = run.device.startswith("cuda")
    if compute.precision is None:
        compute = replace(compute, precision="bf16" if on_cuda else "fp32")
    if compute.residual_dtype == "bf16" and compute.precision != "bf16":
        raise ValueError(f"residual_dtype: bf16 goes with --precision bf16, not with {compute.precision}")
    if compute.compile is None:
        compute = replace(compute, compile=on_cuda)
    if compute.compile and (reason := missing_compiler()):
        notes.append(f"compile: {reason}; running eager")
        compute = replace(compute, compile=False)
    return run, _settle_implementations(compute, on_cuda), notes


def settled_device(device: str, explicit: set[str], say: Callable[[str], None] = print) -> str:
    """The device to run on, the CPU in place of a default that is not there.  Raises ValueError if it was asked for."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    if not torch.cuda.is_available():
        if "device" in explicit:
            raise ValueError(f"device: got {device}, no CUDA device is available here; pass --device cpu")
        say("device: no CUDA device is available here, running on the CPU (--device cpu)")
        return "cpu"
    count = torch.cuda.device_count()
    if index and not (index.isdigit() and int(index) < count):
        raise ValueError(f"device: got {device}, this machine has {count} CUDA devices, counted from cuda:0")
    return device


def _settle_implementations(compute: ComputeConfig, on_cuda: bool) -> ComputeConfig:
    """Operations, attention and MLP: ours on CUDA, attention and MLP in 16 bits; on a CPU, attention of its own if compiled."""
    if compute.kernels == "auto":
        compute = replace(compute, kernels="triton" if on_cuda else "reference")
    elif compute.kernels == "triton" and not on_cuda:
        raise ValueError("kernels: triton needs a CUDA device; pass --kernels reference or leave the default")
    half = compute.kernels == "triton" and compute.precision != "fp32"
    narrow = not on_cuda and compute.precision == "fp32"
    if compute.attention == "auto":
        compute = replace(compute, attention="short" if half else "narrow" if narrow and compute.compile else "sdpa")
    elif compute.attention == "short" and not on_cuda:
        raise ValueError("attention: short needs a CUDA device; pass --attention sdpa or leave the default")
    elif compute.attention == "narrow" and (reason := missing_compiler() if narrow else "it is for CPUs in fp32"):
        raise ValueError(f"attention: narrow: {reason}; pass --attention sdpa or leave the default")
    if compute.mlp == "auto":
        compute = replace(compute, mlp="triton" if half else "reference")
    elif compute.mlp == "triton" and not (on_cuda and compute.precision != "fp32"):
        raise ValueError("mlp: triton needs a CUDA device and 16 bits; pass --mlp reference or leave the default")
    return compute


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch.  The step and the data loader have streams of their own, a function of their position."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
