"""One step, written down: the price of every operation that reaches a device and of every Inductor kernel."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.step.prices import Price, price, price_inductor, price_ours
from mimir_fast.kernels._shared.cost import cost

# results that are new memory without a value, or the argument's own memory: no kernel
NO_KERNEL = re.compile(
    r"(new_)?empty(_like|_strided|_permuted)?$|_unsafe_view$|_reshape_alias$|lift_fresh|resize_$|set_$"
)
OVERWRITTEN = re.compile(r"(_foreach_)?(copy|fill|zero|uniform|normal|random|exponential|bernoulli)_$")


class Recorder(TorchDispatchMode):
    """Appends the prices of every operation on `device_type` that runs inside to `calls`; compiled code stays compiled.

    mark is called with the call's number before it and with -1 after it, so that another log can be lined up.
    """

    def __init__(self, device_type: str, mark: Callable[[int], None] = lambda number: None):
        super().__init__()
        self.calls: list[list[Price]] = []
        self.device_type, self.mark = device_type, mark
        self.tf32 = torch.get_float32_matmul_precision() != "highest"

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
        if prices := self.priced(func, args, kwargs, result):
            self.calls.append(prices)
        return result

    def priced(self, func, args: tuple, kwargs: dict, result) -> list[Price]:
        """The prices of a call by what it read and wrote on the device; none if it touched nothing there."""
        name, reads, changed, values = str(func), {}, [], []
        for argument, value in zip(func._schema.arguments, itertools.chain(args, itertools.repeat(None))):
            values.append(kwargs.get(argument.name, value))
            found = list(self.tensors(values[-1]))
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written:
                changed += found
            overwritten = argument.is_out or OVERWRITTEN.match(name.split(".")[1])
            if found and not (written and overwritten):
                reads[argument.name] = found
        new = [t for t in self.tensors(result) if not any(t is other for other in changed)]
        writes = [*changed, *new]
        if not (reads or writes):
            return []
        if func.namespace == "mimir_fast":
            return price_ours(name, cost(name.split(".")[1], values, writes))
        formula = flop_registry.get(func._overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0.0
        return [price(name, reads, writes, flops, self.tf32)]

    def tensors(self, value) -> Iterator[Tensor]:
        """The tensors on the device in an argument or result, lists and tuples included."""
        if isinstance(value, Tensor):
            if value.device.type == self.device_type:
                yield value
        elif isinstance(value, (list, tuple)):
            for part in value:
                yield from self.tensors(part)


@contextmanager
def inductor_kernels(recorder: Recorder) -> Iterator[None]:
    """While inside, every launch of a kernel that Inductor generated is appended to the recorder's calls.

    The byte counts are there if torch._inductor.config.benchmark_kernel was on when the code was compiled.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    launch = CachingAutotuner.run

    def run(self, *args, **kwargs):
        meta, touched = self.inductor_meta, list(recorder.tensors(args))
        recorder.mark(len(recorder.calls))
        counts = (meta.get("kernel_num_gb"), meta.get("kernel_flop") or 0.0)
        recorder.calls.append([price_inductor(self.fn.__name__, touched, *counts)])
        result = launch(self, *args, **kwargs)
        recorder.mark(-1)
        return result

    with patch.object(CachingAutotuner, "run", run):
        yield


def record(
    step: Callable[[], object], device_type: str, mark: Callable[[int], None] = lambda number: None
) -> list[list[Price]]:
    """Run the step once and return the prices of its calls in order."""
    recorder = Recorder(device_type, mark)
    with inductor_kernels(recorder), recorder:
        step()
    return recorder.calls
