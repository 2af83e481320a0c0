"""The house: every operation in its place, references without Triton, declared dependencies."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# the environment's packages; -S leaves out the hooks of an editable installation
SITE = [path for path in sys.path if path.endswith("site-packages")]
OPS = sorted(p.parent.name for p in (ROOT / "kernels").glob("*/op.py"))


def tracked_files() -> list[str]:
    """What the repository holds; without git, all Python files."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    return names or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py")]


def test_every_operation_has_its_files_and_its_function():
    assert OPS
    folders = sorted(p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and not p.name.startswith("_"))
    assert folders == OPS
    for op in OPS:
        for name in ("reference.py", "kernel.py"):
            assert (ROOT / "kernels" / op / name).exists(), (op, name)
        assert (ROOT / "tests" / "kernels" / f"test_{op}.py").exists(), op
        module = importlib.import_module(f"mimir_fast.kernels.{op}.op")
        doc = getattr(module, op).__doc__
        for line in ("formula", "shapes", "dtypes", "bytes", "determinism", "source"):
            assert re.search(rf"^    {line}  ", doc, re.MULTILINE), (op, line)


def test_nothing_is_loose_at_the_top():
    assert [path.name for path in (ROOT / "mimir_fast").glob("*.py")] == ["__init__.py"]


def test_tests_mirror_the_package():
    """tests/unit/X tests mimir_fast/X; what is tested as a whole, in tests/runs, has no folder of its own."""
    whole = {"demo", "finetune", "pretrain"}
    rooms = {path.parent.name for path in (ROOT / "mimir_fast").glob("*/__init__.py")} - {"kernels"}
    tested = {path.parent.name for path in (ROOT / "tests" / "unit").glob("*/test_*.py")}
    assert tested == rooms - whole
    for room in tested:
        modules = [path.read_text() for path in (ROOT / "tests" / "unit" / room).glob("test_*.py")]
        assert any("pytestmark" not in text for text in modules), f"make test-fast leaves all of {room} out"


def test_no_tracked_file_is_over_a_megabyte():
    for name in tracked_files():
        assert (ROOT / name).stat().st_size <= 2**20, name


def test_every_operation_is_in_the_benchmark():
    from bench.kernels.cases import OPS as BENCHED

    assert sorted(BENCHED) == OPS


def test_references_import_with_triton_blocked():
    modules = [f"mimir_fast.kernels.{op}.reference" for op in OPS] + [
        "mimir_fast.models",
        "mimir_fast.attacks.pgd_mae",
        "mimir_fast.objectives.information",
    ]
    code = f"""
import sys
sys.modules["triton"] = None  # any import of it fails
for module in {modules!r}:
    __import__(module)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_refuse_their_bare_name():
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "mimir_fast.kernels" in done.stderr


def test_dependencies_are_declared_and_justified():
    declared = re.search(r"^dependencies = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)[
        1
    ]
    names = set(re.findall(r'"([\w-]+)', declared))
    text = (ROOT / "docs" / "dependencies.md").read_text()
    assert names == set(re.findall(r"^\| `([\w-]+)` \| required", text, re.MULTILINE))
    imported = set()
    for source in [*ROOT.glob("mimir_fast/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", source.read_text(), re.MULTILINE))
    third_party = (
        imported - set(sys.stdlib_module_names) - {"mimir_fast", "wandb", "flash_attn", "xformers", "pyautoattack"}
    )
    provides = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
    assert third_party <= {provides.get(name, name) for name in names} | {"triton"}


def test_text_files_are_utf_8_whatever_the_locale():
    """Planted: a read_text() without encoding, which reads by LC_ALL."""
    offenders = []
    for path in (ROOT / "mimir_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _opens_text(node) and not any(k.arg == "encoding" for k in node.keywords):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not offenders


def _opens_text(call: ast.Call) -> bool:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr in ("read_text", "write_text")
    modes = [
        a.value
        for a in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
        if isinstance(a, ast.Constant)
    ]
    return isinstance(call.func, ast.Name) and call.func.id == "open" and "b" not in "".join(map(str, modes))
