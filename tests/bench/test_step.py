"""python -m bench step: the log, products counted by hand, the record, the simulated GPU."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from bench.__main__ import main
from bench.peaks import PEAKS
from bench.step import launches, roofline
from bench.step.launches import Counts, region
from bench.step.prices import Price
from bench.steps import FINETUNE, PRETRAIN, build_step, configuration, model_flops
from mimir_fast.models.families.vit import VIT
from tests.support.simulation import needs_simulated_gpu
from tests.support.small_models import SIZES, small_models

CPU = torch.device("cpu")
TINY = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CLASSIFIER = "--model vit_ti --batch_size 2 --input_size 32 --patch_size 8 --nb_classes 7 --device cpu --attention math"


# ---- what is issued

LOG = """MARK|trace
MARK|end
KERNEL|warm_up|1,1,1|1,1,1|0
MARK|trace
MARK|0
KERNEL|add|1,1,1|1,1,1|0
TRITON|triton_0|1,1,1|1,1,1|0|16
GEMM|Lt|TN|m=1,n=1,k=1,b=1|bf16->bf16|ep=1
MEMSET|64
MARK|-1
KERNEL|strange|1,1,1|1,1,1|0
MEMCPY|D2D|100
GRAPH|launch|0x1
GRAPH|illegal|cudaMalloc
MARK|1
MARK|product
MEMSET|32
MEMCPY|D2H|4
SYNC|stream
MALLOC|512
MARK|-1
MARK|end
KERNEL|after|1,1,1|1,1,1|0
"""


def test_the_log_of_a_simulated_gpu(tmp_path):
    log = tmp_path / "log"
    log.write_text(LOG)
    rows = region(log, launches.TRACE)
    counted = launches.from_log(rows)
    assert counted == Counts(3, 2, 2, graphs=1, copies=2, to_host=1, syncs=1, allocations=1, illegal=1)
    assert (counted.as_dict()["launches"], counted.as_dict()["issued"]) == (7, 12)
    calls = [[Price("other ATen", "aten.add.Tensor", 8)], [Price("copies", "aten.zero_.default", 32)]]
    found = [(p.kind, p.name, p.bytes, bool(p.why)) for p in launches.beyond(calls, rows)]
    assert found == [
        ("copies", "memset", 64, False),
        ("other ATen", "strange", 0, True),
        ("copies", "memcpy D2D", 200, False),
    ]


def test_a_profile_of_a_real_gpu():
    def event(name, start, end, device=DeviceType.CPU):
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, time_range=time_range, device_type=device, is_user_annotation=False)

    host = "cudaLaunchKernel cuLaunchKernelEx cudaMemsetAsync cudaMemcpyAsync cudaGraphLaunch cudaStreamSynchronize aten::mm"
    events = [event("step", 0, 10), event("cudaDeviceSynchronize", 11, 30)]
    events += [event(name, at, at + 1) for at, name in enumerate(host.split())]
    on_device = [("gemm", 2, 8), ("add", 6, 10), ("Memcpy DtoH (Device -> Pinned)", 15, 20)]
    events += [event(*e, device=DeviceType.CUDA) for e in on_device]
    counted, idle = launches.counts_of(events, gemms=1)
    assert counted == Counts(1, 1, 1, graphs=1, copies=1, to_host=1, syncs=1)
    assert idle == pytest.approx((2 + 5) / 20)


# ---- the steps


def tuning_flops(steps: int) -> int:
    """Products of one image's fine-tuning step of the tiny model by hand; a multiply-add is two.

    The attack: per step a forward pass and the input's gradient, once more the same, for attention (whose products have two
    factors that depend on the input) twice.  Training: a forward pass and both gradients, of the patches' projection the
    weight's only.
    """
    L, T, D, F, P, classes, depth = 16, 17, 48, 192, 3 * 8 * 8, 7, 2
    linear = depth * (2 * T * D * 3 * D + 2 * T * D * D + 2 * 2 * T * D * F) + 2 * D * classes
    patches, attended = 2 * L * P * D, depth * 2 * 2 * T * T * D
    return (2 * steps + 3) * linear + (2 * steps + 2) * patches + (3 * steps + 3) * attended


def test_flops_per_image_are_the_same_whatever_computes_them(monkeypatch):
    words = "--model mae_vit_ti --input_size 32 --patch_size 8 --batch_size 7 --device cpu --activation_checkpointing"
    D, E, L, K, P = 192, 128, 16, 4, 192
    embed, encoder = K * P * D, 12 * 12 * (1 + K) * D * D
    last = (3 * (1 + L) + 9 * (L - K)) * E * E  # the decoder's last block answers for removed patches only
    linear = embed + encoder + (1 + K) * D * E + 12 * (1 + L) * E * E + last + (L - K) * E * P
    products = 12 * 2 * (1 + K) ** 2 * D + 2 * (1 + L) ** 2 * E + 2 * (L - K) * (1 + L) * E
    # attack: forward and gradient of the inputs; training: forward and both gradients, but none of the pixels
    assert model_flops(configuration(PRETRAIN, words.split())) == 2 * (5 * linear - embed + 6 * products)
    monkeypatch.setitem(VIT.sizes, "vit_ti", TINY)
    for attack_steps in (1, 3):
        words = [*CLASSIFIER.split(), "--activation_checkpointing", "--steps", str(attack_steps)]
        assert model_flops(configuration(FINETUNE, words)) == tuning_flops(attack_steps)


def test_steps_of_every_family_and_their_sizes(monkeypatch):
    """The patch is that of tokens, which a Swin's name decides."""
    small_models(monkeypatch.setitem)
    for name in SIZES:
        words = f"--model mae_{name} --input_size 64 --patch_size 8 --device cpu".split()
        config = configuration(PRETRAIN, words)
        assert config.flat()["patch_size"] == (2 if name == "swin_tiny" else 8)
        assert model_flops(config.updated({"steps": 2})) > model_flops(config) > 0


