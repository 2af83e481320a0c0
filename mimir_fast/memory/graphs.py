"""Memory of a graph compiled by Inductor, replayed on fake tensors.

The graph is the one that Inductor gets: captured by Dynamo, differentiated and split by AOTAutograd.  Instead of generating
code, a Plan replays which buffers the code would allocate and free: results of pointwise operations stay in registers inside
the kernel that reads them, unless something outside of generated kernels (a matrix product, attention, an operation of ours,
the caller) reads them too.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import tree_leaves

from mimir_fast.memory.cuda import ON_CUDA, Scratch, scratch_of
from mimir_fast.memory.ledger import Ledger, tensor_growth

aten, prims = torch.ops.aten, torch.ops.prims
REDUCTIONS = {aten.sum, aten.mean, aten.var_mean, aten.amax, aten.amin, aten.any, aten.all}
# Operators that are not tagged as pointwise, but that Inductor generates code for all the same.
FUSED = {
    aten.full, aten.full_like, aten.zeros, aten.zeros_like, aten.arange, aten.scalar_tensor, aten.index, aten.embedding,
    aten.gather, aten.constant_pad_nd, aten.slice_scatter, aten.select_scatter, aten.cat, aten.expand, aten.clone,
    aten.copy, prims.iota, prims.convert_element_type,
}  # fmt: skip
# A pointwise value that reads more buffers than this is stored if it is used twice: Inductor's realize_reads_threshold.
READS = 4


class Kernel(NamedTuple):
    """One step of a plan, storages by key: what it allocates, what it reads, bytes it needs meanwhile."""

    made: list[int]
    read: set[int]
    scratch: Scratch
    extern: bool


class Plan:
    """Replays a graph's allocations on a ledger: called with the graph's fake inputs, it returns its fake outputs."""

    def __init__(self, graph: fx.GraphModule, ledger: Ledger, backward: bool):
        nodes = list(graph.graph.nodes)
        given = [node for node in nodes if node.op == "placeholder"]
        self.ledger, self.backward = ledger, backward
        # Tells AOTAutograd to pass the inputs as one list, from which each is removed after its last use.
        self._boxed_call = True
        self.size = {key: tensor_growth(t, ledger.batch) for node in nodes for key, t in _tensors(node).items()}
        self.inputs = [next(iter(_tensors(node)), None) for node in given]
        # Inputs whose memory outputs may not take over: all but those that the forward graph saved.
        self.fixed = {key for key, node in zip(self.inputs, given) if not backward or node.name.startswith("tangents")}
        self.outputs = tree_leaves(nodes[-1].args[0])
        self.kept = {key for node in self.outputs if isinstance(node, fx.Node) for key in _tensors(node)}
        self.kernels = kernels(nodes, ledger.batch)
        touched = enumerate(kernel.read | set(kernel.made) for kernel in self.kernels)
        self.last = {key: step for step, keys in touched for key in keys}

    def __call__(self, args: list) -> list:
        """Run; every half of a backward graph is a segment of its own, and so is a forward graph."""
        self.ledger.hold(arg for arg in args if isinstance(arg, Tensor))
        given = dict(zip(self.inputs, args))
        # Buffers made here and still alive.
        own: dict[int, np.ndarray] = {}
        self.ledger.segment += 1
        for step, kernel in enumerate(self.kernels):
            # With the depth the first half holds more saved activations, the second one more gradients.
            if self.backward and step == len(self.kernels) // 2:
                self.ledger.segment += 1
            dead = {key for key in kernel.read | set(kernel.made) if self.last[key] == step} - self.kept
            reused = [] if kernel.extern else self._reused(kernel, dead)
            self._drop(reused, own, given, args)
            own |= {key: self.size[key] for key in kernel.made}
            self.ledger.note(sum(own.values(), np.zeros(3)), kernel.scratch)
            self._drop(dead, own, given, args)
        # The caller's list holds the last references to the inputs.
        args.clear()
        self.ledger.segment += 1
        made: dict[int, Tensor] = {}
        return [self._output(node, given, made) for node in self.outputs]

    def _reused(self, kernel: Kernel, dead: set[int]) -> list[int]:
        """Buffers that die in this kernel and whose memory its outputs take over."""
        free, reused = sorted(dead - self.fixed - set(kernel.made)), []
        for made in kernel.made:
            match = next((key for key in free if (self.size[key] == self.size[made]).all()), None)
            if match is not None:
                free.remove(match)
                reused.append(match)
        return reused

    def _drop(self, keys, own: dict, given: dict, args: list) -> None:
        for key in keys:
            own.pop(key, None)
            if given.pop(key, None) is not None:
                for i in (i for i, own_key in enumerate(self.inputs) if own_key == key):
                    args[i] = None

    def _output(self, node: fx.Node | None, given: dict, made: dict) -> Tensor | None:
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
            return node.meta["val"] if isinstance(node, fx.Node) else node
        like = node.meta["val"]
        key = like.untyped_storage()._cdata
        if node.op == "placeholder":
            return given[key]
        if key not in given and key not in made:
            made[key] = torch.empty(like.untyped_storage().nbytes() // like.element_size(), dtype=like.dtype)
        # Outputs that are views of an input, or of each other, share its storage here as they will there.
        base = given[key] if key in given else made[key]
        return base.as_strided(like.shape, like.stride(), like.storage_offset())


def kernels(nodes: list[fx.Node], batch: int) -> list[Kernel]:
    """The kernels that Inductor makes of a graph, in its order."""
    stored = {key for node in nodes if node.op == "placeholder" for key in _tensors(node)}
    wanted = {key for node in nodes if _extern(node) for arg in node.all_input_nodes for key in _tensors(arg)}
    inlined: dict[int, set[int]] = {}
    plan = []
    for node in nodes:
        made = [key for key in _tensors(node) if key not in stored and key not in inlined]
        if node.op != "call_function" or not made:
            continue
        keys = {key for arg in node.all_input_nodes for key in _tensors(arg)}
        read = set().union(*({key} if key in stored else inlined[key] for key in keys))
        extern, heavy = _extern(node), len(read) > READS and len(node.users) > 1
        if not extern and not heavy and not wanted & set(made) and _operator(node) not in REDUCTIONS:
            inlined |= {key: read for key in made}
            continue
        stored |= set(made)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        plan.append(
            Kernel(made, read, scratch_of(node.target, batch, *args, **kwargs) if extern else Scratch(), extern)
        )
    return plan


def _extern(node: fx.Node) -> bool:
    """Whether a node runs outside of generated kernels, so that its inputs must be stored, as those of the output."""
    if node.op == "output":
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    fused = torch.Tag.pointwise in node.target.tags or node.target.is_view
    return not fused and _operator(node) not in REDUCTIONS | FUSED


def _operator(node: fx.Node) -> object:
    """The ATen operator that a node calls, whatever its overload; None for a function that is no operator."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None


def _tensors(node: fx.Node) -> dict[int, Tensor]:
    """{storage: tensor} of a node's values."""
    return {t.untyped_storage()._cdata: t for t in tree_leaves(node.meta.get("val")) if isinstance(t, Tensor)}


def planning_backend(ledger: Ledger) -> Callable:
    """A torch.compile backend that makes Plans on this ledger."""
    return aot_autograd(
        fw_compiler=lambda graph, _: Plan(graph, ledger, backward=False),
        bw_compiler=lambda graph, _: Plan(graph, ledger, backward=True),
        # The partition that Inductor uses: it decides what the forward pass saves.
        partition_fn=min_cut_rematerialization_partition,
        decompositions={**select_decomp_table(), **ON_CUDA},
    )
