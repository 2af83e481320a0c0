"""Resolving a configuration: `resolve` fills in what depends on the machine and returns a `Run`, which all later code takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from mimir_fast.config.choices import SDPA_BACKENDS
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.machine import kept_elsewhere
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.sections import ComputeConfig

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def missing_compiler() -> str | None:
    """Why nothing can be compiled here, or None: torch.compile needs a C++ compiler, on GPUs too."""
    # Importing Inductor takes a second.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler found (install g++, or set CXX)"
    return None


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that a run depends on; make one by hand to resolve for another machine.

    cuda_devices      how many there are
    missing_compiler  returns why nothing can be compiled, or None; called only where something is to be compiled
    """

    cuda_devices: int
    missing_compiler: Callable[[], str | None] = missing_compiler

    @classmethod
    def here(cls) -> "Machine":
        """This machine."""
        return cls(torch.cuda.device_count() if torch.cuda.is_available() else 0)


@dataclass(frozen=True)
class Compute:
    """The resolved section `compute`, in dtypes and booleans.

    dtype               of autocast; torch.float32: no autocast
    residual_dtype      storage of the tokens between blocks; None: fp32
    scaled              whether the loss is scaled (fp16)
    step_graph          whether steps are captured as CUDA graphs, where they can be
    kernels, mlp        triton or reference
    attention           a backend other than auto
    measured            of attention and mlp those whose implementation is measured: the two words above are then defaults
    tune                auto, again, off, or choices (mimir_fast/tuning/records.py); off where nothing is measured
    fsdp                whether processes share the parameters; with one process it changes compile_region only
    compress_gradients  whether gradients are averaged in bf16
    """

    dtype: torch.dtype
    residual_dtype: torch.dtype | None
    scaled: bool
    compile: bool
    compile_mode: str
    compile_region: str
    step_graph: bool
    kernels: str
    attention: str
    mlp: str
    measured: tuple[str, ...]
    tune: str
    activation_checkpointing: bool
    fsdp: bool
    compress_gradients: bool

    def words(self) -> dict:
        """{flag: value} of the section `compute`, as logs, config.yaml and checkpoints hold it."""
        words = {name: getattr(self, name) for name in ComputeConfig.__dataclass_fields__ if hasattr(self, name)}
        words["precision"] = WORDS[self.dtype]
        words["residual_dtype"] = WORDS[self.residual_dtype or torch.float32]
        words["parallel"] = "fsdp" if self.fsdp else "ddp"
        words["step_graph"] = "auto" if self.step_graph else "off"
        # With it the choices: read back, these two words would decide by name.
        words |= dict.fromkeys(self.measured, "auto")
        words["grad_compression"] = "bf16" if self.compress_gradients else "none"
        return words


@dataclass(frozen=True)
class Run(Generic[Config]):
    """A resolved configuration.

    config    as asked for
    compute   the section `compute`, resolved
    device    resolved
    notes     lines to print about what was resolved otherwise than one might expect
    explicit  names of the flags that were set, by whoever set them
    """

    config: Config
    compute: Compute
    device: str
    notes: tuple[str, ...] = ()
    explicit: frozenset[str] = frozenset()

    def flat(self) -> dict:
        """{flag name: value} as it is recorded: what was asked for, with what resolve filled in."""
        return self.config.flat() | {"device": self.device} | self.compute.words()

    def tuned(self, tune: str) -> "Run[Config]":
        """A copy with the choices that were made, as a value of --tune."""
        # Without choices the two words are what is computed with.
        measured = () if tune == "off" else self.compute.measured
        return replace(self, compute=replace(self.compute, tune=tune, measured=measured))

    def updated(self, values: dict) -> "Run[Config]":
        """A copy with flags replaced; only for flags that resolve does not read, such as nb_classes, which the data decides."""
        return replace(self, config=self.config.updated(values))