def test_configurations_are_the_recipes(monkeypatch):
    config = configuration(FINETUNE, ["--device", "cpu", "--model", "vit_base"]).flat()
    wanted = {"attack_train": "pgd", "steps": 1, "eps": 4.0, "smoothing": 0.1, "drop_path": 0.1, "layer_decay": 0.65}
    assert wanted.items() <= config.items()
    textbook = configuration(FINETUNE, ["--device", "cpu", "--compile"], "textbook")
    assert not textbook.flat()["compile"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    ours, references = (configuration(PRETRAIN, [], variant).flat() for variant in ("ours", "references"))
    parts = ("kernels", "attention", "mlp")
    assert [ours[name] for name in parts] == ["triton", "auto", "auto"]
    assert [references[name] for name in parts] == ["reference", "sdpa", "reference"]
    with pytest.raises(ValueError, match=r"steps: .* got 2"):
        build_step("textbook", configuration(PRETRAIN, ["--device", "cpu", "--steps", "2"]), CPU)
    with pytest.raises(ValueError, match="variant: the textbook has ViTs only, got mae_cait_s36"):
        build_step("textbook", configuration(PRETRAIN, ["--device", "cpu", "--model", "mae_cait_s36"]), CPU)


# ---- the record


def test_summary():
    prices = [
        *[Price("GEMM", "aten.mm.out", 1e9, {"bf16": 989e9})] * 2,
        Price("attention", "flash", 1e9),
        *[Price("Inductor", "triton_poi_0", 3.35e9)] * 3,
        Price("other ATen", "aten.sign.default", 67e9),
        Price("solves", "aten.inverse", 0, solve=2e-3),
        Price("other ATen", "strange", 0, why="unknown"),
    ]
    counted, issued = Counts(10, 2, 3, syncs=1, to_host=4), Counts(0, 0, 2, graphs=1, copies=1)
    step = roofline.Step(prices, counted, 1.5, issued, host_ms=0.5, ms=50.0, idle=0.25)
    found = roofline.summary(step, PEAKS["h100"], 64)
    assert json.loads(json.dumps(found)) == found
    assert found["classes"]["GEMM"] == pytest.approx({"count": 2, "gb": 2, "tflop": 1.978, "bound_ms": 2})
    totals = found["totals"]
    assert [totals[name] for name in ("launches", "syncs", "to_host", "peak_gib")] == [15, 1, 4, 1.5]
    assert totals["gb"] == pytest.approx(2 + 1 + 3 * 3.35 + 67)
    assert totals["gb_outside_gemm_attention"] == pytest.approx(3 * 3.35 + 67)
    assert totals["bound_ms"] == pytest.approx(2 + 3 + 20 + 2 + 1 / 3.35)
    assert totals["bound_without_solves_ms"] == pytest.approx(totals["bound_ms"] - 2)
    assert [(c["name"], c["count"]) for c in found["calls"][:2]] == [("aten.sign.default", 1), ("triton_poi_0", 3)]
    assert (found["host"]["issued"], found["host"]["ms"]) == (4, 0.5)
    assert found["host"]["share_of_bound"] == pytest.approx(0.5 / totals["bound_ms"])
    share = {"share_of_bound": totals["bound_ms"] / 50, "idle": 0.25}
    assert found["measured"] == pytest.approx({"ms": 50.0, "images_per_s": 64 / 0.050, "mfu": 2 / 50, **share})
    # A product of cuBLAS at 60 % of its peak, everything else at 88 % of bandwidth, 15 launches
    ms = [2 / 0.6, *[part / 0.88 for part in (1 / 3.35, 3, 20)], 2, 15 * 1.1e-3]
    assert [found["expected"][name] for name in ("ms", "without_solves_ms")] == pytest.approx([sum(ms), sum(ms) - 2])
    text = "\n".join(roofline.lines(found))
    told = ["10 + 2 + 3 = 15", "syncs 1", "host 0.50 ms", "issued 4: kernels 0", "graphs 1", "strange: unknown"]
    told += ["expected, no bound and no measurement: 32 ms, 30 with"]
    for word in (*told, "measured 50.00 ms, 1280 images/s", "idle 25.0%"):
        assert word in text, word


# ---- on the simulated GPU


@needs_simulated_gpu
@pytest.mark.parametrize(
    ("task", "variant", "gpu", "words"),
    [
        (PRETRAIN, "ours", "h100", "-- --no_compile --residual_dtype bf16"),
        (PRETRAIN, "textbook", "a100", ""),
        (FINETUNE, "ours", "h100", "--steps 2 -- --no_compile --residual_dtype bf16"),
    ],
)
def test_on_a_simulated_gpu(task, variant, gpu, words, tmp_path, capfd):
    """Ours never waits for the device, and the host launches one graph for it."""
    size = f"--model {'mae_' * (task == PRETRAIN)}vit_ti --batch_size 2 --input_size 32 --patch_size 8"
    results = tmp_path / "step.jsonl"
    command = f"step --simulate {gpu} --task {task} --variant {variant} {size} --results {results} {words}"
    assert main(command.split()) == 0
    (found,) = map(json.loads, results.read_text().splitlines())
    assert (found["device"], found["task"], found["variant"]) == (f"simulated-{gpu}", task, variant)
    assert (found["measured"], found["driver"]) == (None, None)
    assert found["totals"]["bound_ms"] > 0
    printed = capfd.readouterr().out
    assert f"{task}, {variant}: " in printed
    assert "unpriced in part or in whole: nothing" in printed
    if variant == "textbook":
        assert found["totals"]["gemms"] == found["classes"]["GEMM"]["count"]
        assert found["totals"]["kernels"] > 500
        return
    assert found["totals"]["syncs"] == found["totals"]["to_host"] == 0
    host = found["host"]
    assert host["issued"] <= 10
    assert [host[name] for name in ("graphs", "gemms", "syncs", "allocations", "illegal")] == [1, 0, 0, 0, 0]
    assert 0 < host["ms"] < 1
    expected = "linf_start add_layer_norm short_attention linear_gelu".split()
    if task == PRETRAIN:
        expected += "mask_indices patch_gather token_restore masked_patch_loss masked_patch_loss_grad_pred".split()
        expected += "linf_patch_step nhsic_side nhsic_given nhsic_grad short_attention_grad".split()
    assert {*expected} <= {call["name"].split(".")[1] for call in found["calls"] if call["kind"] != "solves"}
