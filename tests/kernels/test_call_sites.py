"""Call sites of compiled code: a replayed call launches what its operation's launcher does, with the call's own memory."""

import re
import sys
from functools import partial

import torch
from torch._inductor.utils import run_and_get_code

from mimir_fast import kernels
from mimir_fast.kernels._shared import direct
from tests.kernels.test_launch import SPECIALISED
from tests.support.interpreter import interpret
from tests.support.simulation import needs_simulated_gpu, run_simulated

REPLAYED = """
import torch
from triton import knobs
from triton.runtime.jit import JITFunction
from torch.utils._python_dispatch import TorchDispatchMode
from bench.kernels.cases import OPS
from mimir_fast.kernels._shared.call_sites import CallSite, Fixed, call_site
from mimir_fast.kernels._shared.direct import CALLS
from mimir_fast.kernels._shared.tiles import use_tiles
from tests.kernels.test_devices import SMALL, offered
from tests.support.cases import Drawn

class Compiled:
    "A kernel that is not compiled, and tells what it is launched with."
    function, packed_metadata = 0, ()

    def __init__(self, kernel):
        self.name = kernel.__name__

    def run(self, x, y, z, stream, function, metadata, a, b, c, *arguments):
        launched.append((self.name, (x, y, z), stream, arguments))

JITFunction.run = lambda kernel, *arguments, **options: by_triton.append(kernel) or Compiled(kernel)

class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mimir_fast":
            called.append((func, args))
        return func(*args, **(kwargs or {}))

def fixed(t):
    return Fixed(tuple(t.shape), t.stride(), t.dtype, str(t.device)) if isinstance(t, torch.Tensor) else t

def begins(*values):
    return [value.data_ptr() for value in values if isinstance(value, torch.Tensor)]

def launches(call, args):
    "What a call launches, an address of its arguments or results in the argument's or result's place; what it returns."
    launched.clear()
    result = call(*args)
    results = result if isinstance(result, (tuple, list)) else [result]
    known = {address: i for i, address in enumerate([*begins(*args), *begins(*results)]) if address}
    # Memory that is neither, of partial sums, is somewhere else every time.
    return [
        (*rest, [known.get(number, number if number is None or abs(number) < 1 << 24 else "memory") for number in numbers])
        for *rest, numbers in launched
    ], [fixed(t) for t in results]

launched, by_triton, called, cannot = [], [], [], set()
torch.backends.cuda.enable_cudnn_sdp(False)
with Operators():
    for case in (case for op in OPS for case in offered(op, SMALL, "bf16")):
        Drawn(case, torch.device("cuda")).values(case.ours)
assert len({func for func, _ in called}) >= len(OPS)
for func, args in called:
    call, site = CALLS[f"torch.ops.{func}"], CallSite(f"torch.ops.{func}", tuple(map(fixed, args)))
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    for _ in range(2):
        expected = launches(call, args)
    assert expected[0]
    # With the memory of the first call, with memory of its own, and with memory in another shape.
    copies = [t.clone(memory_format=torch.preserve_format) for t in tensors]
    flat = [t.flatten() if t.is_contiguous() else t for t in tensors]
    for given in (tensors, copies, flat, tensors):
        found = launches(site, given)
        assert [names[:3] for names in found[0]] == [names[:3] for names in expected[0]] and found[1] == expected[1]
        assert found == expected or site.replay is None, (func, found, expected)
    if site.replay is None:
        cannot.add(str(func).removeprefix("mimir_fast."))
# Between their launches are operators of torch: solves, copies of what is not contiguous, sums.
loss = {"masked_patch_loss.kernel", "masked_patch_loss_grad_pred.default"}
assert cannot == {"nhsic.kernel", "nhsic_grad.default", "token_restore_grad.default", *loss}, cannot

func, args = next((func, args) for func, args in called if "linear_gelu" in str(func))
site = CallSite(f"torch.ops.{func}", tuple(map(fixed, args)))

def replayed(*tensors):
    "Whether the call was replayed: launched, and nothing looked up."
    launched.clear()
    told = []
    site.call = CALLS[f"torch.ops.{func}"]._replace(launch=lambda *a: told.append(a) or CALLS[f"torch.ops.{func}"].launch(*a))
    site(*tensors)
    return not told

assert [replayed(*args) for _ in range(3)] == [False, True, True]
assert launched[0][2] == torch.cuda.current_stream().cuda_stream
with torch.cuda.stream(torch.cuda.Stream()):
    assert replayed(*args) and launched[0][2] == torch.cuda.current_stream().cuda_stream != 0
# An address that is no multiple of 16.
odd = torch.zeros(args[0].numel() + 1, dtype=args[0].dtype, device="cuda")[1:].view(args[0].shape)
assert not replayed(odd, *args[1:]) and replayed(*args)
# Who looks at operators is shown this one.
called.clear()
with Operators():
    site(*args)
assert [found for found, _ in called] == [func]
knobs.runtime.launch_enter_hook.add(print)
assert not replayed(*args)
knobs.runtime.launch_enter_hook.calls.clear()
torch.use_deterministic_algorithms(True)
assert not replayed(*args)
torch.use_deterministic_algorithms(False)
kept, site.replay = site.replay, site.replay._replace(device=1)
assert not replayed(*args)
site.replay = kept
assert replayed(*args)
# Chosen tiles may change what is launched.
site = call_site(f"torch.ops.{func}", tuple(map(fixed, args)))
assert site is call_site(f"torch.ops.{func}", tuple(map(fixed, args)))
assert [replayed(*args) for _ in range(2)] == [False, True]
use_tiles({})
assert [replayed(*args) for _ in range(2)] == [False, True]
# A launcher that goes on to change its result by an operator of torch.
def doubled(*arguments):
    act, pre = CALLS[f"torch.ops.{func}"].launch(*arguments)
    return act.mul_(2), pre

site = CallSite(f"torch.ops.{func}", tuple(map(fixed, args)))
site.call = site.call._replace(launch=doubled)
site(*args)
assert site.replay is None
"""


