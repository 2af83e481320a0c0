"""What is read from files: whose parameters are taken, what belongs to a run, and what a file that is none is called."""

import argparse
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mimir_fast
from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.reader import Contents, read

W, AVERAGE = {"w": torch.zeros(2)}, {"w": torch.ones(2)}


def contents(path, state) -> Contents:
    torch.save(state, path)
    return read(path, "checkpoint")


@pytest.mark.parametrize("entry", ["model", "model_state_dict", "state_dict"])
def test_parameters_and_what_else_a_file_holds(tmp_path, entry):
    found = contents(
        tmp_path / "a.pth", {entry: W, "epoch": 3, "args": argparse.Namespace(eps=0.03), "optimizer": {"state": {}}}
    )
    assert torch.equal(found.tensors["w"], W["w"])
    assert (found.entry, found.source, found.epoch, found.args) == (entry, str(tmp_path / "a.pth"), 3, {"eps": 0.03})
    assert found.state.keys() == {"model", entry, "epoch", "args", "optimizer"}
    assert found.state["model"]["w"] is found.tensors["w"]


def test_the_average_is_taken_but_training_goes_on_from_the_parameters(tmp_path):
    found = contents(tmp_path / "a.pth", {"model": W, "model_ema": AVERAGE})
    assert torch.equal(found.tensors["w"], AVERAGE["w"])
    assert found.source == f"{tmp_path / 'a.pth'} (model_ema)"
    assert torch.equal(found.state["model"]["w"], W["w"])
    assert torch.equal(found.state["model_ema"]["w"], AVERAGE["w"])


@pytest.mark.parametrize("empty", [None, {}, {"counter": 3}])
def test_an_entry_without_parameters_is_absent(tmp_path, empty):
    found = contents(tmp_path / "a.pth", {"model_ema": empty, "model": W})
    assert found.entry == "model"
    assert torch.equal(found.tensors["w"], W["w"])


@pytest.mark.parametrize("legacy", [True, False])
def test_bare_state_dicts(tmp_path, legacy):
    torch.save(W, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    found = read(tmp_path / "a.pth", "resume")
    assert found.tensors.keys() == {"w"}
    assert (found.args, found.epoch) == ({}, None)
    assert found.state.keys() == {"model"}


def test_a_safetensors_by_its_content(tmp_path):
    save_file(W, tmp_path / "a.bin", {"mimir_fast": '{"dataset": "cifar10"}'})
    found = read(tmp_path / "a.bin", "resume")
    assert torch.equal(found.state["model"]["w"], W["w"])
    assert found.args == {"dataset": "cifar10"}
    torch.save(W, tmp_path / "a.safetensors")
    assert torch.equal(read(tmp_path / "a.safetensors", "resume").tensors["w"], W["w"])


def test_prefixes_of_wrappers_and_what_is_no_parameter(tmp_path):
    state = {"module.base_model.w": W["w"], "_orig_mod.module.v": W["w"], "steps": 3, 4: W["w"]}
    assert contents(tmp_path / "a.pth", {"model": state}).tensors.keys() == {"w", "v"}


def test_urls_are_fetched_once_and_told_apart(tmp_path, monkeypatch):
    fetched = []

    def download(url, path):
        fetched.append(url)
        torch.save({"model": {"url": torch.tensor([len(fetched)])}}, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    urls = [f"https://example.org/{run}/checkpoint-99.pth" for run in "ab"]
    seen = [int(read(url, "resume").tensors["url"]) for url in (*urls, *urls)]
    assert seen == [1, 2, 1, 2]
    assert fetched == urls
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("should-not-exist",))


def torchscript(path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(path)


def truncated(path) -> None:
    torch.save(W, path)
    os.truncate(path, path.stat().st_size // 2)


REFUSALS = {
    "code": (lambda p: torch.save({"model": W, "args": Evil()}, p), ["is refused", "posix.mkdir", "plain values"]),
    "a pickle with code": (lambda p: p.write_bytes(pickle.dumps({"model": Evil()}, protocol=2)), ["is refused"]),
    "a module": (lambda p: torch.save(torch.nn.Linear(1, 1), p), ["is refused", "torch.nn.modules.linear.Linear"]),
    "half a zip": (lambda p: p.write_bytes(b"PK\x03\x04 not a zip"), ["is damaged"]),
    "truncated": (truncated, ["is damaged", "failed finding central directory"]),
    "half a .safetensors": (lambda p: p.write_bytes(b"\x10" + bytes(7) + b'{"w":'), ["is damaged"]),
    "text": (lambda p: p.write_text("hello there"), ["is damaged or no checkpoint"]),
    "control codes": (lambda p: p.write_bytes(b"\x1b[31mred"), ["is refused", "no checkpoint"]),
    "empty": (lambda p: p.touch(), ["is empty"]),
    "a web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>Quota exceeded</html>"), ["is an HTML page"]),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), ["is a Git LFS"]),
    "TorchScript": (torchscript, ["is a TorchScript archive", "state_dict"]),
    "a zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "x"), ["is a zip archive, but no checkpoint"]),
    "no parameters": (lambda p: torch.save({"weights": 1}, p), ["no 'model' entry", "no parameters"]),
    "a list": (lambda p: torch.save([1], p), ["holds list, expected a dictionary"]),
    "a folder": (lambda p: p.mkdir(), ["is a folder"]),
    "nothing": (lambda p: None, ["no file"]),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("flag", ["resume", "finetune"])
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path, monkeypatch, name, flag):
    """Without control codes, and without a library's advice to switch its safety off."""
    content, words = REFUSALS[name]
    path = tmp_path / "given.pth"
    content(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as error:
        read(path, flag)
    text = str(error.value)
    assert text.startswith(f"{flag}: ")
    assert all(word in text for word in ["given.pth", *words])
    assert text.isprintable()
    assert "weights_only" not in text
    assert not (tmp_path / "should-not-exist").exists()


def test_a_file_that_was_fetched_damaged_can_be_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: Path(path).write_text("<html>"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"^resume: https://example.org/a.pth is an HTML page.*; remove "
    ) as error:
        read("https://example.org/a.pth", "resume")
    (copy,) = (tmp_path / "checkpoints").iterdir()
    assert str(copy) in str(error.value)


def test_nothing_else_in_the_product_reads_parameters():
    """Else a file would be read in one place and refused in another."""
    root = Path(mimir_fast.__file__).parent
    words = re.compile(r"\b(torch\.load|safe_open|load_file|load_state_dict_from_url|pickle\.loads?)\(")
    readers = {str(path.relative_to(root)) for path in root.rglob("*.py") if words.search(path.read_text())}
    # the text of an exported file, which does without this package
    assert readers == {"checkpoints/formats.py", "checkpoints/unpickling.py", "checkpoints/robustbench.py"}
