"""Files of other trainers: every prefix, mark, entry and side entry that parameters come with; checksums; damaged bytes."""

import argparse
import collections
import contextlib
import datetime
import enum
import json
import os
import pathlib
import random
import subprocess
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.export import export_timm
from mimir_fast.checkpoints.folder import read_newest
from mimir_fast.checkpoints.reader import read
from mimir_fast.checkpoints.run_state import find_state
from mimir_fast.checkpoints.trained_models import load_classifier
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.models import create_classifier
from mimir_fast.models.families.vit import VIT
from mimir_fast.training.pretrained_start import start_from_pretrained

SIZE = {"img_size": 16, "patch_size": 4}
W, V, AVERAGE = {"w": torch.zeros(2), "a.b": torch.ones(3)}, {"w": torch.ones(2)}, {"w": torch.full((2,), 7.0)}


@pytest.fixture(scope="module", autouse=True)
def _nano():
    """A named architecture that is quick to build."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT.sizes, "vit_nano", {"embed_dim": 24, "depth": 2, "num_heads": 3})
        yield


@pytest.fixture(scope="module")
def classifier(_nano):
    torch.manual_seed(3)
    return create_classifier("vit_nano", num_classes=7, **SIZE).eval()


def saved(path, state):
    torch.save(state, path)
    return path


# ---- prefixes and marks

PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "model._orig_mod.",
    "module.model.",
    "backbone.",
    "encoder.",
    "1.",
    "net.0.x.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_that_all_parameters_share(tmp_path, classifier, prefix):
    """Evaluated, fine-tuned from and resumed like the bare file."""
    state = {prefix + name: tensor for name, tensor in classifier.state_dict().items()}
    path = saved(tmp_path / "p.pth", {"state_dict": state})
    assert torch.equal(load_classifier(path).model.head.weight, classifier.head.weight)
    _, resumed = find_state(str(path), None, print)
    assert resumed["model"].keys() == classifier.state_dict().keys()
    fresh = create_classifier("vit_nano", num_classes=3, **SIZE)
    start_from_pretrained(fresh, FinetuneConfig().updated({"finetune": str(path)}), lambda line: None)
    assert torch.equal(fresh.blocks[1].mlp.fc1.weight, classifier.blocks[1].mlp.fc1.weight)


def test_marks_of_wrappers_anywhere_in_the_names(tmp_path, classifier):
    """As compiled blocks, FSDP and activation checkpointing leave them."""
    wrapped = create_classifier("vit_nano", num_classes=7, **SIZE)
    wrapped.load_state_dict(classifier.state_dict())
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0])
    wrapped.blocks[1].mlp = checkpoint_wrapper(wrapped.blocks[1].mlp)
    state = {f"_fsdp_wrapped_module.{name}": tensor for name, tensor in wrapped.state_dict().items()}
    state |= {"blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module.x": torch.zeros(2)}
    held = read(saved(tmp_path / "w.pth", state), "checkpoint").tensors
    assert held.keys() == {*classifier.state_dict(), "blocks.1.x"}


def test_the_prefix_is_found_beside_heads_of_other_trainers(tmp_path):
    state = {
        "backbone.cls_token": torch.zeros(2),
        "backbone.norm.bias": torch.zeros(2),
        "head.mlp.weight": torch.zeros(2),
    }
    assert read(saved(tmp_path / "d.pth", {"teacher": state}), "finetune").tensors.keys() == {
        "cls_token",
        "norm.bias",
        "head.mlp.weight",
    }


# ---- entries

AVERAGES = (
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema",
    "ema_model",
    "params_ema",
    "swa_model",
    "teacher",
    "averaged",
)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("raw", ["model", "state_dict", "net", "my_weights"])
@pytest.mark.parametrize("inner", [None, "state_dict", "module"])
def test_an_average_is_preferred_and_said_under_every_usual_name(tmp_path, average, raw, inner):
    held = AVERAGE if inner is None else {inner: AVERAGE, "decay": 0.99}
    found = read(saved(tmp_path / "a.pth", {raw: V, average: held, "epoch": 3}), "checkpoint")
    assert torch.equal(found.tensors["w"], AVERAGE["w"])
    assert found.source == f"{tmp_path / 'a.pth'} ({average})"
    assert found.notes == [
        f"{tmp_path / 'a.pth'} holds parameters as {average}, {raw}: {average}, an average, is taken"
    ]
    assert torch.equal(found.state["model"]["w"], V["w"])
    assert torch.equal(found.state["model_ema"]["w"], AVERAGE["w"])


def test_an_average_beside_the_parameters_under_two_prefixes(tmp_path):
    """As Lightning's and other modules that keep their own average save it."""
    state = {f"online.{name}": tensor for name, tensor in V.items()} | {
        "ema_model.w": AVERAGE["w"],
        "initted": torch.tensor(True),
    }
    found = read(saved(tmp_path / "a.pth", {"state_dict": state}), "checkpoint")
    assert torch.equal(found.tensors["w"], AVERAGE["w"])
    assert torch.equal(found.state["model"]["w"], V["w"])
    assert found.source.endswith("(state_dict.ema_model)")


