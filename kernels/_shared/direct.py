"""Direct calls: code that Inductor generates calls our launchers as Python functions, without torch's dispatcher.

The dispatcher boxes every argument and result, 4 us of host time per call, to arrive at the same function.
"""

from collections.abc import Callable

import torch
from torch._ops import OpOverload

# Name of an operator, as generated code has it -> what that calls instead.  Generated code that is kept on disk looks here too.
CALLS: dict[str, Callable] = {}
# Inductor's: name of an operator -> how its call is written.  None before `write_direct_calls`.
_writers: dict | None = None


def call_directly(overload: OpOverload, launch: Callable) -> None:
    """Let generated code call `launch`, and not the operator."""

    def call(*arguments):
        # Who looks at operators is to see ours.
        if torch._C._len_torch_dispatch_stack() or torch.autograd.profiler._is_profiler_enabled:
            return overload(*arguments)
        return launch(*arguments)

    CALLS[f"torch.ops.{overload}"] = call
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
    """Write the call that a node of Inductor's stands for."""
    from torch._inductor.virtualized import V

    V.graph.wrapper_code.add_import_once("from mimir_fast.kernels._shared.direct import CALLS as mimir_fast_calls")
    arguments = ", ".join([*node.codegen_args(), *node.codegen_kwargs()])
    writeline(f'{node.get_name()} = mimir_fast_calls["{node.python_kernel_name}"]({arguments})')
