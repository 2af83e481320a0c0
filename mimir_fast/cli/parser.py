"""Command-line parser, generated from the dataclasses of a configuration (mimir_fast/config).

Flags may be written with `_` or `-`, and shortened to any unambiguous beginning, as the original's argparse allows.
Values come from defaults, --recipe, --config and flags; each overrides those before it.
"""

import argparse
import contextlib
import difflib
import inspect
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

import yaml

from mimir_fast.config.fields import Configuration, home_path, in_words

Config = TypeVar("Config", bound=Configuration)


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A verb whose flags are those of a configuration.

    original   whether it stands for a script of the original; its help then marks flags that are new
    """

    prog: str
    description: str
    config: type[Config]
    recipes: dict[str, Callable[[], Config]]
    original: bool = False


def parse_args(command: Command[Config], argv: list[str]) -> tuple[Config, set[str]]:
    """Parse command-line words to the checked configuration and the names of the flags that were set anywhere.

    Exits with status 2 and one line on a wrong flag (argparse); raises ValueError on a wrong value or configuration file.
    """
    words = [canonical(word, command) for word in argv]
    return configuration(command, vars(build_parser(command).parse_args(words)))


def configuration(command: Command[Config], given: dict) -> tuple[Config, set[str]]:
    """The checked configuration and the names of the flags that were set anywhere, from what build_parser's parser returned.

    Raises ValueError on a wrong value or configuration file.
    """
    recipe, config_file = given.pop("recipe", None), given.pop("config", None)
    config, explicit = command.config(), set[str]()
    if recipe is not None:
        config = command.recipes[recipe]()
        explicit = config.changed()
    layers = [read_config_file(config_file, command)] if config_file is not None else []
    for layer in [*layers, given]:
        layer = {name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}
        config, explicit = config.updated(layer), explicit | layer.keys()
    return config.completed(explicit).check(), explicit


class _Parser(argparse.ArgumentParser):
    """Names the flag that was meant by one that does not exist."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1) if unknown else []
        super().error(message + (f"; did you mean {near[0]}?" if near else ""))


def build_parser(command: Command) -> argparse.ArgumentParser:
    """An argparse parser with one argument group per section; its result holds only the flags that were given."""
    parser = _Parser(
        prog=command.prog,
        description=command.description,
        epilog="Flags take _ or - and any unambiguous beginning."
        + (" (new) marks flags the original does not have." if command.original else ""),
        # Which flags were given must be known: defaults that depend on other flags fill in the rest.
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    new = " (new)" if command.original else ""
    if command.recipes:
        named = (": ".join(filter(None, (name, _summary(recipe)))) for name, recipe in command.recipes.items())
        text = f"start from a named run{new}. {'; '.join(named)}".replace("%", "%%")
        parser.add_argument("--recipe", choices=list(command.recipes), help=text)
    parser.add_argument(
        "--config", metavar="FILE.yaml", type=home_path, help=f"read flags from a file of `flag: value` lines{new}"
    )
    for name, kind in command.config.sections().items():
        group = parser.add_argument_group(_summary(kind) or name)
        for f in fields(kind):
            _add_flag(group, f, command.original)
    return parser


def _summary(documented: object) -> str:
    """The first line of a docstring, without its full stop; empty where there is none (python -OO)."""
    line = (inspect.getdoc(documented) or "").partition("\n")[0].rstrip(".")
    # A dataclass without a docstring is given its signature for one.
    return "" if line.startswith(f"{getattr(documented, '__name__', '')}(") else line


def _add_flag(group, f: Field, mark_new: bool) -> None:
    meta = f.metadata
    words = [meta["help"]]
    if meta["unit"]:
        words.append(f"[{meta['unit']}]")
    if f.default is not None and meta["type"] is not bool:
        words.append(f"(default: {f.default!r})")
    if meta["new"] and mark_new:
        words.append("(new)")
    text = " ".join(words).replace("%", "%%")
    if meta["type"] is not bool:
        # No `choices` here: words are checked with the configuration (check_words), whether they come from flags or a file.
        metavar = f"{{{','.join(meta['choices'])}}}" if meta["choices"] else meta["type"].__name__.upper()
        several = {"nargs": "+"} if meta["several"] else {}
        group.add_argument(f"--{f.name}", type=meta["type"], help=text, metavar=metavar, **several)
        return
    group.add_argument(f"--{f.name}", action="store_true", help=f"{text} (default: {_switch(f.default)})")
    if negative := _negative(f):
        group.add_argument(f"--{negative}", dest=f.name, action="store_false", help=f"the opposite of --{f.name}")


def _negative(f: Field) -> str:
    """Name of the flag that turns a switch off, in the original's spelling; empty for other flags and for switches that are
    off by default."""
    return "" if f.metadata["type"] is not bool or f.default is False else f.metadata["negative"] or f"no_{f.name}"


def _switch(default: object) -> str:
    """A switch's default in words; None: another flag or the machine decides, and the help says how."""
    return "see above" if default is None else "on" if default else "off"


def canonical(word: str, command: Command) -> str:
    """A word with its flag in full: --local-rank=3 -> --local_rank=3."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    flags = command.config.flags()
    exact = {*flags, *map(_negative, flags.values())}
    known = {n for f in flags.values() if not f.metadata["new"] for n in (f.name, _negative(f)) if n}
    # A beginning that is unambiguous among the original's flags means that flag: new flags must not break old command lines.
    original = [n for n in known if n.startswith(name)]
    if len(original) == 1 and name not in exact and not name.startswith("no_"):
        name = original[0]
    return f"--{name}{equals}{value}"


def read_config_file(path: str, command: Command) -> dict:
    """Flags from a YAML file.  Raises ValueError naming the file and the line that is no flag or has the wrong type."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold `flag: value` lines")
    known = command.config.flags()
    return {name: _typed(path, name, value, known) for name, value in values.items()}


def _typed(path: str, name: str, value, known: dict[str, Field]):
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"config: {path}: {name} is no flag{f'; did you mean {near[0]}?' if near else ''}")
    meta = known[name].metadata
    if value is None and known[name].default is None:
        return None
    if meta["several"] and isinstance(value, list):
        return tuple(_one(path, name, entry, meta) for entry in value)
    one = _one(path, name, value, meta)
    return (one,) if meta["several"] else one


def _one(path: str, name: str, value, meta):
    wanted = meta["type"]
    # YAML reads 1e-5 as a word, and 8 as an integer.
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)
    # Exactly this type: a bool is an int to isinstance.
    if type(value) is not wanted:
        expected = in_words(meta["choices"]) if meta["choices"] else wanted.__name__
        raise ValueError(f"config: {path}: {name}: got {value!r}, expected {expected}")
    return value
