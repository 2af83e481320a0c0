"""mimir-fast fit: what a pre-training needs in GPU memory, and the largest batch that fits; no GPU needed.

Also `python -m mimir_fast.fit`.  Takes every flag of `mimir-fast pretrain`, so that a command line can be tried as it stands.
"""

import sys
from dataclasses import replace
from typing import NamedTuple

from mimir_fast.arguments import PRETRAIN, build_parser, canonical, configuration
from mimir_fast.build import penalty_name
from mimir_fast.config import PretrainConfig
from mimir_fast.fit.prediction import Prediction, predict
from mimir_fast.models.attention import PACKAGES
from mimir_fast.pretrain import settle_defaults

DESCRIPTION = """Peak GPU memory [GiB, 2^30 bytes] of one process's pre-training step, and the largest batch [images] that fits.
Needs no GPU, reads no data, takes seconds when eager and a minute or two when compiled.  Exit status: 0 the batch fits a GPU,
1 it does not, 2 wrong input."""
GIB = 2**30
CONTEXT = 1.0  # GiB kept free for the CUDA context, loaded kernels and libraries
FRAGMENTATION = 0.05  # share of the predicted peak kept free for holes between allocations
LARGEST = 2**20  # images; no GPU holds more


class Gpu(NamedTuple):
    """Memory in GiB as CUDA reports it, and what cuBLAS takes from the allocator for each thread that uses it, MiB."""

    memory: float
    workspace: float


GPUS = {
    "a100-40": Gpu(39.4, 8.125),
    "a100-80": Gpu(79.1, 8.125),
    "h100-80": Gpu(79.1, 32),
    "h200-141": Gpu(139.7, 32),
    "l40s-48": Gpu(44.3, 8.125),
    "rtx4090-24": Gpu(23.5, 8.125),
}


def main(argv: list[str] | None = None) -> int:
    """Predict and print; returns the exit status: 0 the batch fits, 1 it does not, 2 wrong input."""
    try:
        config, gpus = parse_fit_args(sys.argv[1:] if argv is None else argv)
        prediction = predict(config)
    except (ValueError, ImportError) as error:
        print(f"mimir-fast fit: error: {error}", file=sys.stderr)
        return 2
    for line in describe(config, prediction, gpus):
        print(line)
    batch = config.optim.batch_size
    return 0 if any(needed(prediction, gpu, batch) <= gpu.memory for gpu in gpus.values()) else 1


def parse_fit_args(argv: list[str]) -> tuple[PretrainConfig, dict[str, Gpu]]:
    """Command-line words -> the configuration as it would run on CUDA, and the GPUs it is held against.

    Exits with status 2 and one line on a wrong flag (argparse); raises ValueError on a wrong value.
    """
    parser = build_parser(PRETRAIN._replace(prog="mimir-fast fit", description=DESCRIPTION))
    group = parser.add_argument_group("What it must fit (default: every GPU known by name)")
    group.add_argument("--gpu", choices=list(GPUS), help="a GPU by name and memory")
    group.add_argument("--memory_gib", type=float, metavar="FLOAT", help="any other GPU's memory [GiB]")
    given = vars(parser.parse_args([canonical(word) for word in argv]))
    name, memory = given.pop("gpu", None), given.pop("memory_gib", None)
    if name and memory is not None:
        raise ValueError(f"memory_gib: got {memory:g} beside --gpu {name}; pass one of the two")
    if memory is not None and not memory > 0:
        raise ValueError(f"memory_gib: got {memory:g}, expected more than 0")
    config = on_cuda(*configuration(given))
    if memory is not None:
        return config, {f"{memory:g} GiB": Gpu(memory, 32)}
    return config, {name: GPUS[name]} if name else GPUS


def on_cuda(config: PretrainConfig, explicit: set[str]) -> PretrainConfig:
    """The configuration with the defaults it would have on a CUDA machine.

    Raises ValueError if it asks for the CPU, for shards of the model or for a package's attention, or is wrong in itself.
    """
    if "device" in explicit and not config.run.device.startswith("cuda"):
        raise ValueError(f"device: got {config.run.device}, expected cuda: fit predicts GPU memory")
    if config.optim.parallel == "fsdp" and config.dist.world_size > 1:
        raise ValueError("parallel: got fsdp; fit predicts a process that has the whole model, expected ddp")
    if config.optim.attention in PACKAGES:
        raise ValueError(f"attention: got {config.optim.attention}; fit predicts auto, short, sdpa and math")
    compiled = config.optim.compile in (None, True)  # whether this machine has a compiler or not
    settled, _ = settle_defaults(replace(config, run=replace(config.run, device="cuda:0")), explicit, pretend=True)
    return replace(settled, optim=replace(settled.optim, compile=compiled))


def peak(prediction: Prediction, gpu: Gpu, batch: int) -> dict[str, float]:
    """GiB by kind at the step's peak.  cuBLAS has two workspaces: the main thread's and autograd's."""
    kinds = {kind: size / GIB for kind, size in prediction.at(batch).items()}
    return {**kinds, "cuBLAS workspaces": 2 * gpu.workspace / 1024}


def needed(prediction: Prediction, gpu: Gpu, batch: int) -> float:
    """GiB the GPU must have: the peak and the reserve."""
    return sum(peak(prediction, gpu, batch).values()) * (1 + FRAGMENTATION) + CONTEXT


def largest_batch(prediction: Prediction, gpu: Gpu) -> int:
    """The largest batch that fits with the reserve, 0 if not even one image does."""
    low, high = 0, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        fits = needed(prediction, gpu, middle) <= gpu.memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def describe(config: PretrainConfig, prediction: Prediction, gpus: dict[str, Gpu]) -> list[str]:
    """The lines of the report."""
    m, o, a = config.model, config.optim, config.attack
    attack = "none" if a.attack == "plain" else f"{a.steps} step(s)"
    compiled = f"compiled by {o.compile_region}" if o.compile else "eager"
    settings = [compiled, f"kernels {o.kernels}", f"attention {o.attention}", f"residual {o.residual_dtype}"]
    settings += ["activation checkpointing"] * o.activation_checkpointing
    kinds = peak(prediction, next(iter(gpus.values())), o.batch_size)
    lines = [
        f"{m.model} at {m.input_size}/{m.patch_size}, {o.precision}, {', '.join(settings)}; "
        f"attack {attack}; penalty {penalty_name(config) or 'none'}",
        f"predicted peak at batch {o.batch_size} (one process; torch.cuda.max_memory_allocated):",
        *(f"  {kind:<28}{size:8.2f} GiB" for kind, size in kinds.items()),
        f"  {'sum':<28}{sum(kinds.values()):8.2f} GiB",
        f"largest batch that fits, keeping {CONTEXT:g} GiB (CUDA context) and {FRAGMENTATION:.0%} of the peak "
        "(fragmentation) free:",
    ]
    for name, gpu in gpus.items():
        fits = needed(prediction, gpu, o.batch_size) <= gpu.memory
        verdict = "fits" if fits else "does not fit"
        lines.append(
            f"  {name:<12}{gpu.memory:7.1f} GiB {largest_batch(prediction, gpu):8d}   (batch {o.batch_size} {verdict})"
        )
    if o.compile and o.compile_mode in ("reduce-overhead", "max-autotune"):
        lines.append(f"compile_mode: {o.compile_mode} runs CUDA graphs, whose memory pools are not counted here")
    if config.dist.world_size > 1:
        lines.append("world_size: the gradients' buffers of data parallelism are not counted here")
    return lines


if __name__ == "__main__":
    sys.exit(main())
