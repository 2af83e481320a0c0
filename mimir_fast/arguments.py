"""The command line, generated from the dataclasses of config.py.

Flags may be written with `_` or `-`, and shortened to any unambiguous beginning, as the original's argparse allows.
Values come from, in rising order: defaults, --recipe, --config, flags.
"""

import argparse
import contextlib
import difflib
from dataclasses import fields
from pathlib import Path

import yaml

from mimir_fast.config import STAGES, PretrainConfig
from mimir_fast.recipes import RECIPES


def parse_pretrain_args(argv: list[str]) -> tuple[PretrainConfig, set[str]]:
    """Command-line words -> the checked configuration, and the names of the flags that were set anywhere.

    Exits with status 2 and one line on a wrong flag (argparse); raises ValueError on a wrong value or configuration file.
    """
    return configuration(vars(build_parser().parse_args([canonical(word) for word in argv])))


def configuration(given: dict) -> tuple[PretrainConfig, set[str]]:
    """What build_parser's parser found -> the checked configuration, and the names of the flags that were set anywhere.

    Raises ValueError on a wrong value or configuration file.
    """
    recipe, config_file = given.pop("recipe", None), given.pop("config", None)
    config, explicit = PretrainConfig(), set()
    if recipe is not None:
        config = RECIPES[recipe]()
        explicit = {name for name, value in config.flat().items() if value != PretrainConfig().flat()[name]}
    layers = [read_config_file(config_file)] if config_file is not None else []
    for layer in [*layers, given]:
        config, explicit = config.updated(layer), explicit | layer.keys()
    return config.check(), explicit


def build_parser(
    prog: str = "mimir-fast pretrain",
    description: str = "MIMIR pre-training: a masked autoencoder sees adversarial images and reconstructs the clean ones.",
) -> argparse.ArgumentParser:
    """One argument group per stage; every default is left out of the result, so that only given flags appear in it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog="Flags take _ or - and any unambiguous beginning. (new) marks flags the original does not have.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=120),
    )
    summaries = "; ".join(f"{name}: {recipe.__doc__.splitlines()[0]}" for name, recipe in RECIPES.items())
    parser.add_argument(
        "--recipe", choices=list(RECIPES), help=f"start from a named run (new). {summaries.replace('%', '%%')}"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read flags from a file of `flag: value` lines (new)")
    for kind in STAGES.values():
        group = parser.add_argument_group(kind.__doc__.strip().rstrip("."))
        for f in fields(kind):
            _add_flag(group, f)
    return parser


def _add_flag(group, f) -> None:
    meta = f.metadata
    words = [meta["help"]]
    if meta["unit"]:
        words.append(f"[{meta['unit']}]")
    if f.default is not None and meta["type"] is not bool:
        words.append(f"(default: {f.default!r})")
    if meta["new"]:
        words.append("(new)")
    text = " ".join(words).replace("%", "%%")
    if meta["type"] is not bool:
        kwargs = {"choices": list(meta["choices"])} if meta["choices"] else {"metavar": meta["type"].__name__.upper()}
        group.add_argument(f"--{f.name}", type=meta["type"], help=text, **kwargs)
        return
    group.add_argument(f"--{f.name}", action="store_true", help=f"{text} (default: {_switch(f.default)})")
    if f.default is not False:  # a pair, with the original's spelling of the negative
        group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=f"the opposite of --{f.name}")


def _switch(default: bool | None) -> str:
    return {True: "on", False: "off", None: "see above"}[default]


def canonical(word: str) -> str:
    """--local-rank=3 -> --local_rank=3; a beginning shared by one original flag means that flag, whatever is new."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    flags = [f for kind in STAGES.values() for f in fields(kind)]
    original = [f.name for f in flags if not f.metadata["new"] and f.name.startswith(name)]
    if len(original) == 1 and name not in {f.name for f in flags} and not name.startswith("no_"):
        name = original[0]
    return f"--{name}{equals}{value}"


def read_config_file(path: str) -> dict:
    """Flags from a YAML file.  Raises ValueError naming the file and the line that is no flag or has the wrong type."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config: {path} must hold `flag: value` lines")
    known = {f.name: f for kind in STAGES.values() for f in fields(kind)}
    return {name: _typed(path, name, value, known) for name, value in values.items()}


def _typed(path: str, name: str, value, known: dict):
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        raise ValueError(f"config: {path}: {name} is no flag{f'; did you mean {near[0]}?' if near else ''}")
    wanted, choices = known[name].metadata["type"], known[name].metadata["choices"]
    if value is None and known[name].default is None:
        return None
    if wanted is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # reported below
            value = float(value)  # YAML reads 1e-5 as a word
    if type(value) is not wanted or (choices and value not in choices):
        expected = " or ".join(choices) if choices else wanted.__name__
        raise ValueError(f"config: {path}: {name}: got {value!r}, expected {expected}")
    return value
