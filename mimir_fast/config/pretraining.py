"""Configuration of a pre-training run: one frozen dataclass per stage, each field one command-line flag.

This file is the only place where a flag's name, type, default, unit and meaning stand; arguments.py turns it into the
command line and recipes.py fills it in.  Flags marked `new` are not in the original.  finetune/config.py is its
counterpart for fine-tuning and shares what is the same there.
"""

from dataclasses import dataclass

from mimir_fast.config.fields import Configuration, flag, require
from mimir_fast.models.attention import BACKENDS
from mimir_fast.objectives.information import PENALTIES
from mimir_fast.training.compilation import MODES as COMPILE_MODES
from mimir_fast.training.compilation import REGIONS as COMPILE_REGIONS


@dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    model: str = flag(
        "mae_vit_ti_patch16", "model name: mae_vit_{nano,ti,small,small_ds,base,large}; the default is mae_vit_ti"
    )
    input_size: int = flag(224, "side of the square input", "pixels")
    patch_size: int = flag(16, "side of a patch; must divide input_size", "pixels")
    mask_ratio: float = flag(0.75, "removed patches in the training pass", "share, 0 to 1")
    norm_pix_loss: bool = flag(False, "normalise every target patch by its own mean and standard deviation")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from."""

    dataset: str = flag(
        "imagenet", "imagenet, imagenette, imagefolder, cifar10, cifar100, svhn, tiny-imagenet or digits"
    )
    data_root: str = flag("../data", "folder that holds the data set")
    use_edm: bool = flag(False, "mix generated images into every batch (cifar10, cifar100, svhn, tiny-imagenet)")
    unsup_fraction: float = flag(0.7, "generated images in a batch; negative merges both pools", "share, below 1")
    aux_data_filename: str = flag(
        "/data/xuxx/edm_data/1m.npz", "npz file of generated images: image [N,H,W,3] uint8, label [N]"
    )
    edm_aug: str = flag(
        "base", "accepted for compatibility; generated images always get crop and flip, as in the original"
    )
    use_normalize: bool = flag(
        False, "feed mean/std-normalised images; eps and alpha are divided by each channel's std"
    )
    num_workers: int = flag(32, "data-loading processes per GPU; 0 loads in the main process", "processes")
    pin_mem: bool = flag(True, "page-locked host memory for faster copies to the GPU")


@dataclass(frozen=True)
class AttackConfig:
    """The PGD-MAE attack."""

    attack: str = flag(
        "plain", "'plain' trains a clean masked autoencoder; any other word switches the PGD-MAE attack on"
    )
    steps: int = flag(1, "attack steps", "steps")
    eps: float = flag(8.0, "radius of the L-infinity ball", "1/255")
    alpha: float = flag(10.0, "attack step size", "1/255")
    attack_mask_ratio: float = flag(0.75, "removed patches in the attack's passes", "share, 0 to 1", new=True)


@dataclass(frozen=True)
class PenaltyConfig:
    """The mutual-information penalty (only with an attack)."""

    mi_train: str = flag(
        "plain", "hsic, dib_mi (Rényi order 1.01) or renyi2 (order 2, no eigenvalues); any other word: none"
    )
    mi_xpl: float = flag(1e-5, "weight of the penalty", "loss per unit of the penalty")
    mi_xl: float = flag(0.0, "accepted for compatibility; the original never reads it")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    batch_size: int = flag(64, "images per GPU and micro-batch", "images")
    accum_iter: int = flag(1, "micro-batches per optimizer update", "micro-batches")
    epochs: int = flag(100, "length of the run", "epochs")
    start_epoch: int = flag(0, "first epoch; a resumed checkpoint overrides it", "epochs")
    warmup_epochs: int = flag(40, "linear warm-up from 0", "epochs")
    lr: float | None = flag(None, "peak learning rate; default: blr * batch_size * accum_iter * GPUs / 256", type=float)
    blr: float = flag(1e-3, "peak learning rate per 256 images")
    min_lr: float = flag(0.0, "learning rate at the end of the cosine")
    weight_decay: float = flag(0.05, "AdamW weight decay of matrices and tokens")
    max_bad_steps: int = flag(20, "end the run after this many skipped updates in a row", "updates", new=True)


@dataclass(frozen=True)
class ComputeConfig:
    """How the step is computed: precision, compilation, implementations, parallelism."""

    precision: str | None = flag(
        None,
        "compute precision; default: bf16 on CUDA, fp32 on the CPU",
        choices=("bf16", "fp16", "fp32"),
        new=True,
        type=str,
    )
    residual_dtype: str = flag(
        "fp32",
        "storage of the tokens between blocks; bf16 halves the traffic of LayerNorm and residual additions (--precision bf16)",
        choices=("fp32", "bf16"),
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
    kernels: str = flag(
        "auto",
        "implementation of the operations in mimir_fast.kernels; auto: triton on CUDA, reference on the CPU",
        choices=("auto", "triton", "reference"),
        new=True,
    )
    activation_checkpointing: bool = flag(
        False, "compute each encoder block again in the backward pass: less memory, a third more encoder time", new=True
    )
    attention: str = flag(
        "auto",
        "attention backend; auto: short on CUDA in 16 bits with --kernels triton, narrow on CPUs with --compile, else sdpa; "
        "short: our kernel where it offers the size, else sdpa; narrow: compiled loops for heads of at most 8 numbers, else "
        "sdpa; flash_attn and xformers are optional packages",
        choices=BACKENDS,
        new=True,
    )
    mlp: str = flag(
        "auto",
        "the MLP: triton computes GELU inside of the matrix products (16 bits), reference leaves it to PyTorch; auto: triton "
        "on CUDA in 16 bits with --kernels triton",
        choices=("auto", "triton", "reference"),
        new=True,
    )
    parallel: str = flag(
        "ddp",
        "several GPUs: ddp gives each the whole model; fsdp a share of parameters, gradients and moments, for models too large "
        "otherwise (bf16 or fp32; compiles block by block)",
        choices=("ddp", "fsdp"),
        new=True,
    )
    grad_compression: str = flag(
        "none",
        "arithmetic in which gradients are averaged over processes; none: fp32",
        choices=("none", "bf16"),
        new=True,
    )


@dataclass(frozen=True)
class RunConfig:
    """Outputs, resuming, device, seed."""

    output_dir: str = flag("./experiment", "folder for checkpoints, log.txt and metrics; empty: write none")
    log_dir: str = flag("./experiment", "folder for TensorBoard events; empty: none")
    resume: str = flag(
        "", "checkpoint to continue from: a path, an https URL, or 'auto' for the newest one in output_dir"
    )
    checkpoint_steps: int = flag(
        1000, "also save a resume point every N updates (the newest two are kept); 0: never", "updates", new=True
    )
    log_every: int = flag(20, "read metrics back and print a line every N updates", "updates", new=True)
    max_steps: int = flag(0, "stop after N updates in all, saving; 0: run all epochs", "updates", new=True)
    wandb: bool = flag(False, "also log to Weights & Biases (pip install 'mimir-fast[wandb]')", new=True)
    device: str = flag("cuda", "cuda or cpu; without a CUDA device the default falls back to cpu and says so")
    seed: int = flag(0, "seed of every random draw; each rank adds its own number")


@dataclass(frozen=True)
class DistConfig:
    """Several processes: set by torchrun, torch.distributed.launch or SLURM, rarely by hand."""

    world_size: int = flag(1, "number of processes; overwritten from the environment", "processes")
    local_rank: int = flag(-1, "process number on this machine, as torch.distributed.launch passes it")
    dist_on_itp: bool = flag(False, "read rank and size from OMPI_COMM_WORLD_*")
    dist_url: str = flag("env://", "where the processes meet")


@dataclass(frozen=True)
class PretrainConfig(Configuration):
    """Everything a pre-training run depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    attack: AttackConfig = AttackConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    optim: OptimConfig = OptimConfig()
    compute: ComputeConfig = ComputeConfig()
    run: RunConfig = RunConfig()
    dist: DistConfig = DistConfig()

    def check(self) -> "PretrainConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        flat = self.flat()
        check_shared(flat)
        for name in ("mask_ratio", "attack_mask_ratio"):
            require(0 < flat[name] < 1, name, flat[name], "a share between 0 and 1 (exclusive)")
        patches = (flat["input_size"] // flat["patch_size"]) ** 2
        for name in ("mask_ratio", "attack_mask_ratio"):
            require(
                int(patches * (1 - flat[name])) >= 1, name, flat[name], f"low enough to keep one of {patches} patches"
            )
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        notes, wanted = [], self.penalty.mi_train
        if wanted not in (*PENALTIES, "plain"):
            notes.append(f"mi_train: {wanted!r} is none of {', '.join(PENALTIES)}: NO penalty, as in the original")
        if self.attack.attack == "plain" and wanted in PENALTIES:
            notes.append(
                "attack: plain switches the penalty off too, as in the original; --attack pgd_mae switches both on"
            )
        return notes


def check_shared(flat: dict) -> None:
    """What every kind of run asks of its flags {name: value}; raises ValueError."""
    for name in ("batch_size", "accum_iter", "epochs", "input_size", "patch_size", "log_every", "max_bad_steps"):
        require(flat[name] >= 1, name, flat[name], "1 or more")
    for name in ("steps", "eps", "alpha", "warmup_epochs", "start_epoch", "num_workers", "weight_decay"):
        require(flat[name] >= 0, name, flat[name], "0 or more")
    for name in ("checkpoint_steps", "max_steps", "seed"):
        require(flat[name] >= 0, name, flat[name], "0 or more")
    require(flat["input_size"] % flat["patch_size"] == 0, "patch_size", flat["patch_size"], "a divisor of input_size")
    require(flat["eps"] == 0 or flat["eps"] >= 0.25, "eps", flat["eps"], "a number in 1/255: 8, not 8/255 = 0.031")
    require(flat["device"].split(":")[0] in ("cuda", "cpu"), "device", flat["device"], "cuda or cpu")
