"""mimir-fast pretrain: configuration -> objects -> loop -> exit.

Also `python -m mimir_fast.pretrain`, alone or under torchrun.
"""

import random
import sys
from dataclasses import replace

import numpy as np
import torch

from mimir_fast.arguments import parse_pretrain_args
from mimir_fast.checkpoint import CheckpointError
from mimir_fast.compiling import keep_compiled_code, missing_compiler
from mimir_fast.config import OptimConfig, PretrainConfig
from mimir_fast.data import DataError
from mimir_fast.distributed import World, join_world
from mimir_fast.mi import PENALTIES
from mimir_fast.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Run a pre-training; returns the exit status: 0 done or stopped by SIGTERM, 1 failed, 2 wrong input, 130 Ctrl-C."""
    world = World()
    try:
        config, explicit = parse_pretrain_args(sys.argv[1:] if argv is None else argv)
        config, notes = settle_defaults(config, explicit)
        world = join_world(config.dist, config.run.device)
        seed_everything(config.run.seed + world.rank)
        keep_compiled_code()
        trainer = Trainer(config, world, notes)
    except (ValueError, OSError) as error:
        print(f"mimir-fast pretrain: error: {error}", file=sys.stderr)
        world.close()
        return 2
    try:
        return trainer.run()
    except (CheckpointError, DataError, OSError) as error:
        print(f"mimir-fast pretrain: error: {error}", file=sys.stderr)
        return 1
    finally:
        trainer.close()
        world.close()


def settle_defaults(config: PretrainConfig, explicit: set[str]) -> tuple[PretrainConfig, list[str]]:
    """Fill in what depends on the machine (device, precision, compilation); returns the configuration and lines to print."""
    notes = []
    run, optim = config.run, config.optim
    if run.device == "cuda" and not torch.cuda.is_available():
        if "device" in explicit:
            raise ValueError("device: no CUDA device is available here; pass --device cpu")
        notes.append("device: no CUDA device is available here, running on the CPU (--device cpu)")
        run = replace(run, device="cpu")
    on_cuda = run.device.startswith("cuda")
    if optim.precision is None:
        optim = replace(optim, precision="bf16" if on_cuda else "fp32")
    if optim.residual_dtype == "bf16" and optim.precision != "bf16":
        raise ValueError(f"residual_dtype: bf16 goes with --precision bf16, not with {optim.precision}")
    if optim.compile is None:
        optim = replace(optim, compile=on_cuda)
    if optim.compile and (reason := missing_compiler()):
        notes.append(f"compile: {reason}; running eager")
        optim = replace(optim, compile=False)
    optim = _settle_implementations(_settle_parallel(optim, explicit), on_cuda)
    if config.penalty.mi_train not in (*PENALTIES, "plain"):
        notes.append(
            f"mi_train: {config.penalty.mi_train!r} is none of {', '.join(PENALTIES)}: NO penalty, as in the original"
        )
    if config.attack.attack == "plain" and config.penalty.mi_train in PENALTIES:
        notes.append(
            "attack: plain switches the penalty off too, as in the original; --attack pgd_mae switches both on"
        )
    return replace(config, run=run, optim=optim), notes


def _settle_parallel(optim: OptimConfig, explicit: set[str]) -> OptimConfig:
    """What goes with shards of a model."""
    if optim.parallel != "fsdp":
        return optim
    if optim.precision == "fp16":
        raise ValueError("parallel: fsdp goes with --precision bf16 or fp32, not with fp16")
    if optim.compile_region == "model" and "compile_region" in explicit:
        raise ValueError(
            "compile_region: fsdp gathers parameters block by block and compiles so too; leave the flag out"
        )
    return replace(optim, compile_region="block")


def _settle_implementations(optim: OptimConfig, on_cuda: bool) -> OptimConfig:
    """Operations, attention and MLP: ours on CUDA, attention and MLP in 16 bits; on a CPU, attention of its own if compiled."""
    if optim.kernels == "auto":
        optim = replace(optim, kernels="triton" if on_cuda else "reference")
    elif optim.kernels == "triton" and not on_cuda:
        raise ValueError("kernels: triton needs a CUDA device; pass --kernels reference or leave the default")
    half = optim.kernels == "triton" and optim.precision != "fp32"
    narrow = not on_cuda and optim.precision == "fp32"
    if optim.attention == "auto":
        optim = replace(optim, attention="short" if half else "narrow" if narrow and optim.compile else "sdpa")
    elif optim.attention == "short" and not on_cuda:
        raise ValueError("attention: short needs a CUDA device; pass --attention sdpa or leave the default")
    elif optim.attention == "narrow" and (reason := missing_compiler() if narrow else "it is for CPUs in fp32"):
        raise ValueError(f"attention: narrow: {reason}; pass --attention sdpa or leave the default")
    if optim.mlp == "auto":
        optim = replace(optim, mlp="triton" if half else "reference")
    elif optim.mlp == "triton" and not (on_cuda and optim.precision != "fp32"):
        raise ValueError("mlp: triton needs a CUDA device and 16 bits; pass --mlp reference or leave the default")
    return optim


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch.  The step and the data loader have streams of their own, a function of their position."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
