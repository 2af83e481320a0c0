"""Sections that pre-training and fine-tuning share: frozen dataclasses whose fields are command-line flags.

Flags marked `new` are not in the original.
"""

from dataclasses import dataclass

from mimir_fast.config.choices import (
    ATTENTION,
    COMPAT,
    COMPILE_MODES,
    COMPILE_REGIONS,
    COSINE_FROM,
    EDM_AUGMENTATIONS,
    GRAD_COMPRESSION,
    PARALLEL,
    PRECISIONS,
    RESIDUAL_DTYPES,
    STEP_GRAPH,
)
from mimir_fast.config.fields import flag, require
from mimir_fast.data.datasets import DATASETS
from mimir_fast.kernels._shared.registration import IMPLS
from mimir_fast.tuning.records import check_tune


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    dataset: str = flag("imagenet", "name of the data set", choices=DATASETS)
    data_root: str = flag("../data", "folder that holds the data set, or a cache of it (mimir-fast cache)", path=True)
    use_edm: bool = flag(False, "mix generated images into every batch (cifar10, cifar100, svhn, tiny-imagenet)")
    unsup_fraction: float = flag(0.7, "generated images in a batch; negative merges both pools", "share, below 1")
    aux_data_filename: str = flag(
        "", "with --use_edm: npz file of generated images, image [N,H,W,3] uint8 and label [N]", path=True
    )
    edm_aug: str = flag("base", "augmentation of every image with --use_edm", choices=EDM_AUGMENTATIONS)
    use_normalize: bool = flag(False, "normalise images by the data set's mean and std")
    num_workers: int = flag(32, "data-loading processes per GPU; 0 loads in the main process", "processes")
    stage: str = flag(
        "",
        "folder on a local disk to copy caches of training and validation images to first, once per machine",
        new=True,
        path=True,
    )
    pin_mem: bool = flag(True, "page-locked host memory for faster copies to the GPU")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    batch_size: int = flag(64, "images per GPU and micro-batch", "images")
    accum_iter: int = flag(1, "micro-batches per optimizer update", "micro-batches")
    epochs: int = flag(100, "length of the run", "epochs")
    start_epoch: int = flag(0, "first epoch; a resumed checkpoint overrides it", "epochs")
    warmup_epochs: int = flag(40, "linear warm-up from --lr_at_start", "epochs")
    lr_at_start: float = flag(0.0, "learning rate at the start of the warm-up", new=True)
    lr: float | None = flag(None, "peak learning rate; default: blr * batch_size * accum_iter * GPUs / 256", type=float)
    blr: float = flag(1e-3, "peak learning rate per 256 images")
    min_lr: float = flag(0.0, "learning rate at the end of the cosine")
    cosine_from: str = flag(
        "warmup",
        "where the cosine begins; warmup: at its end; start: in epoch 0, so that the run goes on below the peak (timm, ARES)",
        choices=COSINE_FROM,
        new=True,
    )
    weight_decay: float = flag(0.05, "AdamW weight decay of matrices and tokens")
    max_bad_steps: int = flag(20, "end the run after this many skipped updates in a row", "updates", new=True)


@dataclass(frozen=True)
class ComputeConfig:
    """How the step is computed: precision, compilation, implementations, parallelism."""

    precision: str | None = flag(
        None,
        "compute precision; default: bf16 on CUDA, fp32 on the CPU",
        choices=PRECISIONS,
        new=True,
        type=str,
    )
    residual_dtype: str = flag(
        "fp32",
        "storage of the tokens between blocks; bf16 halves the traffic of LayerNorm and residual additions (--precision bf16)",
        choices=RESIDUAL_DTYPES,
        new=True,
    )
    compile: bool | None = flag(
        None, "torch.compile the model and the attack; default: on for CUDA only", new=True, type=bool
    )
    compile_mode: str = flag("default", "torch.compile's mode", choices=COMPILE_MODES, new=True)
    compile_region: str = flag(
        "model",
        "what is compiled as one: the whole model, or one block used for all (compiles in a fraction of the time)",
        choices=COMPILE_REGIONS,
        new=True,
    )
    step_graph: str = flag(
        "auto",
        "launch the whole step as one CUDA graph, captured after three updates; auto: on CUDA wherever it can be",
        choices=STEP_GRAPH,
        new=True,
    )
    kernels: str = flag(
        "auto",
        "implementation of the operations in mimir_fast.kernels; auto: triton on CUDA, reference on the CPU",
        choices=IMPLS,
        new=True,
    )
    activation_checkpointing: bool = flag(
        False, "compute each encoder block again in the backward pass: less memory, a third more encoder time", new=True
    )
    attention: str = flag(
        "auto",
        "attention backend; auto: what --tune finds, by default short on CUDA in 16 bits with --kernels triton, narrow on CPUs "
        "with --compile, else sdpa; sdpa_cudnn and the like: one of PyTorch's kernels; "
        "short: our kernel where it offers the size, else sdpa; narrow: compiled loops for heads of at most 8 numbers, else "
        "sdpa; flash_attn and xformers are optional packages",
        choices=ATTENTION,
        new=True,
    )
    mlp: str = flag(
        "auto",
        "the MLP: triton computes GELU inside of the matrix products (16 bits), reference leaves it to PyTorch; auto: what "
        "--tune finds, by default triton on CUDA in 16 bits with --kernels triton",
        choices=IMPLS,
        new=True,
    )
    tune: str = flag(
        "auto",
        "what auto means for attention and MLP on CUDA in 16 bits with --kernels triton, and for attention on CPUs with "
        "--compile; auto: the implementation that is fastest here, measured at the start of the first run and remembered, or "
        "that of the resumed run; again: measured anew; off: the default; or choices as config.yaml records them",
        new=True,
    )
    parallel: str = flag(
        "ddp",
        "several GPUs: ddp gives each the whole model; fsdp a share of parameters, gradients and moments, for models too large "
        "otherwise (bf16 or fp32; compiles block by block)",
        choices=PARALLEL,
        new=True,
    )
    grad_compression: str = flag(
        "none",
        "arithmetic in which gradients are averaged over processes; none: fp32",
        choices=GRAD_COMPRESSION,
        new=True,
    )


