"""GPUs, what a prediction leaves free on them, and the report."""

from typing import NamedTuple

from mimir_fast.config.choices import SDPA_BACKENDS
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.resolve import Config, Machine, Run, resolve
from mimir_fast.memory.prediction import Prediction
from mimir_fast.models.attention import PACKAGES
from mimir_fast.training import finetuning, pretraining
from mimir_fast.training.compilation import WITHOUT_GRAPHS
from mimir_fast.training.describe import arithmetic
from mimir_fast.training.options import patch_size

GIB = 2**30
# GiB kept free for the CUDA context, loaded kernels and libraries.
CONTEXT = 1.0
# Share of the predicted peak kept free for holes between allocations.
FRAGMENTATION = 0.05
# Images: no GPU holds a larger batch.
LARGEST = 2**20


class Gpu(NamedTuple):
    """Memory in GiB as CUDA reports it, and what cuBLAS takes from the allocator for each thread that uses it, MiB."""

    memory: float
    workspace: float


# What CUDA reports as total is less than the label says.  cuBLAS takes 32 MiB on Hopper, 8.125 on the others.
GPUS = {
    "a100-40": Gpu(39.4, 8.125),
    "a100-80": Gpu(79.1, 8.125),
    "h100-80": Gpu(79.1, 32),
    "h200-141": Gpu(139.7, 32),
    "l40s-48": Gpu(44.3, 8.125),
    "rtx4090-24": Gpu(23.5, 8.125),
}


def on_cuda(config: Config, explicit: set[str]) -> Run[Config]:
    """The run that it would be on a CUDA machine.

    Raises ValueError if it asks for the CPU, for shards of the model or for another's attention, or is wrong in itself.
    """
    if "device" in explicit and not config.run.device.startswith("cuda"):
        raise ValueError(f"device: got {config.run.device}, expected cuda: memory predicts GPU memory")
    if config.compute.parallel == "fsdp" and config.dist.world_size > 1:
        raise ValueError("parallel: got fsdp; memory predicts a process that has the whole model, expected ddp")
    if isinstance(config, FinetuneConfig) and config.model.nb_classes is None:
        raise ValueError(f"nb_classes: memory reads no data; say how many classes {config.data.dataset} has")
    if config.compute.attention in (*PACKAGES, *SDPA_BACKENDS):
        raise ValueError(f"attention: got {config.compute.attention}; memory predicts auto, short, sdpa and math")
    # The defaults' memory: nothing is measured.  With a compiler, whether this machine has one or not, as on the GPU's machine.
    pretended = Machine(cuda_devices=1, missing_compiler=lambda: None)
    return resolve(config.updated({"device": "cuda:0", "tune": "off"}), explicit, pretended)


def peak(prediction: Prediction, gpu: Gpu, batch: int) -> dict[str, float]:
    """GiB by kind at the step's peak.  cuBLAS has two workspaces: the main thread's and autograd's."""
    kinds = {kind: size / GIB for kind, size in prediction.at(batch).items()}
    return {**kinds, "cuBLAS workspaces": 2 * gpu.workspace / 1024}


def needed(prediction: Prediction, gpu: Gpu, batch: int) -> float:
    """GiB the GPU must have: the peak and the reserve."""
    return sum(peak(prediction, gpu, batch).values()) * (1 + FRAGMENTATION) + CONTEXT


def largest_batch(prediction: Prediction, gpu: Gpu) -> int:
    """The largest batch that fits with the reserve, 0 if not even one image does."""
    # Bisection: memory grows with the batch, and one trace predicts every batch.
    low, high = 0, LARGEST
    while low < high:
        middle = (low + high + 1) // 2
        fits = needed(prediction, gpu, middle) <= gpu.memory
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def report(run: Run, prediction: Prediction, gpus: dict[str, Gpu]) -> list[str]:
    """The lines that say what was predicted of what."""
    config, c, batch = run.config, run.compute, run.config.optim.batch_size
    words = arithmetic(c) + ", activation checkpointing" * c.activation_checkpointing
    summary = (finetuning if isinstance(config, FinetuneConfig) else pretraining).summary(config)
    kinds = peak(prediction, next(iter(gpus.values())), batch)
    lines = [
        f"{config.model.model} at {config.model.input_size}/{patch_size(run)}, {words}; {summary}",
        f"predicted peak at batch {batch} (one process; torch.cuda.max_memory_allocated):",
        *(f"  {kind:<28}{size:8.2f} GiB" for kind, size in kinds.items()),
        f"  {'sum':<28}{sum(kinds.values()):8.2f} GiB",
        f"largest batch that fits, keeping {CONTEXT:g} GiB (CUDA context) and {FRAGMENTATION:.0%} of the peak "
        "(fragmentation) free:",
    ]
    for name, gpu in gpus.items():
        fits = needed(prediction, gpu, batch) <= gpu.memory
        verdict = "fits" if fits else "does not fit"
        lines.append(
            f"  {name:<12}{gpu.memory:7.1f} GiB {largest_batch(prediction, gpu):8d}   (batch {batch} {verdict})"
        )
    if c.compile and not c.step_graph and c.compile_mode in WITHOUT_GRAPHS:
        lines.append(f"compile_mode: {c.compile_mode} runs CUDA graphs, whose memory pools are not counted here")
    if config.dist.world_size > 1:
        lines.append("world_size: the gradients' buffers of data parallelism are not counted here")
    return lines
