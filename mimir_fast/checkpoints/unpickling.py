"""Unpickling with torch's restricted reader: plain values, and in place of objects of other types nothing.

Types that other trainers keep beside their parameters (OmegaConf's, yacs's, enumerations, arrays) are left aside by name: the
reader is given an inert stand-in for them and never imports or calls the type itself.
"""

import argparse
import contextlib
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch

# More types than a file of parameters has.
MOST_TYPES = 64
# What acts on the machine is a reason to refuse a file whole, although it would not be called; torch refuses os and sys too.
# `commands` is what pickles call subprocess.
REFUSED = (
    "subprocess",
    "commands",
    "importlib",
    "shutil",
    "socket",
    "ctypes",
    "runpy",
    "webbrowser",
    "pty",
    "builtins",
)
BUILTIN_TYPES = ("int", "float", "str", "list", "dict", "tuple", "frozenset", "range", "slice", "object", "type")
MARK = "_mimir_fast_left_aside"


class Loaded(NamedTuple):
    """An object from a file, and what was left aside: place -> name of its type."""

    content: Any
    aside: dict[str, str]


class _DType:
    """Stands for numpy.dtype: a type of numbers by its code, such as "f8"."""

    def __init__(self, code: str, *_):
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1] if state[1] in "<>" else "=")


def _number(dtype: _DType, content: bytes) -> object:
    """A scalar of numpy's as Python's own: its methods are those that JSON and YAML know."""
    if dtype.dtype.kind not in "biufcSU":
        raise struct.error(f"no number: {dtype.dtype}")
    return np.frombuffer(content, dtype.dtype)[0].item()


def _posix(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _windows(*parts: str) -> str:
    return str(PureWindowsPath(*parts))


def _list(*_) -> list:
    return []


def _dict(*_) -> dict:
    return {}


KNOWN: dict[str, Callable] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": _DType,
    "numpy._core.multiarray.scalar": _number,
    "numpy.core.multiarray.scalar": _number,
    "collections.deque": _list,
    "collections.defaultdict": _dict,
    **{f"{module}.PosixPath": _posix for module in ("pathlib", "pathlib._local")},
    **{f"{module}.PurePosixPath": _posix for module in ("pathlib", "pathlib._local")},
    **{f"{module}.WindowsPath": _windows for module in ("pathlib", "pathlib._local")},
    **{f"{module}.PureWindowsPath": _windows for module in ("pathlib", "pathlib._local")},
}


def unpickled(file: IO[bytes]) -> Loaded:
    """What torch.save wrote into a file, in its present or older format.

    Raises pickle.UnpicklingError for types that are refused, where one of them is all that the file holds too.
    """
    stand_ins: dict[str, Callable] = {}
    refusal: pickle.UnpicklingError | None = None
    # Once more for every type it does not know: torch's reader stops at the first, and names that one alone.
    while True:
        file.seek(0)
        allowed: list[Callable | tuple[Callable, str]] = [(call, name) for name, call in (KNOWN | stand_ins).items()]
        try:
            # The open file and not its name, by whose suffix torch.load would choose the format.
            with torch.serialization.safe_globals(allowed):
                content = torch.load(file, map_location="cpu", weights_only=True)
            break
        except pickle.UnpicklingError as error:
            refusal = refusal or error
            if name := _filled_like_a_dictionary(error, stand_ins):
                stand_ins[name] = _dictionary(name)
            elif (name := _unknown(error)) and name not in stand_ins and len(stand_ins) < MOST_TYPES:
                stand_ins[name] = _stand_in(name)
            else:
                # The first type that was met, not what its stand-in could not do.
                raise refusal from error
    aside: dict[str, str] = {}
    content = _plain(content, "", aside) if stand_ins else content
    if refusal and not _holds_tensors(content):
        raise refusal
    return Loaded(content, aside)


def _unknown(error: Exception) -> str | None:
    """The type that torch's reader does not know, None for one that is refused and for other errors."""
    # torch's error has no attribute for the type: its text is all there is.
    found = re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error))
    if not found:
        return None
    name = found[1] if "." in found[1] else f"builtins.{found[1]}"
    module, _, last = name.partition(".")
    harmless = module == "builtins" and last in BUILTIN_TYPES
    return None if module in REFUSED and not harmless else name


class _StandIn(list):
    """An object in place of one of another type, which torch's reader may make, append to and give a state."""

    def __init__(self, *arguments):
        super().__init__()
        # numpy makes its arrays by a function that is told their class.
        told = next((argument for argument in arguments if isinstance(argument, type)), type(self))
        setattr(self, MARK, getattr(told, MARK, getattr(self, MARK)))

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is kept of it."""


def _stand_in(name: str) -> Callable:
    """What is called in place of a type."""
    return type(name, (_StandIn,), {MARK: name})


def _filled_like_a_dictionary(error: Exception, stand_ins: dict[str, Callable]) -> str | None:
    """The name of the stand-in that torch's reader did not fill because it is no dictionary."""
    if "Can only SETITEM" not in str(error):
        return None
    return next((name for name in stand_ins if f"{__name__}.{name}'" in str(error)), None)


def _dictionary(name: str) -> Callable:
    """What is called in place of a type of dictionaries."""

    def make(*_) -> OrderedDict:
        # Of this class, for torch's reader fills no subclass.
        made: OrderedDict = OrderedDict()
        setattr(made, MARK, name)
        return made

    # __new__: objects are made by it or by a call, depending on their class.
    return type("StandIn", (), {"__new__": make, MARK: name})


def _plain(value: Any, place: str, aside: dict[str, str]) -> Any:
    """A value without what was left aside, whose places are noted; a list or tuple goes with one of its entries."""
    if isinstance(name := getattr(value, MARK, None), str):
        aside[place] = name
        return None
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain(vars(value), place, aside))
    if isinstance(value, dict):
        kept = {key: _plain(entry, f"{place}.{key}".strip("."), aside) for key, entry in value.items()}
        lost = [key for key in value if f"{place}.{key}".strip(".") in aside]
        return type(value)((key, entry) for key, entry in kept.items() if key not in lost)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        before = len(aside)
        kept_entries = [_plain(entry, place, aside) for entry in value]
        return None if len(aside) > before else type(value)(kept_entries)
    return value


def _holds_tensors(value: Any) -> bool:
    """Whether a dictionary holds a tensor, in a dictionary of it or below too."""
    if isinstance(value, torch.Tensor):
        return True
    with contextlib.suppress(AttributeError):
        return any(map(_holds_tensors, value.values()))
    return False