@dataclass(frozen=True)
class RunConfig:
    """Outputs, resuming, device, seed."""

    output_dir: str = flag("./experiment", "folder for checkpoints, log.txt and metrics; empty: write none", path=True)
    log_dir: str = flag("./experiment", "folder for TensorBoard events; empty: none", path=True)
    resume: str = flag(
        "", "checkpoint to continue from: a path, an https URL, or 'auto' for the newest one in output_dir", path=True
    )
    checkpoint_steps: int = flag(
        1000, "also save a resume point every N updates (the newest two are kept); 0: never", "updates", new=True
    )
    log_every: int = flag(20, "read metrics back and print a line every N updates", "updates", new=True)
    max_steps: int = flag(0, "stop after N updates in all, saving; 0: run all epochs", "updates", new=True)
    wandb: bool = flag(False, "also log to Weights & Biases (pip install 'mimir-fast[wandb]')", new=True)
    compat: str = flag(
        "none",
        "who decides what words mean and what models compute; original: its scripts, where some flags take any word, and its "
        "code, where it differs from the corrected form (see docs/pretrain.md)",
        choices=COMPAT,
        new=True,
    )
    device: str = flag("cuda", "cuda or cpu; without a CUDA device the default falls back to cpu and says so")
    seed: int = flag(0, "seed of every random draw; each rank adds its own number")


@dataclass(frozen=True)
class DistConfig:
    """Several processes: set by torchrun, torch.distributed.launch or SLURM, rarely by hand."""

    world_size: int = flag(1, "number of processes; overwritten from the environment", "processes")
    local_rank: int = flag(-1, "process number on this machine, as torch.distributed.launch passes it")
    dist_on_itp: bool = flag(False, "read rank and size from OMPI_COMM_WORLD_*")
    dist_url: str = flag("env://", "where the processes meet")
    dist_timeout: float = flag(
        30.0, "a process that waits so long for the others ends with an error", "minutes", new=True
    )


def check_shared(flat: dict) -> None:
    """Check the flags {name: value} that every kind of training has; raises ValueError."""
    for name in ("batch_size", "accum_iter", "epochs", "input_size", "patch_size", "log_every", "max_bad_steps"):
        require(flat[name] >= 1, name, flat[name], "1 or more")
    for name in ("steps", "eps", "alpha", "warmup_epochs", "lr_at_start", "start_epoch", "num_workers", "weight_decay"):
        require(flat[name] >= 0, name, flat[name], "0 or more")
    for name in ("checkpoint_steps", "max_steps", "seed"):
        require(flat[name] >= 0, name, flat[name], "0 or more")
    require(flat["input_size"] % flat["patch_size"] == 0, "patch_size", flat["patch_size"], "a divisor of input_size")
    check_tune(flat["tune"])
    require(flat["dist_timeout"] > 0, "dist_timeout", flat["dist_timeout"], "more than 0 minutes")
    # Smaller values are fractions of 1 where 1/255 is meant.
    require(flat["eps"] == 0 or flat["eps"] >= 0.25, "eps", flat["eps"], "a number in 1/255: 8, not 8/255 = 0.031")
    require(flat["device"].split(":")[0] in ("cuda", "cpu"), "device", flat["device"], "cuda or cpu")
