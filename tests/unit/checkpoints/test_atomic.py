"""Files that the product writes whole: real kills in the middle of each kind, full disks, and who may write at all."""

import ast
import errno
import json
import os
import resource
import signal
import stat
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import mimir_fast
from mimir_fast.analyze.entries import write_json
from mimir_fast.checkpoints.atomic import append_text, in_place_when_done, move, remove_temporaries, write_atomically
from mimir_fast.checkpoints.export import export_robustbench, export_timm
from mimir_fast.checkpoints.folder import save_checkpoint
from mimir_fast.checkpoints.run_state import Position, open_folder
from mimir_fast.checkpoints.trained_models import load_classifier
from mimir_fast.config.analysis import AnalyzeConfig
from mimir_fast.evaluate.records import Record, Results
from mimir_fast.models import create_classifier
from mimir_fast.objectives.reconstruction import PretrainOutput
from mimir_fast.report import page
from mimir_fast.report.samples import save_samples
from mimir_fast.training.logs import drop_lines

LIMIT = 100  # bytes: a write beyond them is where the kernel kills the process
WRITERS = {}  # name of the file -> the function (folder, version) that writes it


def writes(name: str):
    return lambda function: WRITERS.setdefault(name, function)


@writes("checkpoint-0.pth")
def _checkpoint(folder: Path, version: int) -> None:
    save_checkpoint(folder / "checkpoint-0.pth", {"model": {"w": torch.full((500,), float(version))}})


@writes("config.yaml")
def _config(folder: Path, version: int) -> None:
    open_folder(folder, {f"flag{number}": version for number in range(50)}, Position())


@writes("record.npz")
def _record(folder: Path, version: int) -> None:
    Record(folder / "record.npz", np.arange(version, version + 500)).save()


@writes("results.json")
def _results(folder: Path, version: int) -> None:
    results = Results(folder, {"model": {"hash": "m" * 80}, "images": {"hash": "i" * 80}})
    results.data["checks"] = [version]
    results.save()


@writes("metrics.jsonl")
def _metrics(folder: Path, version: int) -> None:
    path = folder / "metrics.jsonl"
    if not path.exists():
        path.write_text("".join(json.dumps({"update": number}) + "\n" for number in range(50)))
    drop_lines(path, "update", 45 - version)


@writes("report.html")
def _page(folder: Path, version: int) -> None:
    page.write_page(folder / "report.html", f"title {version}", "lead", [])


@writes("loss.png")
def _picture(folder: Path, version: int) -> None:
    figure = Figure()
    figure.subplots().plot([0, version])
    page.picture(folder, "loss", figure, "a caption")


@writes("samples.npz")
def _samples(folder: Path, version: int) -> None:
    images, ids = torch.full((2, 3, 8, 8), 0.25 * version), torch.zeros(2, 1, dtype=torch.long)
    nothing = torch.zeros(())
    output = PretrainOutput(nothing, nothing, nothing, nothing, images, torch.zeros(2, 1, 48), ids)
    save_samples(folder / "samples.npz", images, output, 4, False, None, None, {"update": version})


