"""python -m bench kernels: which cases, what is right, what is timed and recorded."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import resized_crop

from bench.__main__ import main
from bench.kernels import command, rivals
from bench.kernels.cases import OPS, SIZES, Size, cases, entries
from bench.kernels.test_speed import Timed
from bench.peaks import PEAKS
from bench.step.roofline import sums
from tests.support.simulation import needs_simulated_gpu

CPU = torch.device("cpu")
TINY = Size(B=2, side=8, p=4, K=1, D=64, N=2, E=64, R=4)


# ---- which cases, and their bytes and FLOPs by hand


def test_recipes_of_one_shape_share_a_case_and_the_usual_dtype_comes_first():
    found = entries(["linf_start", "mlp"], ["imagenet_vit_s", "imagenet_vit_b", "cifar10_vit_s"], ["bf16", "fp32"])
    assert [(e.case.op, e.case.dtype, e.recipes) for e in found[:4]] == [
        ("mlp", "bf16", ("imagenet_vit_s",)),  # encoder
        ("mlp", "bf16", ("imagenet_vit_s", "imagenet_vit_b")),  # decoder
        ("linf_start", "fp32", ("imagenet_vit_s", "imagenet_vit_b")),
        ("mlp", "bf16", ("imagenet_vit_b",)),
    ]
    assert found[0].case.shape == {"B": 512, "T": 50, "D": 384, "F": 1536}
    cifar = next(e.case for e in found if e.recipes == ("cifar10_vit_s",) and e.case.part == "decoder")
    assert cifar.shape == {"B": 128, "T": 257, "D": 128, "F": 512}


def test_work_counted_by_hand(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY)

    def counted(op: str, dtype: str, part: str = "") -> dict[str, tuple[float, dict]]:
        case = next(e.case for e in entries([op], ["small"], [dtype]) if e.case.part == part)
        named = {direction: sums(prices, PEAKS["h100"]) for direction, prices in Timed(case, CPU).work.items()}
        return {direction: (f["gb"] * 1e9, f["tflop"] * 1e12, f["bound_ms"]) for direction, f in named.items()}

    count = 4 * 8 + 2 * 8 * 8
    assert counted("mask_indices", "fp32") == {"forward": pytest.approx((count, 0, count / 3.35e9))}
    out, flops = 2 * 5 * 64 * 2, 2 * 5 * 5 * 64  # decoder: two images of 1+4 tokens, 64 numbers of two bytes
    found = counted("short_attention", "bf16", "decoder")
    expected = {"forward": (4, 4), "backward": (7, 10), "both": (11, 14)}
    assert found == {d: pytest.approx((b * out, f * flops, b * out / 3.35e9)) for d, (b, f) in expected.items()}
    found = counted("mlp", "bf16", "encoder")  # 4 rows of 64, 256 hidden; all of its products count
    products = {"forward": 2, "backward": 4, "both": 6}
    assert {d: f[1] for d, f in found.items()} == {d: pytest.approx(n * 2 * 4 * 64 * 256) for d, n in products.items()}
    assert counted("mlp", "fp32", "encoder") == {}  # not offered


def test_judges_of_their_own():
    truth = torch.rand(4000, dtype=torch.float64)
    value = truth.float()
    value[:3] += 0.03
    assert rivals.few_signs_flipped(value, value, truth) == ""
    value[3:9] += 0.03
    assert "pixels are wrong" in rivals.few_signs_flipped(value, value, truth)
    images, eps = torch.rand(40000), rivals.EPS
    noise = eps * (2 * torch.rand(40000) - 1)
    assert rivals.moments((images + noise).clamp(0, 1), {"images_BCHW": images}) == ""
    assert "mean" in rivals.moments((images + noise.abs()).clamp(0, 1), {"images_BCHW": images})
    assert "ball" in rivals.moments((images + 1.2 * noise).clamp(0, 1), {"images_BCHW": images})
    assert "ball" in rivals.moments(torch.full_like(images, torch.nan), {"images_BCHW": images})
    assert rivals.close("fp32")(truth * 1.001, truth, truth) == ""
    assert "relative" in rivals.close("fp32")(truth * 1.003, truth, truth)


def test_adapters_of_libraries_that_only_a_gpu_has(monkeypatch):
    """CV-CUDA and DALI, stand-ins with their documented signatures: the same crops as torchvision's, flipped by the region."""

    def resized(image, first, last, size):
        (top, left), (bottom, right) = (map(round, first), map(round, last))
        box = top, min(left, right), bottom - top, abs(right - left)
        crop = resized_crop(image.permute(2, 0, 1), *box, size, interpolation=3, antialias=True)
        return (crop.flip(2) if left > right else crop).permute(1, 2, 0)

    class TensorBatch(list):
        def __init__(self, capacity):
            super().__init__()

        pushback = list.append

    def hq_resize_into(dst, src, *, antialias=False, roi=None, interpolation=None, stream=None):
        assert (antialias, interpolation, stream) == (True, "CUBIC", ("stream", 7))
        for out, image, region in zip(dst, src, roi, strict=True):
            out.copy_(resized(image, region[:2], region[2:], list(out.shape[:2])))

    def as_batch(tensors, layout=None):
        return tensors

    def resize(images, *, size, interp_type, antialias, roi_start, roi_end):
        assert (interp_type, antialias) == ("CUBIC", True)
        crops = [resized(*each, list(size)) for each in zip(images, roi_start.tolist(), roi_end.tolist(), strict=True)]
        return SimpleNamespace(torch=lambda: torch.stack(crops))

    cvcuda = {"TensorBatch": TensorBatch, "as_tensor": lambda tensor, layout: tensor, "hq_resize_into": hq_resize_into}
    cvcuda |= {"as_stream": lambda stream: ("stream", stream), "Interp": SimpleNamespace(CUBIC="CUBIC")}
    dynamic = SimpleNamespace(as_batch=as_batch, resize=resize)
    dali = SimpleNamespace(experimental=SimpleNamespace(dynamic=dynamic))
    types = SimpleNamespace(DALIInterpType=SimpleNamespace(INTERP_CUBIC="CUBIC"))
    modules = {"cvcuda": SimpleNamespace(**cvcuda), "nvidia": SimpleNamespace(dali=dali), "nvidia.dali": dali}
    modules |= {"nvidia.dali.types": types, "nvidia.dali.experimental": dali.experimental}
    modules["nvidia.dali.experimental.dynamic"] = dynamic
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    (case,) = cases("crop_resize", TINY, "fp32")
    inputs = case.draw()
    expected = rivals.by_torchvision(**inputs)
    assert torch.equal(rivals.by_cv_cuda(**inputs), expected)
    assert torch.equal(rivals.by_dali(**inputs), expected)


