"""How operations reach their kernels: what a launch computes anew, which compiled kernel it takes, what compiled code calls."""

import importlib
import re
from functools import _lru_cache_wrapper
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from bench.kernels.cases import OPS
from mimir_fast import kernels
from mimir_fast.kernels._shared import bicubic, column_sums, direct
from tests.kernels.test_devices import SMALL, cases
from tests.support.cases import DTYPES, Drawn
from tests.support.interpreter import interpret

FOLDER = Path(kernels.__file__).parent


def modules(op: str) -> list:
    return [importlib.import_module(f"mimir_fast.kernels.{op}.{path.stem}") for path in (FOLDER / op).glob("[!_]*.py")]


@pytest.mark.parametrize("op", OPS)
def test_a_second_call_of_the_same_shapes_computes_nothing_anew(op):
    """Grids, tiles and warps are computed once: every kernel is launched through functions that remember them."""
    shared = (bicubic, column_sums)
    remembered = [f for m in (*modules(op), *shared) for f in vars(m).values() if isinstance(f, _lru_cache_wrapper)]
    launched = []
    with patch.object(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__)):
        for launch in importlib.import_module(f"mimir_fast.kernels.{op}.kernel").launches():
            launch.call()
            before, first = [f.cache_info() for f in remembered], len(launched)
            launch.call()
            after = [f.cache_info() for f in remembered]
            assert [info.misses for info in after] == [info.misses for info in before], launch
            assert sum(info.hits for info in after) > sum(info.hits for info in before)
            assert launched[:first] == launched[first:]
            launched.clear()


def test_every_kernel_is_launched_by_prepared():
    for path in FOLDER.glob("*/*.py"):
        assert path.name == "launch.py" or not re.search(r"kernel\[", path.read_text()), path


@pytest.mark.parametrize("op", OPS)
def test_compiled_code_calls_kernels_alone(op):
    """The graphs of forward and backward pass hold operators that have no layer of autograd, and compute the same bits."""
    called = []

    def record(graph, _):
        calls = [node for node in graph.graph.nodes if node.op == "call_function"]
        # An operator that writes into an argument is the first argument of one that does not.
        called.extend(part for node in calls for part in (node.target, *node.args[:1]))
        return make_boxed_func(graph)

    # All cases share the code that is compiled.
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    case = next(case for dtype in DTYPES for case in cases(op, SMALL, dtype))
    with interpret():
        drawn = Drawn(case, torch.device("cpu"))
        eager, compiled = (
            drawn.values(f) for f in (case.ours, torch.compile(case.ours, fullgraph=True, backend=backend))
        )
    assert all(torch.equal(value, compiled[name]) for name, value in eager.items())
    ours = [target for target in called if getattr(target, "namespace", "") == "mimir_fast"]
    assert len(ours) > any("gradient" in name for name in eager)
    for target in ours:
        for key in ("CompositeImplicitAutograd", "Autograd"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), key), target
    assert not [target for target in called if "autograd" in str(target)]