def resolve(config: Config, explicit: set[str], machine: Machine | None = None) -> Run[Config]:
    """Resolve a configuration for a machine (None: this one); explicit: the names of the flags that were set.

    Raises ValueError if a flag that was set is not possible on the machine or together with another flag.
    """
    machine = machine or Machine.here()
    notes: list[str] = []
    device = resolve_device(config.run.device, explicit, notes.append, machine)
    asked, on_cuda = config.compute, device.startswith("cuda")
    # Many CPUs have no arithmetic in 16 bits and emulate it, slower than fp32.
    precision = asked.precision or ("bf16" if on_cuda else "fp32")
    if asked.residual_dtype == "bf16" and precision != "bf16":
        raise ValueError(f"residual_dtype: bf16 goes with --precision bf16, not with {precision}")
    compiled = on_cuda if asked.compile is None else asked.compile
    if compiled and (reason := machine.missing_compiler()):
        notes.append(f"compile: {reason}; running eager")
        compiled = False
    if compiled and (note := kept_elsewhere()):
        notes.append(note)
    compute = Compute(
        dtype=DTYPES[precision],
        residual_dtype=None if asked.residual_dtype == "fp32" else DTYPES[asked.residual_dtype],
        # bf16 has the exponents of fp32, so that small gradients do not become zero.
        scaled=precision == "fp16",
        compile=compiled,
        compile_mode=asked.compile_mode,
        compile_region=_region(asked, precision, explicit),
        step_graph=on_cuda and asked.step_graph == "auto",
        **_implementations(asked, on_cuda, precision, compiled, machine),
        activation_checkpointing=asked.activation_checkpointing,
        fsdp=asked.parallel == "fsdp",
        compress_gradients=asked.grad_compression == "bf16",
    )
    return Run(config, compute, device, (*notes, *config.notes(explicit)), frozenset(explicit))


def resolve_device(
    device: str, explicit: set[str], say: Callable[[str], None] = print, machine: Machine | None = None
) -> str:
    """The device to run on: without CUDA devices the default becomes the CPU.

    Raises ValueError if a device was asked for that the machine does not have.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    count = (machine or Machine.here()).cuda_devices
    if not count:
        if "device" in explicit:
            raise ValueError(f"device: got {device}, no CUDA device is available here; pass --device cpu")
        say("device: no CUDA device is available here, running on the CPU (--device cpu)")
        return "cpu"
    if index and not (index.isdigit() and int(index) < count):
        raise ValueError(f"device: got {device}, this machine has {count} CUDA devices, counted from cuda:0")
    return device


def _region(asked: ComputeConfig, precision: str, explicit: set[str]) -> str:
    """compile_region, resolved.  Raises ValueError for flags that do not go with fsdp."""
    # Shards are gathered block by block, so that a graph over several blocks would hold all their parameters at once.
    if asked.parallel != "fsdp":
        return asked.compile_region
    if precision == "fp16":
        raise ValueError("parallel: fsdp goes with --precision bf16 or fp32, not with fp16")
    if asked.compile_region == "model" and "compile_region" in explicit:
        raise ValueError(
            "compile_region: fsdp gathers parameters block by block and compiles so too; leave the flag out"
        )
    return "block"


def _implementations(asked: ComputeConfig, on_cuda: bool, precision: str, compiled: bool, machine: Machine) -> dict:
    """kernels, attention and mlp, resolved.  Raises ValueError for one that the machine or the precision does not allow."""
    kernels, attention, mlp = asked.kernels, asked.attention, asked.mlp
    if kernels == "auto":
        kernels = "triton" if on_cuda else "reference"
    elif kernels == "triton" and not on_cuda:
        raise ValueError("kernels: triton needs a CUDA device; pass --kernels reference or leave the default")
    # Our attention and MLP are for 16 bits on CUDA; narrow attention is for compiled fp32 on CPUs.
    half = kernels == "triton" and precision != "fp32"
    narrow = not on_cuda and precision == "fp32"
    if attention == "auto":
        attention = "short" if half else "narrow" if narrow and compiled else "sdpa"
    elif attention == "short" and not on_cuda:
        raise ValueError("attention: short needs a CUDA device; pass --attention sdpa or leave the default")
    elif attention in SDPA_BACKENDS and not on_cuda:
        raise ValueError(f"attention: {attention} needs a CUDA device; pass --attention sdpa or leave the default")
    elif attention == "narrow" and (reason := machine.missing_compiler() if narrow else "it is for CPUs in fp32"):
        raise ValueError(f"attention: narrow: {reason}; pass --attention sdpa or leave the default")
    if mlp == "auto":
        mlp = "triton" if half else "reference"
    elif mlp == "triton" and not (on_cuda and precision != "fp32"):
        raise ValueError("mlp: triton needs a CUDA device and 16 bits; pass --mlp reference or leave the default")
    open_to = {"attention": half or (narrow and compiled), "mlp": half}
    measured = tuple(op for op, possible in open_to.items() if possible and getattr(asked, op) == "auto")
    measured = () if asked.tune == "off" else measured
    tune = asked.tune if measured else "off"
    return {"kernels": kernels, "attention": attention, "mlp": mlp, "measured": measured, "tune": tune}
