"""Run the project's Triton kernels on CPU tensors, with the arithmetic of a GPU and every memory access checked.

    with interpret(Sanitizer()) as s:
        launch(x, out)              # kernels decorated with @triton.jit as usual; no environment variable
    assert not s.errors             # duplicate, racing and atomic accesses; out of bounds and int32 overflow raise
    s.st["load_bytes"]              # traffic, see Sanitizer

Written for Triton 3.8, whose own interpreter is wrong in four ways that are put right here: bf16 arithmetic works on
the bits, fp32 -> bf16 truncates, tf32 is not rounded, and triton.language stays patched so that compilations fail later.
bf16 in tl.fma and tl.clamp is not put right, autotuned kernels do not run.  About 2 ms per program: keep grids small.
"""

import importlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from mimir_fast import kernels

for path in Path(kernels.__file__).parent.glob("*/kernel.py"):  # decorated before anything is patched
    importlib.import_module(f"mimir_fast.kernels.{path.parent.name}.kernel")

SECTOR = 32  # bytes, the unit of a GPU's memory traffic
NOBODY, SEVERAL = -1, -2  # in Shadow.writer and Shadow.reader, beside program numbers


class Shadow:
    """What is known about every byte of one storage: whether the launch may touch it, and which program did."""

    def __init__(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.base, self.size = storage.data_ptr(), storage.nbytes()
        self.name = ""
        self.allowed = torch.zeros(self.size, dtype=torch.bool)
        self.writer, self.reader = (np.full(self.size, NOBODY, np.int32) for _ in range(2))

    def allow(self, name: str, tensor: torch.Tensor):
        """The elements of this view may be touched, the gaps between them may not."""
        self.name = f"{self.name}/{name}" if self.name else name
        count, size = self.size // tensor.element_size(), tensor.element_size()
        cells = torch.as_strided(  # [*shape, bytes of an element]
            self.allowed[: count * size],
            (*tensor.shape, size),
            (*(stride * size for stride in tensor.stride()), 1),
            tensor.storage_offset() * size,
        )
        cells.fill_(True)


class Sanitizer:
    """Checks and counts the accesses of every launch inside `interpret`.

    launches  how often each kernel ran
    errors    messages; out of bounds raises at once instead (InterpreterError naming program, argument and place)
    st        sums over all launches: load_bytes, store_bytes (distinct addresses within an access, without
              masked-off lanes), load_sectors32, store_sectors32 (32-byte sectors it touches), dots, dot_flops
    """

    def __init__(self):
        self.errors: list[str] = []
        self.launches: Counter[str] = Counter()
        self.st: Counter[str] = Counter()
        self._shadows: list[Shadow] = []

    def used(self, kind: str) -> float:
        """Share of the moved sectors' bytes that was asked for, for kind load or store."""
        return self.st[f"{kind}_bytes"] / (SECTOR * self.st[f"{kind}_sectors32"])

    def touched_sectors(self) -> int:
        """Sectors that the last launch read or wrote, each counted once."""
        return sum(
            np.unique(np.flatnonzero((s.writer != NOBODY) | (s.reader != NOBODY)) // SECTOR).size for s in self._shadows
        )

    def start_launch(self, arguments: dict):
        """Forget the previous launch; only these arguments' tensors may be touched."""
        shadows: dict[int, Shadow] = {}
        for name, tensor in arguments.items():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                start = tensor.untyped_storage().data_ptr()
                shadows.setdefault(start, Shadow(tensor)).allow(name, tensor)
        self._shadows = list(shadows.values())

    def access(self, kind: str, pointers: stock.TensorHandle, mask: stock.TensorHandle, program: int):
        """Check and count one load, store or atomic of a program."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, active = np.broadcast_arrays(pointers.data, mask.data.astype(bool))  # conditions can be int8
        addresses = addresses[active]
        distinct = np.unique(addresses)
        if kind == "atomic":
            self.errors.append(f"atomic access by program {program}: its order is not fixed")
        if kind == "store" and distinct.size != addresses.size:
            self.errors.append(f"program {program}: {addresses.size - distinct.size} duplicates in one tl.store")
        self.st[f"{kind}_bytes"] += distinct.size * size
        self.st[f"{kind}_sectors32"] += np.unique(distinct // SECTOR).size
        known = 0
        for shadow in self._shadows:
            inside = (distinct >= shadow.base) & (distinct < shadow.base + shadow.size)
            known += inside.sum()
            if inside.any():
                self._touch(shadow, kind, (distinct[inside] - shadow.base).astype(np.int64), size, program)
        if known != distinct.size:
            raise IndexError(f"{kind} out of bounds: program {program}, {distinct.size - known} places in no argument")

    def _touch(self, shadow: Shadow, kind: str, places: np.ndarray, size: int, program: int):
        allowed = shadow.allowed.numpy()
        last = places + size - 1
        bad = (last >= shadow.size) | ~allowed[places] | ~allowed[np.minimum(last, shadow.size - 1)]
        if bad.any():
            place = places[bad][0] // size
            raise IndexError(f"{kind} out of bounds: program {program}, element {place} of {shadow.name}'s storage")
        others = {"writer": shadow.writer[places]}
        if kind != "load":
            others["reader"] = shadow.reader[places]
        for role, other in others.items():
            race = (other != NOBODY) & (other != program)
            if race.any():
                self.errors.append(f"race: {kind} by program {program}, {role} {other[race][0]}, in {shadow.name}")
        if kind == "load":
            before = shadow.reader[places]
            shadow.reader[places] = np.where((before == NOBODY) | (before == program), program, SEVERAL)
        else:
            shadow.writer[places] = program


def _is_bf16(handle: stock.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: stock.TensorHandle) -> np.ndarray:
    """The values of a handle, bf16 (stored as uint16) as fp32."""
    return (handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32) if _is_bf16(handle) else handle.data


def _bf16(values: np.ndarray) -> stock.TensorHandle:
    """fp32 values rounded to nearest even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return stock.TensorHandle(np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16), tl.bfloat16)


def _tf32(values: np.ndarray) -> np.ndarray:
    """fp32 values with 10 bits of mantissa, ties away from zero."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


class Builder(stock.InterpreterBuilder):
    """The stock interpreter's operations with right bf16 and tf32, each memory access shown to a sanitizer first."""

    def __init__(self, sanitizer: Sanitizer | None, last: int | None):
        super().__init__()
        self.sanitizer, self.last, self.skipped = sanitizer, last, 0
        self.options = stock.InterpreterOptions(debug=True)  # device_assert and the int32 overflow checks are on

    def set_grid_dim(self, nx, ny, nz):
        super().set_grid_dim(nx + self.skipped, ny, nz)

    def set_grid_idx(self, x, y, z):
        super().set_grid_idx(x + self.skipped, y, z)

    def get_bf16(self, value):
        return _bf16(np.array([value], np.float32))

    def binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) and _is_bf16(rhs)) or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return super().binary_op(lhs, rhs, op)
        result = op(_widen(lhs), _widen(rhs))
        return stock.TensorHandle(result, tl.int1) if result.dtype == np.bool_ else _bf16(result)

    def unary_op(self, arg, op):
        return _bf16(op(_widen(arg))) if _is_bf16(arg) else super().unary_op(arg, op)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _bf16(src.data.astype(np.float32))
        return super().cast_impl(stock.TensorHandle(_widen(src), tl.float32) if _is_bf16(src) else src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, y = (_widen(operand).astype(np.float32) for operand in (a, b))
        tf32 = a.dtype.scalar == tl.float32 and "TF32" in str(input_precision)
        large, other = (x, y) if not tf32 else (_tf32(x), _tf32(y))
        product = np.matmul(large, other)
        if str(input_precision).endswith(
            "TF32x3"
        ):  # what tf32 drops, in a second number; the smallest product left out
            product += np.matmul(large, _tf32(y - other)) + np.matmul(_tf32(x - large), other)
        if self.sanitizer:
            self.sanitizer.st["dots"] += 1
            self.sanitizer.st["dot_flops"] += 2 * x.size * y.shape[-1]
        return stock.TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_masked_load(self, ptrs, mask, *rest):
        self._show("load", ptrs, mask)
        return super().create_masked_load(ptrs, mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        self._show("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *rest)

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        self._show("atomic", ptr, mask)
        return super().create_atomic_rmw(op, ptr, val, mask, *rest)

    def _show(self, kind, pointers, mask):
        (x, y, z), (width, height, _) = self.grid_idx, self.grid_dim
        if self.sanitizer:
            self.sanitizer.access(kind, pointers, mask, x + width * (y + height * z))


_FUNCTIONS: dict[int, stock.InterpretedFunction] = {}  # by id: hashing a JITFunction walks its source


def _interpreted(function: JITFunction) -> stock.InterpretedFunction:
    return _FUNCTIONS.setdefault(id(function), stock.InterpretedFunction(function.fn))


class _Executor(stock.GridExecutor):
    """Announces the tensors of a launch to the sanitizer; tensors are on the CPU already and are not copied back."""

    def _init_args_hst(self, args_dev, kwargs):
        args, kwargs = super()._init_args_hst(args_dev, kwargs)
        if stock.interpreter_builder.sanitizer:
            stock.interpreter_builder.sanitizer.start_launch({**dict(zip(self.arg_names, args)), **kwargs})
        return args, kwargs

    def _restore_args_dev(self, *_):
        pass


def _run(self, *args, grid, warmup=False, **kwargs):
    function, builder = _interpreted(self), stock.interpreter_builder
    builder.patched = set()
    if builder.sanitizer:
        builder.sanitizer.launches[self.fn.__name__] += 1
    if builder.last:
        builder.skipped = max(0, grid[0] - builder.last)
        grid = (grid[0] - builder.skipped, *grid[1:])
    _Executor(function.rewrite(), function.arg_names, grid)(*args, **kwargs)


def _call(self, *args, **kwargs):
    """A call inside of a kernel; the language is patched once per launch and module, not at every call."""
    function, patched = _interpreted(self), stock.interpreter_builder.patched
    if function.fn.__module__ not in patched:
        stock._patch_lang(function.fn)
        patched.add(function.fn.__module__)
    return function.rewrite()(*args, **kwargs)


def _reduce(self, value, original=stock.ReduceScanOpInterface.apply):
    """Reductions and scans of bf16 run in fp32, as the compiler's front end has it."""
    if isinstance(value, tl.tensor) and _is_bf16(value.handle):
        fp32 = tl.block_type(tl.float32, list(value.shape))
        value = tl.tensor(stock.TensorHandle(_widen(value.handle), tl.float32), fp32)
    return original(self, value)


@contextmanager
def interpret(sanitizer: Sanitizer | None = None, last: int | None = None):
    """Inside, every @triton.jit kernel runs in the interpreter; yields the sanitizer.  Leaves no trace in Triton.

    last: run only so many programs at the end of the grid's first axis, for tensors too large to be worked through.
    """
    language = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
    before = [dict(vars(part)) for part in language]
    builder = Builder(sanitizer, last)
    try:
        with (
            patch.object(JITFunction, "run", _run),
            patch.object(JITFunction, "__call__", _call),
            patch.object(stock.ReduceScanOpInterface, "apply", _reduce),
            patch.object(stock, "interpreter_builder", builder),
            patch.object(stock.interpreter_semantic, "builder", builder),
            np.errstate(all="ignore"),  # lanes that are masked off compute with anything
        ):
            yield sanitizer
    finally:
        for part, attributes in zip(language, before):
            for name in set(vars(part)) - set(attributes):
                delattr(part, name)
            for name, value in attributes.items():
                if vars(part)[name] is not value:
                    setattr(part, name, value)