def test_counters_are_no_parameters(tmp_path, classifier):
    averaged = torch.optim.swa_utils.AveragedModel(classifier).state_dict() | {"decay": torch.tensor(0.99)}
    path = saved(tmp_path / "swa.pth", {"state_dict": averaged})
    assert torch.equal(load_classifier(path).model.head.weight, classifier.head.weight)


def test_the_only_entry_with_parameters_is_taken_whatever_its_name(tmp_path):
    assert read(saved(tmp_path / "a.pth", {"anything": W, "epoch": 3}), "checkpoint").tensors.keys() == W.keys()
    with pytest.raises(CheckpointError, match=r"no parameters; it holds one, two"):
        read(saved(tmp_path / "b.pth", {"one": W, "two": W}), "checkpoint")


def test_none_and_empty_entries_are_absent(tmp_path):
    state = {
        "model": W,
        "optimizer": None,
        "epoch": None,
        "scaler": {},
        "mimir_fast": None,
        "args": None,
        "model_ema": {},
    }
    found = read(saved(tmp_path / "a.pth", state), "resume")
    assert found.state.keys() == {"model"}
    assert (found.epoch, found.args, found.notes) == (None, {}, [])


# ---- side entries


class Colour(enum.Enum):
    RED = 1


class Config(dict):
    """As OmegaConf's, yacs's and others': a dictionary of its own class."""


def test_numbers_of_numpy_and_paths_are_read_as_pythons(tmp_path):
    args = argparse.Namespace(
        lr=np.float64(0.5), out=pathlib.Path("/a/b"), win=pathlib.PureWindowsPath("c:/x"), on=np.bool_(True)
    )
    state = {"model": W, "epoch": np.int64(7), "args": args, "many": collections.defaultdict(list, {"a": [1]})}
    found = read(saved(tmp_path / "a.pth", {**state, "last": collections.deque([1, 2])}), "checkpoint")
    assert found.args == {"lr": 0.5, "out": "/a/b", "win": "c:\\x", "on": True}
    assert (found.epoch, found.entries["many"], found.entries["last"]) == (7, {"a": [1]}, [1, 2])
    assert {type(value) for value in found.args.values()} == {float, str, bool}
    assert found.notes == []


def test_other_types_are_left_aside_by_name(tmp_path):
    args = argparse.Namespace(eps=0.5, colour=Colour.RED, when=datetime.date(2026, 1, 2))
    state = {"model": W, "args": args, "config": Config(a=1), "curve": np.zeros(3), "epochs": [1, np.zeros(2)]}
    found = read(saved(tmp_path / "a.pth", state), "checkpoint")
    assert found.args == {"eps": 0.5}
    assert found.entries.keys() == {"args"}
    (note,) = found.notes
    said: list[str] = []
    find_state(str(tmp_path / "a.pth"), None, said.append)
    assert said == [f"resume: {note}"]
    assert f"args.colour ({__name__}.Colour)" in note
    assert "args.when (datetime.date)" in note
    assert set(found.aside.values()) == {f"{__name__}.Colour", "datetime.date", f"{__name__}.Config", "numpy.ndarray"}


class Runs:
    def __reduce__(self):
        return (subprocess.run, (["touch", "should-not-exist"],))


class Asks:
    def __reduce__(self):
        return (eval, ("__import__('os').mkdir('should-not-exist')",))


@pytest.mark.parametrize("entry", [Runs(), Asks()], ids=["subprocess", "eval"])
def test_what_acts_on_the_machine_is_refused_with_the_whole_file(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is refused: it holds (commands\.run|eval)"):
        read(saved(tmp_path / "a.pth", {"model": W, "args": entry}), "checkpoint")
    assert not (tmp_path / "should-not-exist").exists()


def test_a_stand_in_never_calls_what_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.setattr(Colour, "__new__", lambda *_: pytest.fail("was called"))
    assert read(saved(tmp_path / "a.pth", {"model": W, "colour": Colour.RED}), "checkpoint").aside


# ---- models


def test_a_timm_start_and_a_timm_classifier(tmp_path):
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="token", **kwargs).eval()
    path = saved(tmp_path / "t.pth", theirs.state_dict())
    trained, images = load_classifier(path), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(trained.model(images), theirs(images), rtol=1e-5, atol=1e-5)
    said: list[str] = []
    config = FinetuneConfig().updated({"finetune": str(path)})
    start_from_pretrained(create_classifier("vit_nano", num_classes=3, **SIZE), config, said.append)
    assert any("does not say whether its training normalised images" in line for line in said)