# ---- the command


@pytest.fixture
def here(monkeypatch):
    """pytest runs in this process: importing torch anew takes longer than most of these tests."""

    def run(words, cwd, check):
        return SimpleNamespace(returncode=pytest.main([*words[3:], f"--rootdir={cwd}"]))

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run))


@pytest.mark.slow
def test_every_operation_runs_on_a_cpu(here, tmp_path, monkeypatch):
    """Checked and timed, eager and the rivals, of which one is wrong; compiled for one of them."""
    monkeypatch.setattr(rivals, "torch_noise", lambda **inputs: inputs["images_BCHW"] + 1)
    file, words = tmp_path / "kernels.jsonl", "not compiled or (compiled and mask_indices)"
    assert main(["kernels", "--results", str(file), "--", "-k", words]) == 1
    found = [json.loads(line) for line in file.read_text().splitlines()]
    (wrong,) = [found.pop(n) for n, r in enumerate(found) if r["impl"] == "torch noise"]
    assert (wrong["status"], wrong["ms"]) == ("wrong", None)
    assert "the ball has" in wrong["why"]
    assert {r["op"] for r in found} == set(OPS)
    assert {r["impl"] for r in found} == {"eager", "compiled", "cdist", "torchvision"}
    for r in found:
        assert [r[name] for name in ("kind", "device", "dtype", "status")] == ["kernels", "cpu", "fp32", "ok"]
        assert r["recipe"] in ("small", "small encoder", "small decoder")
        assert 0 < r["ms_p20"] <= r["ms"] <= r["ms_p80"]
        if r["op"] != "mlp":  # not offered in fp32: no contract
            assert r["GB"] > 0
    directions = {op: {r["direction"] for r in found if r["op"] == op} for op in ("mask_indices", "nhsic")}
    assert directions == {"mask_indices": {"forward"}, "nhsic": {"forward", "backward", "both"}}


@needs_simulated_gpu
def test_our_kernels_run_on_a_simulated_gpu(tmp_path):
    """Forward and backward, compared with nothing and timed by nobody."""
    file = tmp_path / "kernels.jsonl"
    words = f"kernels short_attention mask_indices --recipes small --dtypes bf16 --simulate h100 --results {file}"
    assert main([*words.split(), "--", "-k", "ours"]) == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["device"], r["impl"], r["status"], r["ms"]) for r in found} == {
        ("simulated-h100", "ours", "simulated", None)
    }
    assert [(r["op"], r["direction"]) for r in found if r["recipe"] != "small decoder"] == [
        *(("short_attention", direction) for direction in ("forward", "backward", "both")),
        ("mask_indices", "forward"),
    ]


def test_what_there_is_no_time_for_is_left_out(here, tmp_path, capfd):
    assert main(["kernels", "mask_indices", "--seconds", "1e-9", "--results", str(tmp_path / "k.jsonl")]) == 0
    assert "6 skipped" in capfd.readouterr().out
    assert not (tmp_path / "k.jsonl").exists()
