"""What users install: a wheel with the package alone, and the documented commands from inside and from outside of a clone."""

import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench.__main__ import VERBS
from tests.support.documented import CHECK, fenced, named_commands
from tests.test_layout import ROOT, SITE, tracked_files

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of a wheel without extras, and of a CPU's torch.
EXTRAS = ("pyautoattack", "wandb", "flash_attn", "xformers", "triton")
# Programs that a documented command calls, each of which writes down its words.
RECORDER = """#!{python} -S
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""
# The package alone: what it needs is there, and no registry is asked.
PIP = """#!/bin/sh
exec {python} -m pip --python {env} "$@" --no-deps --no-index --no-build-isolation --disable-pip-version-check
"""


def made(command: list, **options) -> str:
    """What a command prints; it must end with status 0."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git has of the working tree."""
    folder = tmp_path_factory.mktemp("clone")
    for name in [*tracked_files(), "README.md", "LICENSE", "pyproject.toml", "setup.py", "Makefile"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink() and not (folder / name).is_symlink():
            (folder / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file() and not name.startswith(("tests/golden/", ".")):
            (folder / name).write_bytes((ROOT / name).read_bytes())
            (folder / name).chmod((ROOT / name).stat().st_mode)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    made([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(clone)])
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mimir_fast"}
    for source in ROOT.glob("mimir_fast/**/*.py"):
        assert str(source.relative_to(ROOT)) in names
    for source in ROOT.glob("kernels/**/*.py"):
        assert f"mimir_fast/{source.relative_to(ROOT)}" in names
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "mimir-fast = mimir_fast.cli:main" in zipfile.ZipFile(wheel).read(entry).decode()
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = re.findall(r"pip install '(?:\.|mimir-fast)\[([\w-]+)\]'", text)
    assert "eval" in named
    for extra in ("flash-attn", "xformers", "dev", "wandb", *named):
        assert f"Provides-Extra: {extra}" in metadata


def program(path: Path, text: str, **names) -> None:
    """An executable script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.format(**names))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory) -> tuple[Path, list[list[str]]]:
    """An environment of its own, after the README's commands were typed in the clone; and what they called."""
    folder = tmp_path_factory.mktemp("installed")
    env, calls, typed = folder / "env", folder / "calls", folder / "programs"
    made([sys.executable, "-m", "venv", "--without-pip", str(env)])
    (site,) = env.glob("lib/python*/site-packages")
    # The packages that ours needs; a .pth within these folders, such as that of an editable installation, is not read.
    (site / "needed.pth").write_text("\n".join(SITE))
    names = {"python": sys.executable, "env": env / "bin" / "python"}
    program(typed / "pip", PIP, **names)
    for path in (
        typed / "torchrun",
        typed / "mimir-fast",
        *(clone / ".venv" / "bin" / n for n in ("python", "mimir-fast")),
    ):
        program(path, RECORDER, **names)
    # `make` has installed already.
    (clone / ".venv" / ".installed").touch()
    environment = os.environ | {"PATH": os.pathsep.join([str(typed), os.environ["PATH"]]), "CALLS": str(calls)}
    for line in fenced(ROOT / "README.md", "bash"):
        made(["bash", "-ec", line], cwd=clone, env=environment)
    return env, [json.loads(line) for line in calls.read_text().splitlines()]


@pytest.mark.slow
def test_the_readmes_commands_call_what_they_promise(installed):
    """Planted: a target of make that does not exist, a script that is not there."""
    called = [" ".join(call[:4]) for call in installed[1]]
    assert called[:2] == ["mimir-fast demo --output_dir runs/demo", "python -m pytest -n"]
    assert [words.split()[0] for words in called[2:]] == ["torchrun", "torchrun", "torchrun", "mimir-fast"]


@pytest.mark.slow
def test_what_installing_and_running_leave_is_not_linted(installed, clone):
    """Planted: no extend-exclude."""
    for folder in ("build/lib", "runs/demo"):
        (clone / folder).mkdir(parents=True, exist_ok=True)
        (clone / folder / "exported.py").write_text("import os,sys\n")
    made([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=clone)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_documented_commands_from_inside_and_outside_of_a_clone(installed, clone, tmp_path, where):
    """Every command of the README and the documents with its flags, and the README's snippet; from outside without extras.

    Planted: the wheel, or the clone, without mimir_fast.kernels; a flag that does not exist in README, docs or an example.
    """
    env, calls = installed
    lines = [line.replace("SEED", "0") for page in PAGES for line in fenced(page, "bash")]
    calls = [*calls, *(shlex.split(line, comments=True) for line in lines), *named_commands(PAGES)]
    inside = where == "inside"
    calls += [["python", "-m", "bench", verb] for verb in VERBS]
    calls = [c for c in calls if "mimir" in " ".join(c[:5]) or (inside and c[1:3] == ["-m", "bench"])]
    asked = {"calls": calls, "snippets": fenced(ROOT / "README.md", "python"), "absent": [] if inside else EXTRAS}
    words = [str(env / "bin" / "python"), "-c", CHECK, json.dumps(asked)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    at = clone if inside else tmp_path
    done = subprocess.run(words, cwd=at, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["failed"] == []
    assert told["checked"] > 30
    assert Path(told["package"]).is_relative_to(clone if inside else env)
    assert "usage: mimir-fast VERB" in made([str(env / "bin" / "mimir-fast"), "-h"], cwd=at)