def test_generated_code_calls_launchers_and_no_dispatcher():
    """The same bits; whoever looks at operators still sees them."""
    direct.write_direct_calls()
    torch._dynamo.reset()
    torch.manual_seed(0)
    tensors = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 16), (2, 5, 16), 16, 16, 16)]

    class Seen(TorchDispatchMode):
        ignore_compile_internals = classmethod(lambda cls: True)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    def gradients(function) -> list[torch.Tensor]:
        s, n = function(*tensors, impl="triton")
        return [s, n, *torch.autograd.grad((s * n).sum(), tensors)]

    seen: list = []
    with interpret(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(kernels.add_layer_norm, fullgraph=True)
        ours, code = run_and_get_code(gradients, compiled)
        assert all(map(torch.equal, ours, gradients(kernels.add_layer_norm)))
        with Seen():
            compiled(*tensors, impl="triton")
    assert torch.ops.mimir_fast.add_layer_norm.kernel in seen
    for text in code:
        # Defined beside the imports, called once.
        (site,) = re.findall(r'^(add_layer_norm\w*) = call_site\("torch.ops.mimir_fast.add_layer_norm', text, re.M)
        assert text.count(f"= {site}(") == 1
        assert "= torch.ops.mimir_fast" not in text


def test_second_derivatives_are_refused():
    qkv = torch.randn(1, 3, 3 * 16, requires_grad=True)
    with interpret():
        out = kernels.short_attention(qkv, 1, impl="triton")
        (grad,) = torch.autograd.grad(out.sum(), qkv, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


# A program for a simulated GPU, which test_call_sites.py runs: a kept kernel is the one that Triton would take.
SPECIALISED = """
import sys, torch, triton, triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction
from mimir_fast.kernels._shared.launch import FUSED, Prepared
from mimir_fast.kernels.add_layer_norm import kernel

@triton.jit
def _add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(x + i, mask=i < n, other=0).to(tl.float32)
    if y is not None:
        number += tl.load(y + i, mask=i < n, other=0).to(tl.float32)
    tl.store(out + i, number.to(out.dtype.element_ty), mask=i < n)

n, by_triton = 4096, []
triton_run = JITFunction.run
JITFunction.run = lambda kernel, *args, **kwargs: by_triton.append(kernel) or triton_run(kernel, *args, **kwargs)
launch = Prepared(_add_kernel, (n // 1024,), n, results=[((n,), torch.float32)], BLOCK=1024, num_warps=4, **FUSED)

def launched(*tensors):
    "How often Triton looked for the kernel itself, and how many kernels it has compiled by then."
    before = len(by_triton)
    (out,) = launch(*tensors)
    assert out.shape == (n,) and out.dtype == torch.float32 and out.is_cuda
    return len(by_triton) - before, len(_add_kernel.device_caches[0][0])

x = torch.zeros(n + 1, device="cuda")
assert launched(x[:n], x[:n]) == (1, 1)
kept = dict(launch._compiled)
assert launched(x[:n], x[:n]) == (0, 1)
# A misaligned view has a kernel of its own, every time, on either side.
assert launched(x[1:], x[:n]) == (1, 2)
assert launched(x[1:], x[:n]) == (1, 2)
assert launched(x[:n], x[1:]) == (1, 3)
assert launch._compiled == kept
assert launched(x[:n], x[:n]) == (0, 3)
half = x.bfloat16()
assert launched(half[:n], x[:n]) == (1, 4)
assert launched(half[:n], x[:n]) == (0, 4)
assert launched(x[:n], half[:n]) == (1, 5)
assert launched(x[:n], None) == (1, 6)
assert launched(x[:n], None) == (0, 6)
assert launched(x[:n], x[:n]) == (0, 6)
functions = {arguments[0] for _, arguments, _ in launch._compiled.values()}
assert len(functions) == len(launch._compiled) == 4
# What a launch costs the host, in calls of Python functions: one of its own and its two helpers; of a whole operator, eight.
def calls_of(function, *arguments):
    names = []
    function(*arguments)
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    function(*arguments)
    sys.setprofile(None)
    return names

assert len(calls_of(launch, x[:n], x[:n])) <= 3
rows = torch.zeros(4, 50, 384, device="cuda")
row, operator = rows[0, 0], torch.ops.mimir_fast.add_layer_norm.kernel
names = calls_of(operator, rows, rows, row, row, row, 1e-6, torch.bfloat16, None)
assert len(names) <= 10, names
# A profiler hears of every launch.
told = []
knobs.runtime.launch_enter_hook.add(lambda metadata: told.append(metadata.get()["name"]))
assert launched(x[:n], x[:n]) == (1, 6)
assert told == ["_add_kernel"]
knobs.runtime.launch_enter_hook.calls.clear()
assert launched(x[:n], x[:n]) == (0, 6)
# Memory filled with NaN is torch's work.
torch.use_deterministic_algorithms(True)
assert launched(x[:n], x[:n]) == (1, 6)
torch.use_deterministic_algorithms(False)
# Of other numbers or options, another kernel; the same numbers again, the same one.
for options in ({"num_warps": 8}, {"num_warps": 4, "maxnreg": 64}):
    launch = Prepared(_add_kernel, (4,), n, results=[((n,), torch.float32)], BLOCK=1024, **options, **FUSED)
    compiled = len(_add_kernel.device_caches[0][0])
    assert launched(x[:n], x[:n]) == (1, compiled + 1)
    assert launched(x[:n], x[:n]) == (0, compiled + 1)
for shape in ((), (0,), (3,), (2, 0, 5), (2, 3, 5)):
    result = Prepared(_add_kernel, (1,), 0, results=[(shape, torch.float16)], BLOCK=1024, num_warps=4)
    for _ in range(2):
        (out,) = result(x, None)
        assert out.shape == shape and out.stride() == torch.empty(shape).stride()
"""
