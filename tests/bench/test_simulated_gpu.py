"""The simulated GPU: what it logs of each kind of call, what it knows of memory and graphs, whom it refuses."""

import sys

import pytest

from bench.simulated_gpu import __main__ as launcher
from bench.simulated_gpu import build
from tests.support.simulation import needs_simulated_gpu, run_simulated

PROGRAM = """
import ctypes, sys, threading
import torch, triton, triton.language as tl
from bench.simulated_gpu import marker

mark = marker()


@triton.jit
def doubled(x, BLOCK: tl.constexpr):
    at = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(at, 2 * tl.load(at))


def section(name, function):
    function()  # loads what is loaded once
    torch.cuda.synchronize()
    mark(name)
    try:
        function()
    finally:
        mark("end")


def capture(function, mode="thread_local"):
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            function()
    except RuntimeError:
        return
    graph.replay()


def forked():
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.add_(1)


def pinned_elsewhere():
    pins = lambda: ctypes.CDLL(None).cudaHostAlloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(4096), 0)
    other = threading.Thread(target=pins)
    other.start()
    other.join()
    x.add_(1)


x, half = torch.zeros(64, 32, device="cuda"), torch.zeros(3, 16, 8, device="cuda", dtype=torch.bfloat16)
weight, bias, square = (torch.zeros(*n, device="cuda") for n in ((48, 32), (48,), (40, 40)))
compiled = torch.compile(lambda x: (x.sin() + 1).sum(dim=1))
section("elementwise", lambda: x.add_(1))
section("product", lambda: torch.mm(x, weight.T))
section("batched", lambda: torch.bmm(half, half.transpose(1, 2)))
section("linear", lambda: torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
section("to host", lambda: x[0, 0].item())
section("semaphores", lambda: torch.empty(1 << 20, device="cuda").sum())
section("solve", lambda: torch.linalg.cholesky_ex(square))
section("triton", lambda: doubled[(4,)](x, BLOCK=512))
section("compiled", lambda: compiled(x))
section("graph", lambda: capture(lambda: x.add_(1)))
section("graph that waits", lambda: capture(lambda: torch.cuda.current_stream().synchronize()))
section("graph that leaves its stream", lambda: capture(forked))
section("thread that pins", lambda: capture(pinned_elsewhere))
section("thread that pins, global", lambda: capture(pinned_elsewhere, "global"))
torch.cuda.set_sync_debug_mode("error")
try:
    x.sum().item()
except RuntimeError:
    print("waiting is an error")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.mem_get_info()[1] >> 20)
before = torch.cuda.memory_allocated()
big = torch.empty(40 << 20, dtype=torch.uint8, device="cuda")
print("allocated", (torch.cuda.max_memory_allocated() - before) >> 20)
try:
    torch.empty(40 << 20, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("out of memory")
"""


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """Section -> the log's lines, split at |, and under "printed" what the program wrote."""
    folder = tmp_path_factory.mktemp("simulated")
    (folder / "program.py").write_text(PROGRAM)
    printed = run_simulated([sys.executable, folder / "program.py"], folder / "log", "a100", memory_mib=100)
    found, name = {"printed": printed}, None
    for line in (folder / "log").read_text().splitlines():
        kind, *rest = line.split("|")
        if kind == "MARK":
            name = None if rest == ["end"] else rest[0]
        elif name:
            found.setdefault(name, []).append([kind, *rest])
    return found


@needs_simulated_gpu
def test_launches_are_logged_by_name(observed):
    ((kind, name, *_),) = observed["elementwise"]
    assert (kind, "CUDAFunctorOnSelf_add" in name) == ("KERNEL", True)
    assert observed["triton"][0][:4] == ["TRITON", "doubled", "4,1,1", "128,1,1"]
    assert int(observed["triton"][0][5]) > 8  # registers, read from the machine code
    ((kind, name, *_),) = observed["compiled"]
    assert (kind, name.startswith("triton_")) == ("TRITON", True)


