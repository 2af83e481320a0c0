"""One step, written down: every operation that reaches a device, every Inductor kernel, with the tensors they touch."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Spec:
    """A tensor as a call sees it: shape, dtype ("float32", ...), bytes of the distinct elements (expanded ones count once)."""

    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass
class Call:
    """One operation (kind "op", name like "aten.mm.out") or one Inductor kernel (kind "inductor").

    reads     argument name -> its tensors; arguments that are only overwritten are not here
    writes    the tensors written: results, and arguments changed in place
    flops     of matrix products and attention (torch.utils.flop_counter; of an Inductor kernel its own count)
    gb        Inductor's own byte count in GB, file the name of the kernel's file
    """

    kind: str
    name: str
    reads: dict[str, list[Spec]] = field(default_factory=dict)
    writes: list[Spec] = field(default_factory=list)
    flops: float = 0.0
    gb: float | None = None
    file: str = ""

    @property
    def op(self) -> str:
        """ "aten.mm.out" -> "mm", "mimir_fast.nhsic.default" -> "nhsic"."""
        return self.name.split(".")[1] if self.kind == "op" else self.name

    def read(self, name: str) -> Spec:
        """The one tensor of an argument."""
        return self.reads[name][0]


# results that are new memory without a value, or the argument's own memory: no kernel
NO_KERNEL = re.compile(
    r"(new_)?empty(_like|_strided|_permuted)?$|_unsafe_view$|_reshape_alias$|lift_fresh|resize_$|set_$"
)
OVERWRITTEN = re.compile(r"(copy|fill|zero|uniform|normal|random|exponential|bernoulli)_$")


class Recorder(TorchDispatchMode):
    """Appends a `Call` to `calls` for every operation on `device_type` that runs inside; compiled code stays compiled.

    mark is called with the call's number before it and with -1 after it, so that another log can be lined up.
    """

    def __init__(self, device_type: str, mark: Callable[[int], None] = lambda number: None):
        super().__init__()
        self.calls: list[Call] = []
        self.device_type, self.mark = device_type, mark

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # without this, torch.compile hands its functions over to eager while the mode is on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "profiler" or func.is_view or NO_KERNEL.match(func._schema.name.split("::")[1]):
            return func(*args, **kwargs)
        self.mark(len(self.calls))
        result = func(*args, **kwargs)
        self.mark(-1)
        call = describe(func, args, kwargs, result, self.device_type)
        if call.reads or call.writes:
            self.calls.append(call)
        return result


def describe(func, args: tuple, kwargs: dict, result, device_type: str) -> Call:
    """What `func` read and wrote on the device; tensors elsewhere are left out."""
    name = str(func)
    call = Call("op", name)
    changed: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, itertools.chain(args, itertools.repeat(None))):
        value = kwargs.get(argument.name, value)
        found = list(tensors(value, device_type))
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written:
            changed += found
        overwritten = argument.is_out or OVERWRITTEN.match(name.split(".")[1])
        if found and not (written and overwritten):
            call.reads[argument.name] = [spec(t) for t in found]
    new = [t for t in tensors(result, device_type) if not any(t is other for other in changed)]
    call.writes = [spec(t) for t in (*changed, *new)]
    if func._overloadpacket in flop_registry:
        call.flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
    return call


def tensors(value, device_type: str) -> Iterator[Tensor]:
    """The tensors on the device in an argument or result, lists and tuples included."""
    if isinstance(value, Tensor):
        if value.device.type == device_type:
            yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part, device_type)


def spec(tensor: Tensor) -> Spec:
    distinct = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        distinct *= size if stride else min(size, 1)
    return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), distinct * tensor.element_size())


@contextmanager
def inductor_kernels(recorder: Recorder) -> Iterator[None]:
    """While inside, every launch of a kernel that Inductor generated is appended to the recorder's calls.

    The byte counts are there if torch._inductor.config.benchmark_kernel was on when the code was compiled.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    launch = CachingAutotuner.run

    def run(self, *args, **kwargs):
        meta = self.inductor_meta
        touched = {"arguments": [spec(t) for t in tensors(args, recorder.device_type)]}
        file = Path(self.filename or "").stem
        recorder.mark(len(recorder.calls))
        call = Call("inductor", self.fn.__name__, touched, gb=meta.get("kernel_num_gb"), file=file)
        call.flops = meta.get("kernel_flop") or 0.0
        recorder.calls.append(call)
        result = launch(self, *args, **kwargs)
        recorder.mark(-1)
        return result

    with patch.object(CachingAutotuner, "run", run):
        yield


def record(
    step: Callable[[], object], device_type: str, mark: Callable[[int], None] = lambda number: None
) -> list[Call]:
    """Run the step once and return its calls in order."""
    recorder = Recorder(device_type, mark)
    with inductor_kernels(recorder), recorder:
        step()
    return recorder.calls


def source_nodes() -> dict[str, str]:
    """File of an Inductor kernel -> the names and ATen operations it was made from, read from the generated code."""
    from torch._inductor.codecache import PyCodeCache

    nodes: dict[str, str] = {}
    pattern = re.compile(
        r"# kernel path: (\S+)\n# \w+(?: Sorted)? Source Nodes: \[([^\]]*)\], Original ATen: \[([^\]]*)\]"
    )
    files = (module.__file__ for module in PyCodeCache.modules)
    for file in filter(None, files):
        for path, names, operations in pattern.findall(Path(file).read_text()):
            nodes.setdefault(Path(path).stem, f"[{names}] {operations.replace('aten.', '')}")
    return nodes
