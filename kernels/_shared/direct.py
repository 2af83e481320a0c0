"""Direct calls: code that Inductor generates calls our launchers as Python functions, without torch's dispatcher.

The dispatcher boxes every argument and result, 4 us of host time per call, to arrive at the same function.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._ops import OpOverload


class Call(NamedTuple):
    """An operator as generated code calls it: `launch` in the overload's place."""

    overload: OpOverload
    launch: Callable

    def __call__(self, *arguments):
        return self.overload(*arguments) if watched() else self.launch(*arguments)


# Name of an operator, as generated code has it -> what that calls instead.  Generated code that is kept on disk looks here too.
CALLS: dict[str, Call] = {}
# Inductor's: name of an operator -> how its call is written.  None before `write_direct_calls`.
_writers: dict | None = None


def watched() -> bool:
    """Whether someone looks at operators, who is to see ours."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch.autograd.profiler._is_profiler_enabled


def call_directly(overload: OpOverload, launch: Callable) -> None:
    """Let generated code call `launch`, and not the operator."""
    CALLS[f"torch.ops.{overload}"] = Call(overload, launch)
    # Operators are registered when their modules are imported, which can be after Inductor was told.
    if _writers is not None:
        write_direct_calls()


def write_direct_calls() -> None:
    """Write direct calls into what Inductor compiles from now on; a torch that does not ask how goes on with its own."""
    global _writers
    try:
        # Imports Inductor, which is slow: only where something is compiled.
        from torch._inductor.codegen import custom_extern_kernel_codegen as inductor
    except ImportError:
        return
    _writers = inductor.CUSTOM_EXTERN_KERNEL_CODEGEN
    _writers |= dict.fromkeys(CALLS, inductor.CustomCodegen(python=_write))


def _write(node, writeline: Callable[[str], None]) -> None:
    """Write the call that a node of Inductor's stands for, and beside the imports the call site that it goes through."""
    from torch._inductor.virtualized import V

    name, add_once = node.python_kernel_name, V.graph.wrapper_code.add_import_once
    tensors, fixed = _arguments(node)
    if fixed is None:
        add_once("from mimir_fast.kernels._shared.direct import CALLS as mimir_fast_calls")
        arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
        return writeline(f'{node.get_name()} = mimir_fast_calls["{name}"]({arguments})')
    add_once("from mimir_fast.kernels._shared.call_sites import Fixed, call_site")
    made = f'call_site("{name}", {fixed})'
    # Named by all that it fixes: a subgraph's nodes can have the names of the graph's around it.
    site = f"{name.split('.')[-2]}_{hashlib.sha256(made.encode()).hexdigest()[:12]}"
    add_once(f"{site} = {made}")
    writeline(f"{node.get_name()} = {site}({', '.join(tensors)})")


def _arguments(node) -> tuple[list[str], str | None]:
    """The tensors of a call as generated code has them, and all of its arguments as `CallSite` takes them; None in their
    place if the graph does not fix them."""

    def integers(numbers) -> bool:
        # Sympy's, where they are not Python's.
        return all(isinstance(number, int) or number.is_Integer for number in numbers)

    arguments, by_name = node.unflatten_args(node.inputs, node.constant_args)
    texts, fixed = [], []
    for argument in arguments:
        if hasattr(argument, "get_stride"):
            size, stride = argument.get_size(), argument.get_stride()
            if not integers([*size, *stride]):
                return [], None
            texts.append(_memory(argument))
            layout = tuple(map(int, size)), tuple(map(int, stride)), argument.get_dtype(), str(argument.get_device())
            fixed.append(f"Fixed{layout!r}")
        elif argument is None or isinstance(argument, (bool, int, float, torch.dtype)):
            fixed.append(repr(argument))
        else:
            return [], None
    return texts, None if by_name else f"({', '.join(fixed)},)"


def _memory(argument) -> str:
    """A tensor that begins where the argument begins, as generated code has it: without a view if there is one."""
    from torch._inductor import ir

    if isinstance(argument, ir.ReinterpretView) and isinstance(argument.data, ir.StorageBox):
        base, view = argument.data.data, argument.layout
        if isinstance(base, ir.Buffer) and (base.get_layout().offset, base.get_dtype()) == (view.offset, view.dtype):
            return base.codegen_reference()
    return argument.codegen_reference()