@needs_simulated_gpu
def test_products_are_logged_with_their_sizes(observed):
    """cuBLAS counts by columns: m is the result's width."""
    assert observed["product"] == [["GEMM", "Sgemm", "TN", "m=48,n=64,k=32,b=1", "f32->f32", "ep=0"]]
    ((kind, _, _, size, types, _),) = observed["batched"]
    assert (kind, size, types) == ("GEMM", "m=16,n=16,k=8,b=3", "bf16->bf16")
    (product,) = [row for row in observed["linear"] if row[0] == "GEMM"]
    assert (product[1], product[3], product[4]) == ("Lt", "m=48,n=64,k=32,b=1", "bf16->bf16")
    assert ["SOLVER", "potrf", "n=40,rhs=0,b=1"] in observed["solve"]


@needs_simulated_gpu
def test_copies_and_waits_are_logged(observed):
    assert observed["to host"] == [["MEMCPY", "D2H", "4"], ["SYNC", "stream"]]
    assert [row[0] for row in observed["semaphores"]].count("MEMSET") == 1  # of a sum by several blocks
    assert "waiting is an error" in observed["printed"]


@needs_simulated_gpu
def test_the_device_is_the_one_asked_for_and_its_memory_ends(observed):
    assert "NVIDIA A100-SXM4-80GB (8, 0) 100\nallocated 40\nout of memory" in observed["printed"]


@needs_simulated_gpu
def test_captures_are_held_to_the_rules(observed):
    graph = [row for row in observed["graph"] if row[0] == "GRAPH"]
    assert [row[1] for row in graph] == ["begin", "end", "launch"]
    assert graph[1][2] == "nodes=1"
    assert ["GRAPH", "illegal", "cudaStreamSynchronize of a capturing stream"] in observed["graph that waits"]
    assert "outside" in [row[1] for row in observed["graph that leaves its stream"] if row[0] == "GRAPH"]
    # Another thread may pin memory, unless the capture holds every thread to the rules.
    assert [row[1] for row in observed["thread that pins"] if row[0] == "GRAPH"] == ["begin", "end", "launch"]
    assert ["GRAPH", "illegal", "cudaHostAlloc"] in observed["thread that pins, global"]


# ---- who is refused, in one line


@pytest.fixture
def refused(capsys, monkeypatch):
    """The line with which the launcher ends; the process of the tests is not to become another program."""

    def run(*words: str) -> str:
        monkeypatch.setattr(launcher.os, "execvpe", lambda *program: pytest.fail("it was not refused"))
        assert launcher.main([*words, "true"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize("found", [("2.13.0+cu130", "13.0"), ("2.14.1+cu126", "12.6"), ("2.14.1+cpu", ""), ("", "")])
def test_another_torch_is_refused_politely(found, refused, monkeypatch):
    monkeypatch.setattr(build, "torch_version", lambda: found)
    line = refused()
    assert "held against torch 2.14 for CUDA 13, found " in line
    assert "--missing lists the calls that are not simulated, --any_torch tries all the same" in line


def test_what_it_lacks_is_named(refused, monkeypatch, tmp_path, capsys):
    assert launcher.main([]) == 2
    assert "program: expected a command to run" in capsys.readouterr().err
    monkeypatch.setattr(build, "include_folders", lambda: [tmp_path])
    assert f"no cuda.h in {tmp_path}; torch's wheels for CUDA 13 bring it along" in refused("--any_torch")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert "no g++ here" in refused("--any_torch")


@needs_simulated_gpu
def test_a_failed_build_is_one_line_and_leaves_nothing(refused, monkeypatch, tmp_path):
    (tmp_path / "broken.cpp").write_text("#include <no_such_header.h>\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "g++ failed: " in (line := refused())
    assert "no_such_header.h" in line
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]


@needs_simulated_gpu
def test_calls_that_are_not_simulated_are_listed(capsys):
    assert launcher.main(["--missing"]) == 0
    names = capsys.readouterr().out.split()
    assert "cudaIpcGetMemHandle" in names
    assert "cudaMalloc" not in names