@needs_simulated_gpu
def test_kept_kernels_are_those_that_triton_would_take_and_replayed_calls_launch_the_same(tmp_path):
    # In one process, which takes seconds to start.
    programs = {"specialised.py": SPECIALISED, "replayed.py": REPLAYED}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    both = "; ".join(f"runpy.run_path({str(tmp_path / name)!r})" for name in programs)
    run_simulated([sys.executable, "-c", f"import runpy; {both}"])


def generated(function, *tensors) -> tuple[torch.Tensor, list[str], str]:
    """What a function gives compiled, the call sites that are defined for it, and its code."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        value, (code,) = run_and_get_code(function, *tensors)
    return value, re.findall(r"^\w+ = call_site\(.*$", code, re.M), code


def test_calls_that_fix_the_same_share_a_site_and_others_do_not():
    direct.write_direct_calls()

    def normed(x, weight):
        for eps in (1e-6, 1e-6, 1e-5):
            # A view with the same address is not made; one with another address is.
            _, x = kernels.add_layer_norm(x.view(6, 1, -1), None, None, weight[0], weight[1], eps, impl="triton")
        return x

    tensors = torch.randn(2, 3, 16), torch.randn(2, 16)
    with interpret():
        value, sites, code = generated(torch.compile(normed, fullgraph=True), *tensors)
        assert torch.equal(value, normed(*tensors))
        assert len(sites) == 2
        assert sum(code.count(f"= {site.split()[0]}(") for site in sites) == 3
        assert all("Fixed((6, 1, 16), (16, 16, 1), torch.float32, 'cpu')" in site for site in sites)
        (first,) = re.findall(rf"= {sites[0].split()[0]}\((.*)\)$", code, re.M)[:1]
        assert first.count("reinterpret_tensor") == 1, first


def test_a_graph_that_fixes_no_shapes_has_no_site():
    direct.write_direct_calls()
    compiled = torch.compile(partial(kernels.patch_gather, patch_size=4, impl="triton"), fullgraph=True, dynamic=True)
    images, ids = torch.randn(3, 3, 8, 8), torch.tensor([[0, 2], [3, 1], [1, 1]])
    with interpret():
        value, sites, code = generated(compiled, images, ids)
        assert not sites
        assert "= mimir_fast_calls[" in code
        assert torch.equal(value, kernels.patch_gather(images, ids, 4))
