"""What becomes of a configuration on a machine: dtypes, booleans, implementations, notes, and what is recorded."""

import pytest
import torch

from mimir_fast.cli.finetune import FINETUNE
from mimir_fast.cli.parser import parse_args
from mimir_fast.cli.pretrain import PRETRAIN
from mimir_fast.config.resolve import Machine, Run, missing_compiler, resolve, resolve_device

GPUS = Machine(2, lambda: None)
CPU = Machine(0, lambda: None)
BARE = Machine(0, lambda: "no compiler")


def resolved(line: str, machine: Machine = GPUS, command=PRETRAIN) -> Run:
    return resolve(*parse_args(command, line.split()), machine)


def test_defaults_on_a_gpu():
    run, c = resolved(""), resolved("").compute
    assert (run.device, run.notes) == ("cuda", ())
    assert (c.dtype, c.residual_dtype, c.scaled, c.compile) == (torch.bfloat16, None, False, True)
    assert (c.kernels, c.attention, c.mlp) == ("triton", "short", "triton")
    assert (c.fsdp, c.compress_gradients, c.activation_checkpointing) == (False, False, False)


@pytest.mark.parametrize("machine", [GPUS, CPU])
def test_defaults_on_a_cpu(machine):
    c = resolved("--device cpu", machine).compute
    assert (c.dtype, c.compile, c.kernels, c.attention, c.mlp) == (
        torch.float32,
        False,
        "reference",
        "sdpa",
        "reference",
    )


@pytest.mark.parametrize(
    ("line", "measured"),
    [
        ("", ("attention", "mlp")),
        ("--attention sdpa_flash", ("mlp",)),
        ("--mlp reference --precision fp16", ("attention",)),
        ("--attention short --mlp triton", ()),
        ("--tune off", ()),
        ("--kernels reference", ()),
        ("--precision fp32", ()),
        ("--device cpu --compile", ("attention",)),
        ("--device cpu", ()),
    ],
)
def test_what_is_measured_where_the_flags_leave_it_open(line, measured):
    run = resolved(line)
    assert run.compute.measured == measured
    assert run.flat()["tune"] == ("auto" if measured else "off")
    assert [op for op in ("attention", "mlp") if run.flat()[op] == "auto"] == list(measured)
    # Until choices are made; without any, the words are those computed with.
    assert "auto" not in (run.tuned("off").flat()["attention"], run.tuned("off").flat()["mlp"])


def test_choices_that_follow_other_choices():
    c = resolved("--kernels reference").compute
    assert (c.kernels, c.attention, c.mlp) == ("reference", "sdpa", "reference")
    c = resolved("--device cpu --compile").compute
    assert (c.compile, c.attention) == (True, "narrow")
    c = resolved("--precision fp16 --no_compile --grad_compression bf16").compute
    assert (c.dtype, c.scaled, c.compile, c.compress_gradients) == (torch.float16, True, False, True)
    assert resolved("--residual_dtype bf16").compute.residual_dtype == torch.bfloat16
    assert resolved("--precision fp32").compute.attention == "sdpa"
    c = resolved("--parallel fsdp").compute
    assert (c.fsdp, c.compile_region) == (True, "block")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device cpu --attention short", "attention: short needs a CUDA device"),
        ("--device cpu --kernels triton", "kernels: triton needs a CUDA device"),
        ("--device cpu --attention sdpa_cudnn", "attention: sdpa_cudnn needs a CUDA device; pass --attention sdpa"),
        ("--tune often", "tune: got 'often', expected auto, off, again or choices"),
        ("--attention narrow", "attention: narrow: it is for CPUs in fp32; pass --attention sdpa"),
        ("--precision fp32 --mlp triton", "mlp: triton needs a CUDA device and 16 bits"),
        ("--precision fp16 --residual_dtype bf16", "residual_dtype: bf16 goes with --precision bf16, not with fp16"),
        ("--parallel fsdp --precision fp16", "parallel: fsdp goes with --precision bf16 or fp32"),
        ("--parallel fsdp --compile_region model", "compile_region: fsdp gathers parameters block by block"),
        ("--device cuda:2", "device: got cuda:2, this machine has 2 CUDA devices"),
    ],
)
def test_what_does_not_go_together_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        resolved(line)


def test_a_machine_without_a_compiler():
    run = resolved("--device cpu --compile", BARE)
    assert (run.compute.compile, run.compute.attention) == (False, "sdpa")
    assert run.notes == ("compile: no compiler; running eager",)
    with pytest.raises(ValueError, match="attention: narrow: no compiler"):
        resolved("--device cpu --attention narrow", BARE)


def test_a_missing_compiler_is_found_out():
    assert missing_compiler() is None
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert "no C++ compiler" in missing_compiler()


def test_a_machine_is_asked_for_a_compiler_only_where_something_is_compiled():
    def unasked():
        raise AssertionError("asked")

    resolved("--device cpu", Machine(0, unasked))


def test_what_is_recorded_is_what_was_asked_with_nothing_left_open():
    run = resolved("--lr 0.5 --parallel fsdp --grad_compression bf16", Machine(0, lambda: None))
    flat = run.flat()
    assert list(flat) == list(run.config.flat())
    filled = {"device": "cpu", "precision": "fp32", "compile": False, "compile_region": "block"}
    filled |= {"kernels": "reference", "attention": "sdpa", "mlp": "reference", "step_graph": "off", "tune": "off"}
    assert flat == run.config.flat() | filled
    assert run.config.compute.precision is None
    assert resolve(run.config.updated(flat), set(flat) - {"compile_region"}, CPU).flat() == flat


def test_the_data_may_tell_the_classes_later():
    run = resolved("--dataset imagefolder", GPUS, FINETUNE)
    later = run.updated({"nb_classes": 7})
    assert (run.flat()["nb_classes"], later.flat()["nb_classes"], later.compute) == (None, 7, run.compute)


def test_a_device_that_is_not_there():
    said = []
    assert resolve_device("cpu", {"device"}, said.append, CPU) == "cpu"
    assert resolve_device("cuda", set(), said.append, CPU) == "cpu"
    assert "running on the CPU" in said[0]
    with pytest.raises(ValueError, match="device: got cuda:1, no CUDA device is available here; pass --device cpu"):
        resolve_device("cuda:1", {"device"}, said.append, CPU)
    assert [resolve_device(name, {"device"}, said.append, GPUS) for name in ("cuda", "cuda:1")] == ["cuda", "cuda:1"]
    for name in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(ValueError, match=f"device: got {name}, this machine has 2 CUDA devices"):
            resolve_device(name, {"device"}, said.append, GPUS)
    assert len(said) == 1


def test_this_machine(monkeypatch):
    assert Machine.here().cuda_devices == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert Machine.here() == Machine(3)


def test_notes_on_flags_without_effect():
    line = "--device cpu --attack_train apgd --alpha 3 --held_out 10 --mi_loss hsic --compat original"
    notes = resolved(line, CPU, FINETUNE).notes
    for word in ("alpha: apgd", "best.pth is chosen by clean", "NO information term"):
        assert any(word in note for note in notes), word
    (note,) = resolved("--device cpu --attack_train trades --smoothing 0.1", CPU, FINETUNE).notes
    assert "trades has a loss of its own" in note
    (note,) = resolved("--device cpu --mi_train hsic", CPU).notes
    assert "plain switches the penalty off too" in note