@writes("analysis.json")
def _analysis(folder: Path, version: int) -> None:
    write_json(folder / "analysis.json", AnalyzeConfig(), [{"epoch": version}], 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "vit.pth"
    torch.save(create_classifier("vit_nano", img_size=16, patch_size=8, num_classes=3).state_dict(), path)
    return load_classifier(str(path))


def killed_while(write) -> int:
    """Run write() in a forked process whose files may not grow beyond LIMIT; returns the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        write()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def check_kill(folder: Path, names: list[str], write) -> None:
    """write(version) leaves files `names`: a kill in the middle of version 2 leaves those of version 1, and temporaries."""
    write(1)
    before = {name: (folder / name).read_bytes() for name in names}
    assert killed_while(lambda: write(2)) == signal.SIGXFSZ
    left = {path.name for path in folder.iterdir()} - before.keys()
    assert left, "killed before it began"
    assert {name: (folder / name).read_bytes() for name in names} == before
    remove_temporaries(folder)
    assert {path.name for path in folder.iterdir()} == before.keys()
    write(2)
    assert {name: (folder / name).read_bytes() for name in names} != before


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_in_the_middle_leaves_the_previous_file(tmp_path, name):
    check_kill(tmp_path, [name], lambda version: WRITERS[name](tmp_path, version))


@pytest.mark.parametrize(
    ("write", "names"), [(export_timm, ["a.safetensors", "a.json"]), (export_robustbench, ["a.pt", "a.py"])]
)
def test_a_kill_in_the_middle_of_an_export_leaves_the_previous_one(tmp_path, trained, write, names):
    def versioned(version: int) -> None:
        trained.model.head.bias.fill_(version)
        write(trained, *(tmp_path / name for name in names))

    check_kill(tmp_path, names, versioned)


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_an_exception_in_the_middle_leaves_the_previous_file_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("before")

    def write(file):
        file.write(b"half")
        raise error

    expected = f"output: could not write {path}: no space left" if isinstance(error, OSError) else None
    with pytest.raises(type(error), match=expected):
        write_atomically(path, write, "output")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_file_then_name_then_folder_are_on_the_disk_in_this_order(tmp_path, monkeypatch):
    seen = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        seen.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source, target):
        seen.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    folder = tmp_path / "new"
    write_atomically(folder / "a.txt", lambda file: file.write(b"whole"))
    assert seen == [str(folder / f"a.txt.{os.getpid()}.tmp"), "rename", str(folder)]
    seen.clear()
    move(folder / "a.txt", tmp_path / "aside" / "a.txt")
    assert seen == ["rename", *seen[1:]]
    assert set(seen[1:]) == {str(folder), str(tmp_path / "aside")}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_folders_that_cannot_be_synced_are_no_failure_but_a_broken_disk_is(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="could not write") if number == errno.EIO else nullcontext():
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"whole"))
    assert (tmp_path / "a.txt").read_bytes() == b"whole"


def test_appended_lines_are_on_the_disk_and_errors_name_flag_and_file(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "log.txt"
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_text()) or fsync(file))
    append_text(path, "ä\n")
    append_text(path, "b\n")
    assert synced == ["ä\n", "ä\nb\n"]
    with pytest.raises(OSError, match=r"log_dir: could not write .*absent"):
        append_text(tmp_path / "absent" / "log.txt", "c\n", "log_dir")


def test_temporary_files_are_recognised_whatever_their_suffix(tmp_path):
    finished = ["a.pth", "a.tmp.d.txt", "notes.tmpl", "tmp.pth"]
    for name in finished:
        (tmp_path / name).write_bytes(b"x")
    for name, suffix in (("a.safetensors", ".safetensors"), ("b.pth", ".tmp")):
        with in_place_when_done(tmp_path / name, keep_suffix=name == "a.safetensors") as (temporary,):
            temporary.write_bytes(b"half")
            assert temporary.suffix == suffix
            remove_temporaries(tmp_path)
            assert sorted(path.name for path in tmp_path.iterdir()) == finished
            temporary.write_bytes(b"whole")
        (tmp_path / name).unlink()


def test_nothing_else_in_the_product_writes_whole_files():
    """Appending to JSON lines is the exception; a cut line is skipped when it is read."""
    root, offenders = Path(mimir_fast.__file__).parent, []
    for path in root.rglob("*.py"):
        if path.name == "atomic.py":
            continue
        tree = ast.parse(path.read_text())
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
        replaced = [block for block in blocks if "in_place_when_done" in ast.unparse(block.items[0])]
        allowed = {node for block in replaced for node in ast.walk(block)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _writes(node) and node not in allowed:
                offenders.append(f"{path.relative_to(root)}:{node.lineno} {ast.unparse(node)}")
    assert not offenders


def _writes(call: ast.Call) -> bool:
    """Whether a call looks like one that writes or renames a file by its own means."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name == "open":
        return any(isinstance(word, ast.Constant) and word.value in ("w", "wb", "x", "xb") for word in call.args)
    if name == "replace" and ast.unparse(call.func) == "os.replace":
        return True
    # str.replace takes two arguments, Path.replace one
    if name in ("replace", "rename"):
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
    to_file = call.args and isinstance(call.args[0], ast.Name) and call.args[0].id == "file"
    return name in ("write_text", "write_bytes", "savefig", "savez", "savez_compressed") and not to_file


def test_a_file_system_without_fsync_is_written_to_all_the_same(tmp_path, monkeypatch):
    """Planted: EINVAL of a file's fsync goes through (FUSE); EIO, a disk that fails, still does."""

    def refuse(number):
        def fsync(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    write_atomically(tmp_path / "a.txt", lambda file: file.write(b"whole"))
    append_text(tmp_path / "a.txt", "\nmore")
    assert (tmp_path / "a.txt").read_text() == "whole\nmore"
    refuse(errno.EIO)
    for write in (
        lambda: write_atomically(tmp_path / "a.txt", lambda file: None),
        lambda: append_text(tmp_path / "a.txt", "x"),
    ):
        with pytest.raises(OSError, match="Input/output error"):
            write()
    assert (tmp_path / "a.txt").read_text() == "whole\nmore"
