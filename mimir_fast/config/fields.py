"""Flags and configurations.

A flag is a dataclass field that carries the help of its command-line flag; a section is a dataclass of flags; a
configuration is a dataclass of sections, in which every flag has a name of its own.
"""

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import ClassVar, TypeVar, get_type_hints

Config = TypeVar("Config", bound="Configuration")


def flag(
    default,
    help: str,
    unit: str = "",
    choices: tuple[str, ...] = (),
    new: bool = False,
    type: type | None = None,
    negative: str = "",
    several: bool = False,
    compat: str = "",
    path: bool = False,
):
    """A dataclass field with what its command-line flag needs.

    unit      of the value, for the help
    choices   the only values, where they are a closed set
    new       the original has no such flag
    type      where it differs from the default's
    negative  how the opposite of a switch is spelt, where it is not no_NAME
    several   the flag takes one value or more
    path      whether the value is a file or folder (or a URL): ~ is the home folder
    compat    what any word outside of choices does under --compat original; empty: it is an error there too
    """
    metadata = {"help": help, "unit": unit, "choices": choices, "new": new, "type": type or default.__class__}
    metadata |= {"negative": negative, "several": several, "compat": compat, "path": path}
    return field(default=default, metadata=metadata)


def home_path(path: str) -> str:
    """A path with ~ or ~NAME at its beginning replaced by the home folder.  Raises ValueError if there is no such home."""
    whole = os.path.expanduser(path)
    if path.startswith("~") and whole.startswith("~"):
        raise ValueError(f"got {path!r}, expected a path of a home folder that exists; write it in full")
    return whole


def inherited(section: type, name: str, default=None, **words: str | bool):
    """The flag `name` of another section, with another default if one is given; words: another `help`, `compat` or `new`."""
    (theirs,) = [f for f in fields(section) if f.name == name]
    metadata = {**theirs.metadata, **words}
    return field(default=theirs.default if default is None else default, metadata=metadata)


@dataclass(frozen=True)
class Configuration:
    """Everything a run depends on: a frozen dataclass whose fields are sections, whose fields are flags.

    given   names of the flags that `updated` was told, also where the value is the default's
    """

    given: ClassVar[frozenset[str]] = frozenset()

    # The one place where ~ is replaced: flags, files of flags and Python all make a configuration.
    def __post_init__(self):
        for name, kind in self.sections().items():
            section = getattr(self, name)
            homes = {f.name: _at_home(f, getattr(section, f.name)) for f in fields(kind) if f.metadata["path"]}
            if any(value != getattr(section, flag_name) for flag_name, value in homes.items()):
                # A frozen dataclass refuses assignments, in its own __post_init__ too.
                object.__setattr__(self, name, replace(section, **homes))

    # Flags have one namespace over all sections, as on the command line: `flat` and `updated` need no section.

    @classmethod
    def sections(cls) -> dict[str, type]:
        """{section: its dataclass}, in their order."""
        types = get_type_hints(cls)
        return {f.name: types[f.name] for f in fields(cls)}

    @classmethod
    def flags(cls) -> dict[str, Field]:
        """{flag name: field} over all sections, in their order."""
        return {f.name: f for kind in cls.sections().values() for f in fields(kind)}

    def flat(self) -> dict:
        """{flag name: value} over all sections, in their order."""
        return {
            f.name: getattr(getattr(self, section), f.name)
            for section, kind in self.sections().items()
            for f in fields(kind)
        }

    def changed(self) -> set[str]:
        """Names of the flags that differ from their defaults."""
        defaults = type(self)().flat()
        return {name for name, value in self.flat().items() if value != defaults[name]}

    def updated(self: Config, values: dict) -> Config:
        """A copy with flags replaced: {flag name: value}.  Raises ValueError for a name that is no flag."""
        unknown = values.keys() - self.flags().keys()
        if unknown:
            raise ValueError(f"{sorted(unknown)[0]}: no such flag; see --help for the list")
        sections = {}
        for section, kind in self.sections().items():
            own = {f.name: values[f.name] for f in fields(kind) if f.name in values}
            sections[section] = replace(getattr(self, section), **own)
        new = type(self)(**sections)
        # no field: two configurations of the same values are equal, whoever chose the values
        object.__setattr__(new, "given", self.given | values.keys())
        return new

    def completed(self: Config, explicit: set[str]) -> Config:
        """A copy with the defaults that other flags decide; explicit: the names of the flags that were set."""
        return self

    def notes(self, explicit: set[str]) -> list[str]:
        """Lines to print about flags that do not do what one might expect; explicit: the names of the flags that were set."""
        return []

    def check(self: Config) -> Config:
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        check_words(self.flags(), self.flat())
        for name, value in self.flat().items():
            for number in value if isinstance(value, tuple) else (value,):
                require(not isinstance(number, float) or math.isfinite(number), name, number, "a finite number")
        return self


def _at_home(f: Field, value):
    """The value of a flag of paths, its ~ replaced."""
    try:
        return tuple(map(home_path, value)) if isinstance(value, tuple) else value and home_path(str(value))
    except ValueError as error:
        raise ValueError(f"{f.name}: {error}") from error


def check_words(flags: dict[str, Field], values: dict) -> None:
    """Raise ValueError for a word that is not among its flag's choices, unless --compat original gives it a meaning."""
    for name, f in flags.items():
        value, choices, compat = values[name], f.metadata["choices"], f.metadata["compat"]
        if not choices or value is None or value in choices or (compat and values["compat"] == "original"):
            continue
        near = difflib.get_close_matches(str(value), choices, n=1)
        message = f"{name}: got {value!r}, expected {in_words(choices)}"
        message += f"; did you mean {near[0]}?" if near else ""
        raise ValueError(message + (f" (--compat original: any other word {compat})" if compat else ""))


def in_words(choices: Sequence[str]) -> str:
    """For a sentence: a or b; one of a, b, c."""
    return " or ".join(choices) if len(choices) < 3 else f"one of {', '.join(choices)}"


def require(ok: bool, name: str, value, allowed: str) -> None:
    """Raise ValueError naming a flag, its value and what is allowed, unless ok."""
    if not ok:
        raise ValueError(f"{name}: got {value}, expected {allowed}")