FOREIGN = {
    "LayerScale": {"init_values": 1e-5},
    "normalised queries and keys": {"qk_norm": True},
    "a norm before the blocks": {"pre_norm": True},
    "register tokens": {"reg_tokens": 4},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_parameters_that_change_what_a_block_computes_are_an_error(name):
    kwargs = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, **FOREIGN[name]}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **kwargs)
    ours = create_classifier("vit_nano", num_classes=5, **SIZE)
    with pytest.raises(
        CheckpointError, match=r"another architecture.*unexpected parameter|no whole ViT|positional table"
    ):
        load_pretrained(ours, theirs.state_dict(), "x.pth", print, 0.02)


class Normalise(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_a_normalising_first_layer_is_read_and_survives_an_export(tmp_path, classifier, scale):
    """As robust-training packages build them: nn.Sequential(normalisation, model)."""
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    layer = Normalise([m * scale for m in mean], [s * scale for s in std])
    path = saved(tmp_path / "n.pth", nn.Sequential(layer, classifier).state_dict())
    trained, images = load_classifier(path), torch.rand(2, 3, 16, 16)
    expected = classifier((images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(trained.model(images), expected, rtol=1e-4, atol=1e-5)
    assert trained.notes == ()
    export_timm(trained, tmp_path / "e.safetensors", tmp_path / "e.json")
    torch.testing.assert_close(
        load_classifier(tmp_path / "e.safetensors").model(images), expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(CheckpointError, match=r"^use_normalize: .*normalises images"):
        load_classifier(path, overrides={"use_normalize": False})


def test_unknown_normalisation_is_said_with_what_to_do(tmp_path, classifier):
    path = saved(tmp_path / "bare.pth", classifier.state_dict())
    (note,) = load_classifier(path).notes
    assert "pixels in [0,1] are assumed" in note
    assert "--use_normalize" in note
    assert load_classifier(path, overrides={"use_normalize": True, "dataset": "cifar10"}).notes == ()
    assert (
        load_classifier(
            saved(tmp_path / "said.pth", {"model": classifier.state_dict(), "args": {"use_normalize": False}})
        ).notes
        == ()
    )


# ---- damage


def flipped(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


def test_a_flipped_byte_in_a_tensor_is_found_and_the_older_checkpoint_taken(tmp_path):
    for epoch in (0, 20):
        saved(tmp_path / f"checkpoint-{epoch}.pth", {"model": {"w": torch.randn(1000)}})
    path = tmp_path / "checkpoint-20.pth"
    with zipfile.ZipFile(path) as archive:
        (member,) = [one for one in archive.infolist() if one.filename.endswith("data/0")]
    flipped(path, member.header_offset + 1000)
    assert torch.load(path)["model"]["w"].shape == (1000,), "torch alone does not see it"
    said: list[str] = []
    found = read_newest(tmp_path, said.append)
    assert found is not None
    assert found.file.endswith("checkpoint-0.pth")
    assert "checksum of checkpoint-20/data/0 is wrong" in said[0]


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "a.pth", {"model": W})
    finally:
        torch.serialization.set_crc32_options(True)
    assert read(path, "resume").tensors.keys() == W.keys()


def test_an_exported_file_is_verified(tmp_path, classifier):
    trained = load_classifier(
        saved(tmp_path / "a.pth", {"model": classifier.state_dict(), "args": {"use_normalize": False}})
    )
    export_timm(trained, tmp_path / "e.safetensors", tmp_path / "e.json")
    assert load_classifier(tmp_path / "e.safetensors").notes == ()
    flipped(tmp_path / "e.safetensors", os.path.getsize(tmp_path / "e.safetensors") - 100)
    assert load_file(tmp_path / "e.safetensors"), "safetensors alone does not see it"
    with pytest.raises(CheckpointError, match="checksum of its tensors is wrong"):
        read(tmp_path / "e.safetensors", "checkpoint")


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, removed, repeated, cut off or put in."""
    changed, kind = bytearray(content), rng.randrange(5)
    start = rng.randrange(len(changed))
    end = min(start + 2 ** rng.randrange(12), len(changed))
    if kind == 0:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1:
        del changed[start:]
    elif kind == 2:
        del changed[start:end]
    elif kind == 3:
        changed[start:start] = changed[start:end]
    else:
        changed[start:end] = rng.randbytes(end - start)
    return bytes(changed)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_thousand_mutations_raise_no_exception_but_ours(tmp_path):
    """Of every format; a mutation that changes nothing that matters is read."""
    rng, state = (
        random.Random(0),
        {"model": {f"l{i}.w": torch.randn(40) for i in range(4)}, "epoch": 3, "args": {"lr": np.float64(1)}},
    )
    state["optimizer"] = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state["model"], tmp_path / "a.safetensors", {"mimir_fast": json.dumps({"dataset": "cifar10"})})
    originals, refused = [path.read_bytes() for path in sorted(tmp_path.iterdir())], 0
    path = tmp_path / "mutated.pth"
    for index in range(1000):
        path.write_bytes(mutated(originals[index % 3], rng))
        with contextlib.suppress(CheckpointError):
            refused += 1
            found = read(path, "resume")
            refused -= 1
            assert all(isinstance(part, dict) for part in (found.state, found.args))
    assert refused > 700
